"""log p_i, the leave-one-out score (eq. 4), and any loss of it, as one differentiable operation.

    log p_i        = log(Σ_same_i / Σ_all_i)               sums of exp(f_i·f_j/σ) over bank rows j ≠ r_i
    ∂log p_i/∂f_i  = (μ_same_i − μ_all_i)/σ                softmax-weighted means of bank rows      (eq. 6)
    ∂log p_i/∂f_j  = ([same]·p̃_ij − p_ij)/σ · f_i          p̃_ij = p_ij/p_i                          (eq. 7)

The gradient direction of the queries is made in the forward pass, and so is dL_i/dlog p_i: backward multiplies each row
of the direction by a number, and nothing of the bank has to be kept. The gradient of the bank, wanted by few, is a
second pass over it.

Shapes: B queries, N bank rows, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.ops import losses
from ntdne_kernels.ops.bank_update import accumulator_dtype

NOT_IN_BANK = -1
UNLABELLED = -1
# Equals no label, also none that a user's bank_labels could hold by mistake.
_MATCHES_NOTHING = torch.iinfo(torch.int64).min


class Neighbours(NamedTuple):
    """Which bank rows count for which query.

    Bank rows are visited in `order` (N,), or as they stand where it is None; j counts in that order.
    """

    same: Tensor
    """With `bank_labels`: (B,) labels, j is of the query's class where they are equal. Without: (B, 2) ranges of j."""
    bank_labels: Tensor | None
    """(N,), or None where a class is one range of j."""
    order: Tensor | None
    excluded: Tensor
    """(B,): the query itself, which is not its own neighbour; −1 where it is not in the bank."""


def neighbours_of(labels: Tensor, index: Tensor, classes: list[Tensor]) -> Neighbours:
    """Neighbours of queries with `labels` (B,) in the bank rows `index` (B,), −1 for none.

    `classes` says which bank rows belong to which class: [labels of the rows (N,)], or the tensors of a `LabelIndex`,
    [classes (C,), offsets (C + 1,)] for rows in class order, with [..., order (N,), position (N,)] for others.
    """
    if len(classes) == 1:
        return Neighbours(torch.where(labels >= 0, labels, _MATCHES_NOTHING), classes[0], None, index)
    ranges = class_ranges(labels, classes[0], classes[1])
    if len(classes) == 2:
        return Neighbours(ranges, None, None, index)
    order, position = classes[2:]
    inside = (index >= 0) & (index < len(position))
    place = torch.where(inside, position[index.clamp(0, len(position) - 1)], NOT_IN_BANK)
    return Neighbours(ranges, None, order, place)


def class_ranges(labels: Tensor, classes: Tensor, offsets: Tensor) -> Tensor:
    """(B, 2) begin and end, in class order, of the rows with each of the (B,) labels; (0, 0) where none has."""
    if len(classes) == 0:
        return labels.new_zeros((len(labels), 2))
    c = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    ranges = torch.stack([offsets[c], offsets[c + 1]], dim=1)
    return torch.where((classes[c] == labels).unsqueeze(1), ranges, 0)


def features_gradient(
    direction: Tensor, log_p: Tensor, slope: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """grad · dL_i/dlog p_i · ∂log p_i/∂f_i (B, D)."""
    return (_grad_log_p(log_p, slope, grad).unsqueeze(1) * direction).to(dtype)


def _grad_log_p(log_p: Tensor, slope: Tensor | None, grad: Tensor) -> Tensor:
    """grad · dL_i/dlog p_i (B,); a query without positives has none, whatever comes in."""
    return torch.where(log_p == -torch.inf, 0, grad if slope is None else grad * slope)


ClassSumsFunction = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """What a device does best in its own way; labels, index and classes as in `neighbours_of`."""

    log_scores: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(features, bank, labels, index, classes, sigma, need_direction) →

    log p (B,), ∂log p/∂f (B, D) or (0, D), log Σ_all (B,).
    """
    class_sums: ClassSumsFunction
    """(features, bank, labels, index, classes, sigma, need_means) → what `ClassSums` holds, over a part of a bank."""
    class_masses: Callable[..., Tensor]
    """(features (B, D), bank (n, D) of the same dtype, index (B,), offsets (K + 1,), sigma) →

    (B, K) float64: log Σ of exp(f_i·f_j/σ) over the rows j ≠ index_i of each of K ranges, from offsets[c] to
    offsets[c + 1]; −inf for no row. offsets[0] is 0, offsets[K] is n; index is −1 for a query in no row.
    """
    bank_gradient: Callable[..., Tensor]
    """(features, bank, labels, index, classes, sigma, log_p, log_sum_all, grad_log_p) → gradient of the bank (N, D)."""
    loss_and_slope: Callable[..., tuple[Tensor, Tensor]] = losses.loss_and_slope
    features_gradient: Callable[..., Tensor] = features_gradient


class _NotAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("the loss can be differentiated once; a second derivative needs backend='reference'")


def not_again(gradient: Tensor, *sources: Tensor) -> Tensor:
    """The gradient, which raises where its dependence on the `sources` is differentiated.

    `once_differentiable` raises only where the incoming gradient is differentiated: through an encoder a second
    derivative would come out wrong.
    """
    if not torch.is_grad_enabled():
        return gradient
    known: Tensor = _NotAgain.apply(gradient.detach(), *sources)
    return known


class LeaveOneOutLoss(torch.autograd.Function):
    """The loss and log p (B,) of the queries; for no loss, log p alone.

    Differentiable once, in the features and, where asked for, in the bank; the log p beside a loss is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        bank: Tensor,
        labels: Tensor,
        index: Tensor,
        classes: list[Tensor],
        sigma: float,
        loss: losses.Loss | None,
        indicator: Tensor | None,
        backend: Backend,
        need_direction: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        log_p, direction, log_sum_all = backend.log_scores(
            features, bank, labels, index, classes, sigma, need_direction
        )
        value, slope = log_p, None
        if loss is not None:
            value, slope = backend.loss_and_slope(log_p, indicator, loss.q, loss.k, loss.reduction)
            ctx.mark_non_differentiable(log_p)
            ctx.set_materialize_grads(False)  # of log p: a tensor of zeros
        ctx.sigma, ctx.backend = sigma, backend
        ctx.features_dtype = features.dtype
        if ctx.needs_input_grad[1]:
            for_bank = (log_sum_all, bank, labels, index, *classes)
            ctx.save_for_backward(log_p, slope, direction, features, *for_bank)
        else:
            ctx.save_for_backward(log_p, slope, direction, features)
        return log_p if loss is None else (value, log_p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing depends on the loss
            return (None,) * 10
        log_p, slope, direction, features, *for_bank = ctx.saved_tensors
        grad_features = grad_bank = None
        if ctx.needs_input_grad[0]:
            grad_features = ctx.backend.features_gradient(direction, log_p, slope, grad, ctx.features_dtype)
            grad_features = not_again(grad_features, grad, features)
        if ctx.needs_input_grad[1]:
            log_sum_all, bank, labels, index, *classes = for_bank
            grad_log_p = _grad_log_p(log_p, slope, grad)
            grad_bank = ctx.backend.bank_gradient(
                features, bank, labels, index, classes, ctx.sigma, log_p, log_sum_all, grad_log_p
            )
            grad_bank = not_again(grad_bank, grad, bank)
        return grad_features, grad_bank, *(None,) * 8


def log_scores_fake(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `Backend.log_scores`."""
    B, D = features.shape
    wide = accumulator_dtype(bank.dtype)
    return (
        bank.new_empty(B, dtype=wide),
        bank.new_empty((B if need_direction else 0, D), dtype=wide),
        bank.new_empty(B, dtype=wide),
    )


def class_sums_fake(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `Backend.class_sums`."""
    B, D = features.shape
    log_sum = bank.new_empty(B, dtype=torch.float64)
    mean = bank.new_empty((B if need_means else 0, D), dtype=accumulator_dtype(bank.dtype))
    return log_sum, torch.empty_like(log_sum), mean, torch.empty_like(mean)


def bank_gradient_fake(features: Tensor, bank: Tensor, *rest: Any) -> Tensor:
    """Shape and dtype of `Backend.bank_gradient`."""
    return torch.empty_like(bank, memory_format=torch.contiguous_format)
