"""The losses, as functions of the leave-one-out scores log p (B,)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def box_cox(log_p: Tensor, q: float) -> Tensor:
    """(1 − p^q)/q (eq. 9), (B,): accurate for q → 0, where it is −log p, and for p → 0, where it is 1/q."""
    u = q * log_p
    # 1 − exp(u) loses all digits for small u, the derivative of expm1 loses them for large negative u.
    return torch.where(u > -0.69, -torch.expm1(u), 1 - torch.exp(u)) / q


def ntdne(log_p: Tensor, q: float, k: float | None, indicator: Tensor | None = None) -> Tensor:
    """Eq. 13, (B,): constant, so without gradient, where the score is at most k; eq. 9 elsewhere and for k None.

    `indicator` (B,) holds log scores that decide in place of log p; NaN there leaves it to log p.
    """
    loss = box_cox(log_p, q)
    if k is None:
        return loss
    return torch.where(_decisive(log_p, indicator) <= math.log(k), -math.expm1(q * math.log(k)) / q, loss)


def reduce(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """The "none", "sum" or "mean" of a loss (B,), of the `counted` (B,) alone; the mean of nothing is 0."""
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(len(loss), 1) if counted is None else counted.sum().clamp(min=1))


def reduce_snca(log_p: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """−log p (eq. 5), reduced; queries without positives are ignored as by cross-entropy's `ignore_index`."""
    return reduce(-log_p, reduction, _with_positives(log_p, counted))


@dataclass(frozen=True)
class LossSpec:
    """Which loss: NTDNE with exponent q and threshold k (None prunes nothing), SNCA for q None; and its reduction.

    `indicator` says which score decides on pruning: the "current" one, the "stored" one of the image, or whether the
    stored one is above chance ("auto"), as `look_up.indicator_of` has it. The loss is multiplied by `scale`.
    """

    q: float | None
    k: float | None
    reduction: str
    indicator: str = "current"
    scale: float = 1.0


def slope_at_chance(class_sizes: Iterable[tuple[int, int]], N: int, q: float) -> float:
    """The size of NTDNE's slope, p^q (eq. 11), while scores are at chance: its mean over the images of an archive.

    Chance c is the share of the other N − 1 images that carry the image's label, as `look_up.log_chance` has it. Images
    without another one of their label have no gradient, and do not count; 1 where no others are.

    Args:
        class_sizes: (images, how many classes have so many), as `MemoryBank.class_sizes`.
        N: images, unlabelled ones too.
        q: exponent in (0, 1].
    """
    slopes = [(size * classes, ((size - 1) / (N - 1)) ** q) for size, classes in class_sizes if size > 1]
    images = sum(count for count, _ in slopes)
    return sum(count * slope for count, slope in slopes) / images if images else 1.0


def value(log_p: Tensor, indicator: Tensor | None, spec: LossSpec, counted: Tensor | None = None) -> Tensor:
    """The loss, differentiable by autograd: the definition.

    Queries that are not `counted` (B,) are ignored. If none is, a sum or mean is NaN: an encoder that diverged must not
    train on in silence.
    """
    if spec.q is None:
        reduced = reduce_snca(log_p, spec.reduction, counted)
    else:
        reduced = reduce(ntdne(log_p, spec.q, spec.k, indicator), spec.reduction, counted)
    reduced = spec.scale * reduced
    if counted is None or spec.reduction == "none" or len(log_p) == 0:
        return reduced
    return torch.where(counted.any(), reduced, torch.nan)


def loss_and_slope(
    log_p: Tensor, indicator: Tensor | None, spec: LossSpec, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative with respect to each log p (B,): dL_i/dlog p_i = −scale·p_i^q, of a mean 1/B."""
    slope = -torch.ones_like(log_p) if spec.q is None else -torch.exp(spec.q * log_p)
    if spec.k is not None:
        slope = torch.where(_decisive(log_p, indicator) <= math.log(spec.k), 0, slope)
    counts = _with_positives(log_p, counted) if spec.q is None else counted
    if counts is not None:
        slope = torch.where(counts, slope, 0)
    if spec.reduction == "mean":
        slope = slope / (max(len(slope), 1) if counts is None else counts.sum().clamp(min=1))
    return value(log_p, indicator, spec, counted), spec.scale * slope


def _with_positives(log_p: Tensor, counted: Tensor | None) -> Tensor:
    kept = log_p != -torch.inf  # NaN is kept: it must show
    return kept if counted is None else kept & counted


def _decisive(log_p: Tensor, indicator: Tensor | None) -> Tensor:
    return log_p.detach() if indicator is None else torch.where(indicator.isnan(), log_p.detach(), indicator)
