"""The inputs of the benchmarks: a batch of queries against a made archive.

Shapes: B queries, N bank rows, D features, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntdne_kernels import LabelIndex

SIGMA, Q = 0.1, 0.7


@dataclass(frozen=True)
class Problem:
    """A batch against an archive whose rows are in class order, as `MemoryBank` keeps them."""

    features: Tensor
    """(B, D) unit queries that require a gradient."""
    bank: Tensor
    """(N, D) unit rows."""
    labels: Tensor
    """(B,) of the queries."""
    bank_labels: Tensor
    """(N,)"""
    label_index: LabelIndex
    """Of `bank_labels`."""
    index: Tensor
    """(B,) each query's own row of the bank."""


def make(B: int, N: int, D: int, C: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random unit rows in C classes, and noisy copies of B different rows as queries.

    A call with the same archive as the call before shares its bank, also after something has written to it.
    """
    bank, bank_labels, label_index = _archive(N, D, C, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    spacing = N // B
    index = torch.arange(B, device=device) * spacing
    index += torch.randint(spacing, (B,), generator=generator, device=device)
    index = index[torch.randperm(B, generator=generator, device=device)]
    noise = torch.randn(B, D, generator=generator, device=device)
    features = nn.functional.normalize(bank[index].float() + 0.05 * noise, dim=1).requires_grad_()
    return Problem(features, bank, bank_labels[index], bank_labels, label_index, index)


_last: dict[tuple[object, ...], tuple[Tensor, Tensor, LabelIndex]] = {}


def _archive(*shape: Any) -> tuple[Tensor, Tensor, LabelIndex]:
    """The archive of the last call if it had the same shape: large ones take long to make."""
    if shape not in _last:
        _last.clear()  # first: two archives may not fit
        N, D, C, dtype, device = shape
        generator = torch.Generator(device).manual_seed(0)
        bank = torch.empty(N, D, dtype=dtype, device=device)
        for rows in bank.split(65536):
            rows.copy_(nn.functional.normalize(torch.randn(rows.shape, generator=generator, device=device), dim=1))
        bank_labels = torch.randint(0, C, (N,), generator=generator, device=device).sort().values
        _last[shape] = bank, bank_labels, LabelIndex.from_labels(bank_labels)
    return _last[shape]
