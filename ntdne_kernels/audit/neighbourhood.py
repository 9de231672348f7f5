"""The classes' sums in the neighbourhood of a bank's rows, Σ exp(f_i·f_j/σ), and the σ at which they foretell labels.

Shapes: B queries, N bank rows, C classes, K classes of a block, S temperatures.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, accumulator_dtype
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.functional import choose_backend
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.chunked import CHUNK_BYTES, chunks_of
from ntdne_kernels.ops.products import exp_

CLASS_BLOCK = 1024  # float64 sums of a block: 34 MB for 4,096 queries on a CPU, 268 MB for 32,768 on a GPU

SIGMAS = (
    *(1.0, 0.68, 0.46, 0.32, 0.22, 0.15),
    *(0.1, 0.068, 0.046, 0.032, 0.022, 0.015),
    *(0.01, 0.0068, 0.0046, 0.0032, 0.0022, 0.0015, 0.001),
)
"""What `choose_sigma` chooses from: six to a decade, the largest first."""
SAMPLE_SIZE = 2048
SAMPLE_BLOCK, PRODUCTS = 256, 1 << 25  # images of the sample together; their products, beside as many exponentials


@torch.no_grad()
def choose_sigma(bank: MemoryBank) -> float:
    """The σ of `SIGMAS` at which the class with the largest share of an image's neighbours is most often its label.

    Needs no right label: wrong ones that fall on images at random agree as seldom with every σ. Up to 2,048 images,
    drawn with a fixed seed, are compared with all N. The middle one is taken of those σ whose agreement is within one
    standard error of the highest: in small archives many agree equally often.

    On the untrained features of AID neighbours alone then find wrong labels with a mean average precision of 91.7 %,
    with the σ of training, 0.1, of 89.1 (`python -m benchmarks.audit features`).

    Example:
        >>> from ntdne_kernels.audit import feature_bank
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [0, 9], [1, 9], [2, 9]]).float()
        >>> choose_sigma(feature_bank(features, torch.tensor([0, 0, 0, 1, 1, 1])))
        0.032

    Args:
        bank: of N images, kept by one process.
    """
    first, N = int(bank.offsets[0]), len(bank)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(N - first, generator=generator, device="cpu")[:SAMPLE_SIZE].sort().values + first
    if len(drawn) == 0:
        return SIGMAS[0]
    ranges = own_range(bank, torch.arange(N, device=bank.device))
    agreeing = torch.zeros(len(SIGMAS), dtype=torch.int64, device=bank.device)
    for rows in drawn.to(bank.device).split(max(min(SAMPLE_BLOCK, PRODUCTS // N), 1)):
        products = _products(bank, rows)
        products -= products.amax(dim=0)  # the nearest neighbour: its weight is 1 at every sigma
        weights = torch.empty_like(products)
        for s, sigma in enumerate(SIGMAS):
            sums = products.new_zeros((len(bank.classes) + 1, len(rows)))
            sums.index_add_(0, ranges, exp_(torch.mul(products, 1 / sigma, out=weights)))
            agreeing[s] += (sums[1:].argmax(dim=0) + 1 == ranges[rows]).sum()
    agreement = agreeing.double().cpu() / len(drawn)
    best = agreement.max()
    good = (agreement >= best - (best * (1 - best) / len(drawn)).sqrt()).nonzero().squeeze(1)
    return SIGMAS[int(good[(len(good) - 1) // 2])]


def class_log_sums(bank: MemoryBank, rows: Tensor, sigma: float, backend: str | None) -> Tensor:
    """(B, 1 + C) float64: log Σ exp(f_i·f_j/σ) over the unlabelled rows, and over those of each class.

    A row is not among its own neighbours. −inf where there is none.

    Args:
        bank: of N images.
        rows: (B,) rows of `bank.storage`.
        sigma: temperature of the neighbourhood.
        backend: as in `functional.leave_one_out_log_scores`.
    """
    bounds = _bounds(bank)
    found = torch.full((len(rows), len(bounds) - 1), -torch.inf, dtype=torch.float64, device=bank.device)
    for first, log_sums in _range_log_sums(bank, rows, bounds, sigma, backend):
        found[:, first : first + log_sums.size(1)] = log_sums
    return found


def own_range(bank: MemoryBank, rows: Tensor) -> Tensor:
    """(B,) the column of `class_log_sums` that holds each row's own label; 0: unlabelled."""
    return torch.searchsorted(_bounds(bank), rows, right=True) - 1


def _bounds(bank: MemoryBank) -> Tensor:
    """(C + 2,) where ranges of rows begin: range 0 holds the unlabelled ones, range 1 + c those of class c."""
    return torch.cat([bank.offsets.new_zeros(1), bank.offsets])


def _products(bank: MemoryBank, rows: Tensor) -> Tensor:
    """(N, B) cosine similarities of all rows with the given ones; −inf of a row with itself."""
    dtype = accumulator_dtype(bank.storage.dtype)
    queries = bank.stored_rows(rows).to(dtype).t()
    found = queries.new_empty((len(bank), len(rows)))
    for start, chunk in chunks_of(bank.storage, bank.device, _chunk_rows(bank)):
        torch.mm(chunk.to(dtype), queries, out=found[start : start + len(chunk)])
    return found.scatter_(0, rows.unsqueeze(0), -torch.inf)


def _range_log_sums(
    bank: MemoryBank, rows: Tensor, bounds: Tensor, sigma: float, backend: str | None
) -> Iterator[tuple[int, Tensor]]:
    """(first, log sums (B, K)) of the ranges first to first + K − 1: each range that is not empty once, in order.

    Range r has the rows bounds[r] to bounds[r + 1]. A chunk of the bank may end inside of a range, whose sum is then
    carried into the next one.
    """
    log_sums_of = BACKENDS[choose_backend(backend, bank.storage, bank.device)].class_log_sums
    queries, begins = bank.stored_rows(rows), bounds.tolist()
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
