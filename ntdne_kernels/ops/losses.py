"""The losses, as functions of the leave-one-out scores log p (B,)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
SMALLEST_CHANCE = 1e-3
"""A class of a smaller share has the unit of this one: else a single image could outweigh its batch."""
EVEN_CLASSES = 30
"""With more classes units are as large, on average, as those of so many even classes: see `common_unit`."""


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
    stored one is above chance ("auto"), as `look_up.indicator_of` has it.

    The loss of each image is divided by `unit`·c^q (`in_units`), c being chance; for None by 1. It needs an archive.
    """

    q: float | None
    k: float | None
    reduction: str
    indicator: str = "current"
    unit: float | None = None

    @property
    def needs_chance(self) -> bool:
        """Whether the loss depends on the sizes of classes."""
        return self.unit is not None or self.indicator == "auto"


def common_unit(class_sizes: Iterable[tuple[int, int]], N: int, q: float) -> float:
    """What the units c^q of an archive's classes are all multiplied by: 1 where there are few classes.

    In units of c^q the slope p^q (eq. 11) begins at 1, SNCA's, in a new bank, where p is near chance c, and rises to at
    most 0.3/c^q times the slope that SNCA has then: 3 for 30 even classes, 40 for 1,000. That was too much for the
    learning rate of cross-entropy (docs/choosing.md), so the mean of the units is at least EVEN_CLASSES^−q.

    Args:
        class_sizes: (images, how many classes have so many), as `MemoryBank.class_sizes`.
        N: images, unlabelled ones too.
        q: exponent in (0, 1].
    """
    units = [
        (size * classes, max((size - 1) / (N - 1), SMALLEST_CHANCE) ** q) for size, classes in class_sizes if size > 1
    ]
    images = sum(count for count, _ in units)
    return max(1.0, EVEN_CLASSES**-q * images / sum(count * unit for count, unit in units)) if images else 1.0


def in_units(x: Tensor, log_chance: Tensor | None, spec: LossSpec) -> Tensor:
    """A loss or slope x (B,) divided by the unit of each query's class, for `log_chance` (B,) as `look_up` has it.

    By 1 for images alone in their class or without a label: their loss is a constant.
    """
    if log_chance is None or spec.unit is None or spec.q is None:
        return x
    unit = spec.unit * torch.exp(spec.q * log_chance.clamp(min=math.log(SMALLEST_CHANCE)))
    return x / torch.where(log_chance > -torch.inf, unit, 1).to(x.dtype)  # NaN, of a label without images, is not


def value(
    log_p: Tensor,
    indicator: Tensor | None,
    spec: LossSpec,
    counted: Tensor | None = None,
    log_chance: Tensor | None = None,
) -> Tensor:
    """The loss, differentiable by autograd: the definition.

    Queries that are not `counted` (B,) are ignored. If none is, a sum or mean is NaN: an encoder that diverged must not
    train on in silence.
    """
    if spec.q is None:
        reduced = reduce_snca(log_p, spec.reduction, counted)
    else:
        loss = in_units(ntdne(log_p, spec.q, spec.k, indicator), log_chance, spec)
        reduced = reduce(loss, spec.reduction, counted)
    if counted is None or spec.reduction == "none" or len(log_p) == 0:
        return reduced
    return torch.where(counted.any(), reduced, torch.nan)


def loss_and_slope(
    log_p: Tensor,
    indicator: Tensor | None,
    spec: LossSpec,
    counted: Tensor | None = None,
    log_chance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative with respect to each log p (B,): dL_i/dlog p_i = −p_i^q (eq. 11), of a mean 1/B."""
    slope = -torch.ones_like(log_p) if spec.q is None else -torch.exp(spec.q * log_p)
    if spec.k is not None:
        slope = torch.where(_decisive(log_p, indicator) <= math.log(spec.k), 0, slope)
    counts = _with_positives(log_p, counted) if spec.q is None else counted
    if counts is not None:
        slope = torch.where(counts, slope, 0)
    if spec.reduction == "mean":
        slope = slope / (max(len(slope), 1) if counts is None else counts.sum().clamp(min=1))
    return value(log_p, indicator, spec, counted, log_chance), in_units(slope, log_chance, spec)


def _with_positives(log_p: Tensor, counted: Tensor | None) -> Tensor:
    kept = log_p != -torch.inf  # NaN is kept: it must show
    return kept if counted is None else kept & counted


def _decisive(log_p: Tensor, indicator: Tensor | None) -> Tensor:
    return log_p.detach() if indicator is None else torch.where(indicator.isnan(), log_p.detach(), indicator)
