"""What a provider is: one way to compute the loss, or a part of that work, which is measured beside the others.

A provider prepares a problem, which is not timed, and returns the call that is. It raises `NotSupported` for a problem
that it cannot serve. Its `result` names what the call returns, and so what `benchmarks.checks` compares it with:

    "loss"     the loss and, where it is asked for, its gradient with respect to the features (B, D)
    "mean"     (H, B, D) softmax-weighted means of the bank's rows, in H parts that are still to be merged. This is what
               an attention kernel computes with the bank as keys and values. It knows no classes and excludes no row
    "log sum"  log Σ_j exp(f_i·f_j/σ) − f_i·f_r/σ, averaged, and its gradient. This is what the fused losses of language
               models compute, with the query's own row r as the target
    "product"  F·Bankᵀ (B, N) and, where a gradient is asked for, a second product with the bank (B, D)
    others     nothing that is compared here

Shapes: B queries, N bank rows, D features, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import Problem

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The bank's dtype for each arithmetic of its products."""


class NotSupported(Exception):
    """A provider cannot serve a problem."""


class Provider(NamedTuple):
    """A way to compute a `result`."""

    result: str
    prepare: Callable[[Problem, bool], Call]
    """(problem, whether the gradient is wanted) → the call to time."""


def loss_provider(loss: Callable[[Problem], Tensor]) -> Provider:
    """The provider of a differentiable loss; autograd computes its gradient."""

    def prepare(problem: Problem, gradient: bool) -> Call:
        def call() -> Outputs:
            with torch.set_grad_enabled(gradient):
                value = loss(problem)
            return (value.detach(), *torch.autograd.grad(value, problem.features)) if gradient else (value,)

        return call

    return Provider("loss", prepare)


@contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """Set PyTorch's precision of float32 products: TF32 for "tf32", else exact.

    This uses the older of PyTorch's two settings, which sets the newer one too.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
