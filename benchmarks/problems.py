"""What the benchmarks measure, made once for all of them.

Shapes: B queries, N bank rows, D features, C classes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ntdne_kernels import LabelIndex

SIGMA, Q = 0.1, 0.7


class Problem(NamedTuple):
    """A batch against an archive; rows stand in class order, as `MemoryBank` keeps them."""

    features: Tensor
    bank: Tensor
    labels: Tensor
    bank_labels: Tensor
    classes: LabelIndex
    index: Tensor


def make(B: int, N: int, D: int, C: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random unit rows in C classes; the queries are noisy copies of B different rows. Calls in a row share a bank."""
    bank, bank_labels, classes = _archive(N, D, C, dtype, device)
    source = torch.Generator(device).manual_seed(1)
    apart = N // B
    index = torch.arange(B, device=device) * apart + torch.randint(apart, (B,), generator=source, device=device)
    index = index[torch.randperm(B, generator=source, device=device)]
    noise = torch.randn(B, D, generator=source, device=device)
    features = nn.functional.normalize(bank[index].float() + 0.05 * noise, dim=1).requires_grad_()
    return Problem(features, bank, bank_labels[index], bank_labels, classes, index)


_made: dict[tuple[object, ...], tuple[Tensor, Tensor, LabelIndex]] = {}


def _archive(*shape: Any) -> tuple[Tensor, Tensor, LabelIndex]:
    """That of the call before, where it had the same shape: large ones take long to make."""
    if shape not in _made:
        _made.clear()  # first: two may not fit
        N, D, C, dtype, device = shape
        source = torch.Generator(device).manual_seed(0)
        bank = torch.empty(N, D, dtype=dtype, device=device)
        for rows in bank.split(65536):
            rows.copy_(nn.functional.normalize(torch.randn(rows.shape, generator=source, device=device), dim=1))
        bank_labels = torch.randint(0, C, (N,), generator=source, device=device).sort().values
        _made[shape] = bank, bank_labels, LabelIndex.from_labels(bank_labels)
    return _made[shape]
