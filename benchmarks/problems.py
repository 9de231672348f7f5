"""What the benchmarks measure, made once for all of them.

Shapes: B queries, N bank rows, D features, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ntdne_kernels import LabelIndex
from ntdne_kernels.functional import ntdne_loss


class Problem(NamedTuple):
    """A batch against an archive; rows stand in class order, as `MemoryBank` keeps them."""

    features: Tensor
    bank: Tensor
    labels: Tensor
    bank_labels: Tensor
    classes: LabelIndex
    index: Tensor


def make(B: int, N: int, D: int, C: int, dtype: torch.dtype) -> Problem:
    """Random unit rows in C classes; the queries are noisy copies of rows."""
    source = torch.Generator().manual_seed(0)
    bank = torch.empty(N, D, dtype=dtype)
    for rows in bank.split(65536):
        rows.copy_(nn.functional.normalize(torch.randn(rows.shape, generator=source), dim=1))
    bank_labels = torch.randint(0, C, (N,), generator=source).sort().values
    index = torch.randint(0, N, (B,), generator=source)
    features = bank[index].float() + 0.05 * torch.randn(B, D, generator=source)
    features = nn.functional.normalize(features, dim=1).requires_grad_()
    return Problem(features, bank, bank_labels[index], bank_labels, LabelIndex.from_labels(bank_labels), index)


def naive(problem: Problem, q: float = 0.7, sigma: float = 0.1) -> Tensor:
    """The loss as one writes it in PyTorch: b×N logits, softmax, masked sum, autograd."""
    logits = (problem.features.to(problem.bank.dtype) @ problem.bank.t()).float() / sigma
    logits = logits.scatter(1, problem.index.unsqueeze(1), -torch.inf)
    same = problem.labels.unsqueeze(1) == problem.bank_labels
    p = (torch.softmax(logits, dim=1) * same).sum(dim=1)
    return ((1 - p**q) / q).mean()


def streaming(problem: Problem) -> Tensor:
    """Ours, with the classes known beforehand: what NTDNELoss does."""
    return ntdne_loss(
        problem.features, problem.bank, problem.labels, problem.classes, problem.index, backend="streaming"
    )


def streaming_plain_labels(problem: Problem) -> Tensor:
    """Ours, with a plain tensor of labels."""
    return ntdne_loss(
        problem.features, problem.bank, problem.labels, problem.bank_labels, problem.index, backend="streaming"
    )


LOSSES: dict[str, Callable[[Problem], Tensor]] = {
    "naive": naive,
    "streaming": streaming,
    "streaming, plain labels": streaming_plain_labels,
}


def loss_and_gradient(loss: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """One step's worth: the loss, and its gradient to the features."""
    problem.features.grad = None
    value = loss(problem)
    value.backward()
    return value.detach()
