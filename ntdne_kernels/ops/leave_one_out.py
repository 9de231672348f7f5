"""log p_i, the leave-one-out score (eq. 4), as one differentiable operation that all losses share.

    log p_i        = log(Σ_same_i / Σ_all_i)               sums of exp(f_i·f_j/σ) over bank rows j ≠ r_i
    ∂log p_i/∂f_i  = (μ_same_i − μ_all_i)/σ                softmax-weighted means of bank rows      (eq. 6)
    ∂log p_i/∂f_j  = ([same]·p̃_ij − p_ij)/σ · f_i          p̃_ij = p_ij/p_i                          (eq. 7)

The gradient direction of the queries is made in the forward pass, so nothing of the bank has to be kept. The gradient
of the bank, wanted by few, is a second pass over it.

Shapes: B queries, N bank rows, D features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ntdne_kernels.ops.bank_update import accumulator_dtype


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


class Backend(NamedTuple):
    """The two passes over the bank, as custom ops."""

    log_scores: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(features, bank, *neighbours, sigma, need_direction) → log p (B,), ∂log p/∂f (B, D) or (0, D), log Σ_all (B,)."""
    bank_gradient: Callable[..., Tensor]
    """(features, bank, *neighbours, sigma, log_p, log_sum_all, grad_log_p) → gradient of the bank (N, D)."""


class LeaveOneOutLogScores(torch.autograd.Function):
    """log p (B,) of the queries, differentiable once in the features and, where asked for, in the bank."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        bank: Tensor,
        same: Tensor,
        bank_labels: Tensor | None,
        order: Tensor | None,
        excluded: Tensor,
        sigma: float,
        backend: Backend,
        need_direction: bool,
    ) -> Tensor:
        neighbours = Neighbours(same, bank_labels, order, excluded)
        log_p, direction, log_sum_all = backend.log_scores(features, bank, *neighbours, sigma, need_direction)
        ctx.sigma, ctx.backend = sigma, backend
        ctx.features_dtype = features.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(log_p, direction, log_sum_all, features, bank, *neighbours)
        else:
            ctx.save_for_backward(log_p, direction)
        return log_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_p: Tensor) -> tuple[Tensor | None, ...]:
        log_p, direction, *for_bank = ctx.saved_tensors
        # A query without positives has log p = −inf and no gradient, whatever comes in.
        grad_log_p = torch.where(log_p == -torch.inf, 0, grad_log_p)
        grad_features = grad_bank = None
        if ctx.needs_input_grad[0]:
            grad_features = (grad_log_p.unsqueeze(1) * direction).to(ctx.features_dtype)
        if ctx.needs_input_grad[1]:
            log_sum_all, features, bank, *neighbours = for_bank
            grad_bank = ctx.backend.bank_gradient(
                features, bank, *neighbours, ctx.sigma, log_p, log_sum_all, grad_log_p
            )
        return grad_features, grad_bank, None, None, None, None, None, None, None


def log_scores_fake(
    features: Tensor,
    bank: Tensor,
    same: Tensor,
    bank_labels: Tensor | None,
    order: Tensor | None,
    excluded: Tensor,
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


def bank_gradient_fake(features: Tensor, bank: Tensor, *rest: Any) -> Tensor:
    """Shape and dtype of `Backend.bank_gradient`."""
    return torch.empty_like(bank, memory_format=torch.contiguous_format)
