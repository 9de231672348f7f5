"""The classes' shares in the neighbourhood of a bank's rows: sums of exp(f_i·f_j/σ) over each class.

Classes are met in the bank's order, at most CLASS_BLOCK at a time, so that (B, C) sums are never held at once.

Shapes: B queries, C classes, m classes kept, K classes of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.functional import choose_backend
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.chunked import CHUNK_BYTES, chunks_of

CLASS_BLOCK = 1024  # float64 sums of a block: 34 MB for 4,096 queries on a CPU, 268 MB for 32,768 on a GPU


class ClassShares(NamedTuple):
    """What the neighbours of B rows of a bank are of, on the bank's device."""

    log_score: Tensor
    """(B,) log of the share of the query's own label (eq. 4); −inf for no such row, NaN for an unlabelled query."""
    log_sum_all: Tensor
    """(B,) log Σ_j exp(f_i·f_j/σ) over all other rows."""
    top_classes: Tensor
    """(B, m) the classes with the largest shares, the largest first."""
    top_shares: Tensor
    """(B, m) float64: their shares."""


def class_shares(bank: MemoryBank, rows: Tensor, m: int, sigma: float, backend: str | None) -> ClassShares:
    """The shares of the m largest classes, and of its own, around each of the `rows` (B,) of `bank.storage`."""
    # Range 0 holds the unlabelled rows, range 1 + c the rows of class c.
    bounds = torch.cat([bank.offsets.new_zeros(1), bank.offsets])
    own = torch.searchsorted(bounds, rows, right=True) - 1
    log_own = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=bank.device)
    log_all = log_own.clone()
    log_top, top_ranges = log_own.new_empty((len(rows), 0)), own.new_empty((len(rows), 0))
    for first, log_sums in _range_log_sums(bank, rows, bounds, sigma, backend):
        log_all = torch.logaddexp(log_all, log_sums.logsumexp(dim=1))
        inside = (own >= first) & (own < first + log_sums.size(1))
        column = torch.where(inside, own - first, 0).unsqueeze(1)
        log_own = torch.where(inside, log_sums.gather(1, column).squeeze(1), log_own)
        labelled = max(first, 1)
        largest, columns = _largest(log_sums[:, labelled - first :], m)
        log_top, kept = _largest(torch.cat([log_top, largest], dim=1), m)
        top_ranges = torch.cat([top_ranges, columns + labelled], dim=1).gather(1, kept)
    log_own = torch.where(own == 0, torch.nan, log_own)
    return ClassShares(
        # −inf − (−inf) is NaN where the query has no neighbour at all.
        log_score=torch.where(log_own == -torch.inf, log_own, log_own - log_all).clamp(max=0),
        log_sum_all=log_all,
        top_classes=top_ranges - 1,
        top_shares=torch.where(log_top == -torch.inf, 0, (log_top - log_all.unsqueeze(1)).exp()),
    )


def _range_log_sums(
    bank: MemoryBank, rows: Tensor, bounds: Tensor, sigma: float, backend: str | None
) -> Iterator[tuple[int, Tensor]]:
    """(first, log sums (B, K)) of the ranges first to first + K − 1: each range that is not empty once, in order.

    Range r has the rows bounds[r] to bounds[r + 1]. A chunk of the bank may end inside of a range, whose sum is then
    carried into the next one.
    """
    log_sums_of = BACKENDS[choose_backend(backend, bank.storage, bank.device)].class_log_sums
    queries, begins = bank.storage[rows.to(bank.storage.device)].to(bank.device), bounds.tolist()
    carried: Tensor | None = None
    for start, chunk in chunks_of(bank.storage, bank.device, _chunk_rows(bank)):
        stop = start + len(chunk)
        for first, last in _blocks(begins, start, stop):
            offsets = bounds[first : last + 1].clamp(start, stop)
            begin, end = max(begins[first], start), min(begins[last], stop)
            index = torch.where((rows >= begin) & (rows < end), rows - begin, NOT_IN_BANK)
            log_sums = log_sums_of(queries, chunk[begin - start : end - start], index, offsets - begin, sigma)
            log_sums = log_sums.to(torch.float64).clone(memory_format=torch.contiguous_format)
            if carried is not None:
                log_sums[:, 0] = torch.logaddexp(log_sums[:, 0], carried)
                carried = None
            if begins[last] > stop:
                carried, log_sums = log_sums[:, -1], log_sums[:, :-1]
            if log_sums.size(1) > 0:
                yield first, log_sums


def _chunk_rows(bank: MemoryBank) -> int:
    """All rows where they lie on the device that computes."""
    if bank.storage.device == bank.device:
        return len(bank)
    return max(CHUNK_BYTES // (bank.storage.size(1) * bank.storage.element_size()), 1)


def _blocks(begins: list[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first range, last range + 1) of at most CLASS_BLOCK ranges with rows from `start` to `stop`."""
    first, end = np.searchsorted(begins, [start, stop], side="right") - 1
    end += int(begins[end] < stop)
    for block in range(int(first), int(end), CLASS_BLOCK):
        yield block, min(block + CLASS_BLOCK, int(end))


def _largest(log_sums: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest of the sums (B, K) in falling order, and their columns."""
    values, columns = log_sums.topk(min(m, log_sums.size(1)), dim=1)
    return values, columns
