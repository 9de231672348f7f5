"""The losses, as functions of the leave-one-out scores log p (B,)."""

import math

import torch
from torch import Tensor


def box_cox(log_p: Tensor, q: float) -> Tensor:
    """(1 − p^q)/q (eq. 9), (B,): accurate for q → 0, where it is −log p, and for p → 0, where it is 1/q."""
    u = q * log_p
    # 1 − exp(u) loses all digits for small u, the derivative of expm1 loses them for large negative u.
    return torch.where(u > -0.69, -torch.expm1(u), 1 - torch.exp(u)) / q


def ntdne(log_p: Tensor, q: float, k: float | None, indicator: Tensor | None = None) -> Tensor:
    """Eq. 13, (B,): constant, so without gradient, where the score is at most k; eq. 9 elsewhere and for k None.

    `indicator` (B,) holds the log scores that decide; log p itself by default. NaN there means not known: kept.
    """
    loss = box_cox(log_p, q)
    if k is None:
        return loss
    decisive = log_p.detach() if indicator is None else indicator
    return torch.where(decisive <= math.log(k), -math.expm1(q * math.log(k)) / q, loss)


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
