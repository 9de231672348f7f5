"""How far what a provider computed lies from the same in float64: a benchmark of wrong numbers is none.

Gradients, means and products are compared for the first `QUERIES` queries; a loss without its gradient, which needs
all queries, up to `LARGEST_LOSS` logits.

Shapes: B queries, b of them looked at, N bank rows, D features, H parts of a bank.
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.providers import Outputs
from benchmarks.steps import MOMENTUM

QUERIES = 16
LARGEST_LOSS = 1 << 28
LARGEST_ERROR = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""Several times what the arithmetic leaves: beyond it something else is computed."""
ROWS = 1 << 16
"""Rows that are made float64 at a time."""


def error(result: str, outputs: Outputs, problem: Problem) -> float | None:
    """Relative, in the norm, of what `benchmarks.providers` says a result is; infinite of NaN; None: not compared."""
    with torch.no_grad():
        B, N = len(problem.features), len(problem.bank)
        features = problem.features[:QUERIES].double()
        if result in ("loss", "log sum"):
            if len(outputs) == 2:
                return _relative(outputs[1][:QUERIES], _loss_and_gradient(result, problem, slice(QUERIES))[1] / B)
            if B * N > LARGEST_LOSS:
                return None
            parts = [slice(first, first + QUERIES) for first in range(0, B, QUERIES)]
            return _relative(outputs[0], torch.cat([_loss_and_gradient(result, problem, of)[0] for of in parts]).mean())
        if result == "mean":  # the last part: its rows stand farthest from the bank's first
            means = outputs[0][-1, :QUERIES]
            total, vector = _sums(features, problem.bank[-(N // len(outputs[0])) :])[:2]
            return _relative(means, vector / total)
        if result == "product":
            expected = torch.cat([features @ rows.double().t() for rows in problem.bank.split(ROWS)], dim=1)
            return _relative(outputs[0][:QUERIES], expected)
        return None


def updated(before: Tensor, after: Tensor, features: Tensor) -> float:
    """The error of an update: rows (B, D) before and after it."""
    new = nn.functional.normalize(features.double(), dim=1)
    blend = MOMENTUM * before.double() + (1 - MOMENTUM) * new
    return _relative(after, nn.functional.normalize(blend, dim=1))


def _relative(got: Tensor, expected: Tensor) -> float:
    found = float((got.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(found) else found


def _loss_and_gradient(result: str, problem: Problem, of: slice) -> tuple[Tensor, Tensor]:
    """(b,) losses of some queries, and the gradient of each one's own (b, D)."""
    features, labels, own = problem.features[of].double(), problem.labels[of], problem.index[of]
    if result == "log sum":
        total, vector = _sums(features, problem.bank)[:2]
        row = problem.bank[own].double()
        return total.squeeze(1).log() + (1 - (features * row).sum(dim=1)) / SIGMA, (vector / total - row) / SIGMA
    total, vector, same, same_vector = _sums(features, problem.bank, own, labels, problem.bank_labels)
    p = same / total
    alone = same == 0
    slope = torch.where(alone, 0, -(p**Q) / SIGMA)
    return ((1 - p**Q) / Q).squeeze(1), slope * (same_vector / same.where(~alone, 1) - vector / total)


def _sums(
    features: Tensor,
    bank: Tensor,
    own: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_j w_j (b, 1) and Σ_j w_j·f_j (b, D) of the weights w_j = exp((f·f_j − 1)/σ) of all rows and of a class's.

    Without the query's own row, where it is told; those of a class only where labels are.
    """
    zero = features.new_zeros(len(features), 1)
    total, vector, same, same_vector = zero, zero, zero, zero
    for start in range(0, len(bank), ROWS):
        rows = bank[start : start + ROWS].double()
        weights = ((features @ rows.t() - 1) / SIGMA).exp()
        if own is not None:
            weights.masked_fill_(own.unsqueeze(1) == torch.arange(start, start + len(rows), device=own.device), 0)
        total, vector = total + weights.sum(dim=1, keepdim=True), vector + weights @ rows
        if labels is not None and bank_labels is not None:
            weights *= labels.unsqueeze(1) == bank_labels[start : start + ROWS]
            same, same_vector = same + weights.sum(dim=1, keepdim=True), same_vector + weights @ rows
    return total, vector, same, same_vector
