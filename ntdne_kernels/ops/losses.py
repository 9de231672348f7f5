"""The losses, as functions of the leave-one-out scores log p (B,)."""

import math
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


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The "none", "sum" or "mean" of a loss (B,); the mean of an empty batch is 0."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(len(loss), 1)


def reduce_snca(log_p: Tensor, reduction: str) -> Tensor:
    """−log p (eq. 5), reduced; queries without positives are ignored as by cross-entropy's `ignore_index`."""
    kept = log_p != -torch.inf  # NaN is kept: it must show
    loss = torch.where(kept, -log_p, 0)
    if reduction == "mean":
        return loss.sum() / kept.sum().clamp(min=1)
    return reduce(loss, reduction)


@dataclass(frozen=True)
class Loss:
    """Which loss: NTDNE with exponent q and threshold k (None prunes nothing), SNCA for q None; and its reduction."""

    q: float | None
    k: float | None
    reduction: str


def value(log_p: Tensor, indicator: Tensor | None, loss: Loss) -> Tensor:
    """The loss, differentiable by autograd: the definition."""
    if loss.q is None:
        return reduce_snca(log_p, loss.reduction)
    return reduce(ntdne(log_p, loss.q, loss.k, indicator), loss.reduction)


def loss_and_slope(
    log_p: Tensor, indicator: Tensor | None, q: float | None, k: float | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative with respect to each log p (B,): dL_i/dlog p_i = −p_i^q (eq. 11), of a mean 1/B."""
    counts = log_p != -torch.inf if q is None else torch.ones_like(log_p, dtype=torch.bool)
    slope = -torch.where(counts, 1.0, 0.0).to(log_p.dtype) if q is None else -torch.exp(q * log_p)
    if k is not None:
        slope = torch.where(_decisive(log_p, indicator) <= math.log(k), 0, slope)
    if reduction == "mean":
        slope = slope / counts.sum().clamp(min=1)
    return value(log_p, indicator, Loss(q, k, reduction)), slope


def loss_and_slope_fake(
    log_p: Tensor, indicator: Tensor | None, q: float | None, k: float | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `loss_and_slope`."""
    return log_p.new_empty(log_p.shape if reduction == "none" else ()), torch.empty_like(log_p)


def _decisive(log_p: Tensor, indicator: Tensor | None) -> Tensor:
    return log_p.detach() if indicator is None else torch.where(indicator.isnan(), log_p.detach(), indicator)
