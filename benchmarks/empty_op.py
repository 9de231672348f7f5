"""An op with the arguments and results of the loss on a GPU, that does nothing: what compiling adds to it is PyTorch's.

Shapes: B queries, D features.
"""

from typing import Any

import torch
from torch import Tensor

import ntdne_kernels.ops.gpu  # noqa: F401  defines the op
from benchmarks.problems import SIGMA, Problem, Q

_LIBRARY = torch.library.Library("ntdne_benchmarks", "FRAGMENT")
_SCHEMA = torch.ops.ntdne_kernels.triton_loss.default._schema
_ARGUMENTS = tuple(argument.name for argument in _SCHEMA.arguments)
_LIBRARY.define(str(_SCHEMA).replace("ntdne_kernels::triton_loss", "empty_loss", 1))


def _empty(features: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the loss (), log p (B,), its slope (B,), the gradient (B, D), and log Σ_all (B,)."""
    log_p = features.new_empty(features.size(0))
    return features.new_empty(()), log_p, torch.empty_like(log_p), torch.empty_like(features), torch.empty_like(log_p)


torch.library.register_fake("ntdne_benchmarks::empty_loss", _empty, lib=_LIBRARY)
_LIBRARY.impl("empty_loss", _empty, "CompositeExplicitAutograd")


class _Loss(torch.autograd.Function):
    """As `leave_one_out.LeaveOneOutLoss`, of a mean."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *rest: Any) -> Tensor:
        """The loss; its gradient is kept."""
        value, _, _, gradient, _ = torch.ops.ntdne_benchmarks.empty_loss.default(features, *rest)
        ctx.save_for_backward(gradient)
        loss: Tensor = value
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the features."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, *(None,) * (len(ctx.needs_input_grad) - 1)


def loss(problem: Problem) -> Tensor:
    """The loss (), whose value means nothing."""
    layout = problem.label_index.layout
    given: dict[str, Any] = {"bank": problem.bank, "labels": problem.labels, "own": problem.index, "sigma": SIGMA}
    given |= {"classes": layout.classes, "offsets": layout.offsets}
    given |= {"q": Q, "reduction": "mean", "indicator": "current", "unit": 1.0, "need_gradient": True}
    found: Tensor = _Loss.apply(problem.features, *(given.get(name) for name in _ARGUMENTS[1:]))
    return found
