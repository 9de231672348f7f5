"""What B queries know after a part of the bank, and how parts become the whole.

Over any part of the bank a query has two sums, one over the rows of its class and one over the others, and the mean of
the rows weighted by their terms. Of parts r = 1, 2, ... (chunks of a bank in host memory, shards of one on many ranks)

    Σ = Σ_r Σ_r,    μ = Σ_r (Σ_r/Σ)·μ_r
    log p = −log(1 + Σ_other/Σ_same),    ∂log p/∂f = (1 − p)·(μ_same − μ_other)/σ

Sums travel as float64 logarithms: neither a small σ nor an empty part needs a case of its own.

Shapes: B queries, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST_PLAIN_SIGMA = 0.03
"""Down to this σ sums of exponentials of unit rows fit float32: exp(1.02/0.03) · 10^9 rows = 6·10^23 of 3·10^38."""


class ClassSums(NamedTuple):
    """The two sums and means of B queries over a part of the bank."""

    log_same: Tensor
    """(B,) float64: log Σ of exp(f_i·f_j/σ) over the rows j of the query's class without itself; −inf for no row."""
    log_other: Tensor
    """(B,) float64: the same over the other classes' rows."""
    mean_same: Tensor
    """(B, D), or (0, D) where no gradient is wanted: μ of the query's class; 0 for no row."""
    mean_other: Tensor
    """(B, D) or (0, D): μ of the others."""


def share(log_part: Tensor, log_whole: Tensor) -> Tensor:
    """Σ_r/Σ (B,) from logarithms; 0 for an empty part, also of an empty whole."""
    return torch.where(log_part == -torch.inf, 0, torch.exp(log_part - log_whole))


def add_part(sums: ClassSums | None, part: ClassSums) -> ClassSums:
    """The sums over what was seen so far (None: nothing) and one part more; its means are float64."""
    if sums is None:
        return ClassSums(part.log_same, part.log_other, part.mean_same.double(), part.mean_other.double())
    log_same = torch.logaddexp(sums.log_same, part.log_same)
    log_other = torch.logaddexp(sums.log_other, part.log_other)
    if len(part.mean_same) < len(log_same):
        return ClassSums(log_same, log_other, sums.mean_same, sums.mean_other)
    return ClassSums(
        log_same,
        log_other,
        torch.lerp(sums.mean_same, part.mean_same.double(), share(part.log_same, log_same).unsqueeze(1)),
        torch.lerp(sums.mean_other, part.mean_other.double(), share(part.log_other, log_other).unsqueeze(1)),
    )


def log_p_of(log_same: Tensor, log_other: Tensor) -> Tensor:
    """log p (B,) from the sums over the whole bank; −inf where no row is of the query's class."""
    has_positive = log_same != -torch.inf  # NaN counts, and stays NaN
    return torch.where(has_positive, nn.functional.logsigmoid(log_same - log_other), -torch.inf)


def contribution(part: ClassSums, log_same: Tensor, log_other: Tensor, sigma: float) -> Tensor:
    """What a part adds to ∂log p/∂f (B, D), given the sums (B,) over the whole bank."""
    scale = _scale(log_same, log_other, sigma)
    same = (scale * share(part.log_same, log_same)).unsqueeze(1)
    other = (scale * share(part.log_other, log_other)).unsqueeze(1)
    return same * part.mean_same - other * part.mean_other


def log_scores_of(sums: ClassSums, sigma: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log p (B,), ∂log p/∂f (B, D) or (0, D), and log Σ_all (B,), from the sums over the whole bank."""
    log_same, log_other, mean_same, mean_other = sums
    direction = mean_same
    if len(mean_same):
        direction = _scale(log_same, log_other, sigma).unsqueeze(1) * (mean_same - mean_other)
    log_p, log_sum_all = log_p_of(log_same, log_other), torch.logaddexp(log_same, log_other)
    return log_p.to(dtype), direction.to(dtype), log_sum_all.to(dtype)


def _scale(log_same: Tensor, log_other: Tensor, sigma: float) -> Tensor:
    """(1 − p)/σ (B,); 0 where no row is of the query's class."""
    return torch.where(log_same == -torch.inf, 0, torch.sigmoid(log_other - log_same)) / sigma
