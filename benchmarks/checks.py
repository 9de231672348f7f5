"""The error of what a provider computed, against float64: the speed of a wrong result says nothing.

Gradients, means and products are compared for the first `QUERIES` queries. A loss without its gradient needs all
queries, and is compared for up to `LARGEST_LOSS` logits.

Shapes: B queries, b of them compared, N bank rows, D features, H parts of a bank.
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.contract import Outputs
from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.steps import MOMENTUM

QUERIES = 16
LARGEST_LOSS = 1 << 28
LARGEST_ERROR = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""Several times the rounding error: beyond it something else is computed."""
ROWS = 1 << 16
"""Rows that are converted to float64 at a time."""


def error(result: str, outputs: Outputs, problem: Problem) -> float | None:
    """The error relative to the norm of the true result; infinite for NaN.

    Args:
        result: What was computed, as `benchmarks.contract` names it.
        outputs: Of the call.
        problem: That the call was prepared for.

    Returns:
        The error, or None where this result is not compared.
    """
    with torch.no_grad():
        B, N = len(problem.features), len(problem.bank)
        features = problem.features[:QUERIES].double()
        if result in ("loss", "log sum"):
            if len(outputs) == 2:
                gradient = _loss_and_gradient(result, problem, slice(QUERIES))[1] / B
                return _relative(outputs[1][:QUERIES], gradient)
            if B * N > LARGEST_LOSS:
                return None
            parts = [slice(first, first + QUERIES) for first in range(0, B, QUERIES)]
            losses = torch.cat([_loss_and_gradient(result, problem, part)[0] for part in parts])
            return _relative(outputs[0], losses.mean())
        if result == "mean":  # of the last part: wrong offsets show there
            means = outputs[0][-1, :QUERIES]
            total, vector = _sums(features, problem.bank[-(N // len(outputs[0])) :])[:2]
            return _relative(means, vector / total)
        if result == "product":
            expected = torch.cat([features @ rows.double().t() for rows in problem.bank.split(ROWS)], dim=1)
            return _relative(outputs[0][:QUERIES], expected)
        return None


def error_of_update(before: Tensor, after: Tensor, features: Tensor) -> float:
    """The relative error of an update (eq. 15), given rows (B, D) before and after it, and the features (B, D)."""
    new = nn.functional.normalize(features.double(), dim=1)
    blend = MOMENTUM * before.double() + (1 - MOMENTUM) * new
    return _relative(after, nn.functional.normalize(blend, dim=1))


def _relative(got: Tensor, expected: Tensor) -> float:
    error = float((got.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def _loss_and_gradient(result: str, problem: Problem, part: slice) -> tuple[Tensor, Tensor]:
    """(b,) losses of some queries, and the gradient (b, D) of each query's own loss."""
    features, labels, own = problem.features[part].double(), problem.labels[part], problem.index[part]
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
    """Σ_j w_j (b, 1) and Σ_j w_j·f_j (b, D) with weights w_j = exp((f·f_j − 1)/σ), over all rows and over a class.

    Args:
        features: (b, D) of the queries.
        bank: (N, D)
        own: (b,) rows to leave out, one for each query.
        labels: (b,) of the queries; without them the sums over the class are 0.
        bank_labels: (N,)
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
