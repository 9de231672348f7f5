"""log p_i, the leave-one-out score (eq. 4), and any loss of it, as one differentiable operation.

    log p_i        = log(Σ_same_i / Σ_all_i)               sums of exp(f_i·f_j/σ) over bank rows j ≠ r_i
    ∂log p_i/∂f_i  = (μ_same_i − μ_all_i)/σ                softmax-weighted means of bank rows      (eq. 6)
    ∂log p_i/∂f_j  = ([same]·p̃_ij − p_ij)/σ · f_i          p̃_ij = p_ij/p_i                          (eq. 7)

The gradient of the queries is made in the forward pass: backward multiplies it by a number, and nothing of the bank has
to be kept. The gradient of the bank, wanted by few, is a second pass over it.

Shapes: B queries, N bank rows, D features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ntdne_kernels.ops import losses
from ntdne_kernels.ops.look_up import look_up
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Archive, Batch

LogScores = tuple[Tensor, Tensor, Tensor]
"""log p (B,), ∂log p/∂f (B, D) or (0, D), log Σ_all (B,)."""
Sums = tuple[Tensor, Tensor, Tensor, Tensor]
"""What `ClassSums` holds."""
LossAndGradient = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The loss, log p (B,), dL/dlog p (B,), dL/df (B, D) or (0, D), log Σ_all (B,).

Features without a direction have log p = NaN and are left out of the loss. Under "none" row i of the gradient is that
of loss i.
"""


class Backend(Protocol):
    """A way to sum over the bank. Everything else asks for no more than this."""

    def missing(self, bank: Tensor) -> str | None:
        """What the backend needs and does not have here, or None where it can serve the bank."""

    def loss(self, batch: Batch, archive: Archive | None, spec: LossSpec | None) -> tuple[Tensor, Tensor]:
        """The loss and log p (B,), which beside a loss has no gradient; for no loss, log p twice.

        Differentiable in the features and the bank. `look_up` says what an archive changes.
        """

    def class_sums(self, batch: Batch, need_means: bool) -> Sums:
        """What `ClassSums` holds, over a part of a bank that may be empty."""

    def class_log_sums(self, features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
        """(B, K) float64: log Σ of exp(f_i·f_j/σ) over the rows j ≠ index_i of each of K ranges; −inf for no row.

        Features (B, D) have the bank's dtype. Range c is offsets[c] to offsets[c + 1]; offsets[0] is 0, offsets[K] the
        number of rows. index (B,) is −1 for a query in no row.
        """


def serves_all(bank: Tensor) -> None:
    """`Backend.missing` of a backend that needs nothing."""


@dataclass(frozen=True)
class GradientInForward:
    """A `Backend` made of functions that compute gradients themselves, outside autograd."""

    log_scores: Callable[[Batch, bool], LogScores]
    """(batch, need_direction); labels are given."""
    class_sums: Callable[[Batch, bool], Sums]
    class_log_sums: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    bank_gradient: Callable[[Batch, Tensor, Tensor, Tensor], Tensor]
    """(batch, log_p, log_sum_all, grad_log_p) → gradient of the bank (N, D)."""
    fused_loss: Callable[[Batch, Archive | None, LossSpec, bool], LossAndGradient] | None = None
    """`loss_and_gradient` in fewer steps, where the device has a way."""
    missing: Callable[[Tensor], str | None] = serves_all

    def loss(self, batch: Batch, archive: Archive | None, spec: LossSpec | None) -> tuple[Tensor, Tensor]:
        """As `Backend.loss`. Can be differentiated once."""
        need_gradient = torch.is_grad_enabled() and batch.features.requires_grad
        result: Tensor | tuple[Tensor, Tensor] = LeaveOneOutLoss.apply(
            batch.features, batch.bank, batch, archive, spec, self, need_gradient
        )
        return (result, result) if isinstance(result, Tensor) else result

    def loss_and_gradient(
        self, batch: Batch, archive: Archive | None, spec: LossSpec, need_gradient: bool
    ) -> LossAndGradient:
        """The loss of a batch and its gradient, outside autograd."""
        if self.fused_loss is not None:
            return self.fused_loss(batch, archive, spec, need_gradient)
        queries = look_up(batch, archive, spec)
        log_p, direction, log_sum_all = self.log_scores(queries.batch, need_gradient)
        if queries.counted is not None:
            log_p = torch.where(queries.counted, log_p, torch.nan)
        value, slope = losses.loss_and_slope(log_p, queries.indicator, spec, queries.counted, queries.log_chance)
        if not need_gradient:
            return value, log_p, slope, direction, log_sum_all
        gradient = rows_times(slope, direction, log_p)
        if queries.norms is not None:  # of f = x/|x| the gradient of x is (g − (g·f)f)/|x|
            units = queries.batch.features
            along = (gradient * units).sum(dim=1, keepdim=True)
            gradient = (gradient - along * units) / torch.where(queries.norms != 0, queries.norms, 1).unsqueeze(1)
        return value, log_p, slope, gradient, log_sum_all


def rows_times(factor: Tensor, direction: Tensor, log_p: Tensor) -> Tensor:
    """factor (B,) · direction (B, D); exactly 0, whatever comes in, where a query has no positives or no direction."""
    return torch.where((log_p > -torch.inf).unsqueeze(1), factor.unsqueeze(1) * direction, 0)


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
        batch: Batch,
        archive: Archive | None,
        spec: LossSpec | None,
        backend: GradientInForward,
        need_gradient: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss and log p, with the gradient made on the way."""
        batch = Batch(features, bank, *batch[2:])  # with autograd's own tensors
        if spec is None:
            log_p, gradient, log_sum_all = backend.log_scores(batch, need_gradient)
            value, slope = log_p, torch.ones_like(log_p) if ctx.needs_input_grad[1] else None
        else:
            value, log_p, slope, gradient, log_sum_all = backend.loss_and_gradient(batch, archive, spec, need_gradient)
            ctx.mark_non_differentiable(log_p)
            ctx.set_materialize_grads(False)  # of log p: a tensor of zeros
        ctx.backend, ctx.sigma = backend, batch.sigma
        for_bank = (slope, log_sum_all, *batch.flat()[1:-1]) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(log_p, gradient, features, *for_bank)
        return log_p if spec is None else (value, log_p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """What was made in the forward, times the gradient of the result."""
        if grad is None:  # nothing depends on the loss
            return (None,) * 7
        log_p, gradient, features, *for_bank = ctx.saved_tensors
        grad_features = grad_bank = None
        if ctx.needs_input_grad[0]:
            scaled = gradient * grad if grad.dim() == 0 else rows_times(grad, gradient, log_p)
            grad_features = not_again(scaled.to(features.dtype), grad, features)
        if ctx.needs_input_grad[1]:
            slope, log_sum_all, *rest = for_bank
            batch = Batch.of(features, *rest, ctx.sigma)
            grad_log_p = torch.where(log_p > -torch.inf, grad * slope, 0)
            grad_bank = not_again(ctx.backend.bank_gradient(batch, log_p, log_sum_all, grad_log_p), grad, batch.bank)
        return grad_features, grad_bank, *(None,) * 5
