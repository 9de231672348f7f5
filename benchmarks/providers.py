"""All providers of the loss: ours, plain PyTorch's, attention kernels, losses of language models, the product alone.

`benchmarks.contract` says what a provider is. A new one is a function here (or in a module like `benchmarks.attention`,
where it takes many lines) and a line in `PROVIDERS`.

Shapes: B queries, b of them in a chunk, N bank rows, D features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from benchmarks import attention
from benchmarks.contract import Call, NotSupported, Outputs, Provider, loss_provider
from benchmarks.problems import SIGMA, Problem, Q
from ntdne_kernels.functional import ntdne_loss
from ntdne_kernels.ops.backends import BACKENDS

# Plain PyTorch

CHUNK_ELEMENTS = 1 << 24
"""Logits of a chunk: 64 MB in float32."""


def naive(problem: Problem, *, float32_softmax: bool = True) -> Tensor:
    """The loss as one writes it: B×N logits, softmax, masked sum; by default 16-bit logits get a float32 softmax."""
    logits = problem.features.to(problem.bank.dtype) @ problem.bank.t()
    logits = (logits.float() if float32_softmax else logits) / SIGMA
    logits = logits.scatter(1, problem.index.unsqueeze(1), -torch.inf)
    same = problem.labels.unsqueeze(1) == problem.bank_labels
    return ntdne((torch.softmax(logits, dim=1) * same).sum(dim=1))


def chunked(problem: Problem) -> Tensor:
    """The loss in chunks of bank rows, each of which is computed again in the backward pass."""
    features = problem.features
    length = max(CHUNK_ELEMENTS // len(features), 1)
    sum_all = sum_same = features.new_zeros(len(features), dtype=torch.float32)
    for start in range(0, len(problem.bank), length):
        rows, row_labels = problem.bank[start : start + length], problem.bank_labels[start : start + length]
        own = problem.index - start
        sums = checkpoint(_chunk_sums, features, rows, row_labels, problem.labels, own, use_reentrant=False)
        sum_all, sum_same = sum_all + sums[0], sum_same + sums[1]
    return ntdne(sum_same / sum_all)


def _chunk_sums(
    features: Tensor, rows: Tensor, row_labels: Tensor, labels: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    # Unit rows bound the logits by 1/σ, so that no maximum is needed. In float32, for the sum of the gradients.
    weights = (((features.to(rows.dtype) @ rows.t()).float() - 1) / SIGMA).exp()
    weights = weights.masked_fill(own.unsqueeze(1) == torch.arange(len(rows), device=own.device), 0)
    return weights.sum(dim=1), (weights * (labels.unsqueeze(1) == row_labels)).sum(dim=1)


def ntdne(p: Tensor) -> Tensor:
    """The mean of (1 − p^q)/q (eq. 9), with p kept above 0, where the gradient of p^q is infinite."""
    return ((1 - p.clamp(min=torch.finfo(p.dtype).tiny) ** Q) / Q).mean()


def _naive_in_16_bits(problem: Problem, gradient: bool) -> Call:
    if problem.bank.dtype == torch.float32:
        raise NotSupported("of 16-bit banks alone: else it is naive")
    return loss_provider(partial(naive, float32_softmax=False)).prepare(problem, gradient)


def _compiled(problem: Problem, gradient: bool) -> Call:
    return loss_provider(torch.compile(naive, dynamic=False)).prepare(problem, gradient)


# Ours


def ours(problem: Problem, backend: str, *, plain_labels: bool = False) -> Tensor:
    """With a `LabelIndex` that was built before, as NTDNELoss has it, or with a plain tensor of labels."""
    bank_labels = problem.bank_labels if plain_labels else problem.label_index
    return ntdne_loss(
        problem.features, problem.bank, problem.labels, bank_labels, problem.index, sigma=SIGMA, q=Q, backend=backend
    )


def _triton(problem: Problem, gradient: bool, *, plain_labels: bool = False) -> Call:
    missing = BACKENDS["triton"].missing(problem.bank)
    if missing is not None:
        raise NotSupported(f"needs {missing}")
    return loss_provider(partial(ours, backend="triton", plain_labels=plain_labels)).prepare(problem, gradient)


# Losses of language models


def _liger(problem: Problem, gradient: bool) -> Call:
    """With the memory for logits that `chunked` has: by default it takes the queries one at a time."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss
    except ImportError:
        raise NotSupported("liger-kernel is not installed") from None
    _check_device(problem)
    budget = max(CHUNK_ELEMENTS // problem.features.numel(), 1)
    return log_sum(partial(loss, chunk_mem_const=budget), problem, gradient)


def _cut_cross_entropy(problem: Problem, gradient: bool) -> Call:
    """Without its filter, which would leave every row of a bank of N = 10⁶ out of the gradient."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise NotSupported("cut-cross-entropy is not installed") from None
    _check_device(problem)
    attention.check_32_bits(problem)
    if gradient and problem.bank.dtype == torch.float32:
        raise NotSupported("has a gradient in 16 bits alone")
    return log_sum(partial(linear_cross_entropy, filter_eps=None), problem, gradient)


def _check_device(problem: Problem) -> None:
    if problem.bank.device.type == "cpu":
        raise NotSupported("has kernels for GPUs alone")


def log_sum(loss: Callable[..., Tensor], problem: Problem, gradient: bool) -> Call:
    """The mean cross-entropy loss(features, weight, target), with the bank as the last layer's weight."""

    def call() -> Outputs:
        with torch.set_grad_enabled(gradient):
            value = loss((problem.features / SIGMA).to(problem.bank.dtype), problem.bank, problem.index)
        return (value.detach(), *torch.autograd.grad(value, problem.features)) if gradient else (value,)

    return call


# The least there is to do


def product(problem: Problem, gradient: bool) -> Call:
    """The products with the bank, one for the loss and two with its gradient."""
    queries = problem.features.detach().to(problem.bank.dtype)

    def call() -> Outputs:
        similarities = queries @ problem.bank.t()
        return (similarities, similarities @ problem.bank) if gradient else (similarities,)

    return call


def _copy(problem: Problem, gradient: bool) -> Call:
    copied = torch.empty_like(problem.bank)
    return lambda: (copied.copy_(problem.bank),)


def _reading(problem: Problem, gradient: bool) -> Call:
    return lambda: (problem.bank.sum(),)


PROVIDERS = {
    "naive": loss_provider(naive),
    "naive in 16 bits": Provider("loss", _naive_in_16_bits),
    "naive, compiled": Provider("loss", _compiled),
    "chunked": loss_provider(chunked),
    "streaming": loss_provider(partial(ours, backend="streaming")),
    "streaming, plain labels": loss_provider(partial(ours, backend="streaming", plain_labels=True)),
    "triton": Provider("loss", _triton),
    "triton, plain labels": Provider("loss", partial(_triton, plain_labels=True)),
    "flex attention": Provider("loss", attention.compiled_flex),
    "SDPA flash": attention.scaled_dot_product(SDPBackend.FLASH_ATTENTION, folded=False),
    "SDPA flash, folded": attention.scaled_dot_product(SDPBackend.FLASH_ATTENTION, folded=True),
    "SDPA cuDNN": attention.scaled_dot_product(SDPBackend.CUDNN_ATTENTION, folded=False),
    "SDPA cuDNN, folded": attention.scaled_dot_product(SDPBackend.CUDNN_ATTENTION, folded=True),
    "SDPA efficient, folded": attention.scaled_dot_product(SDPBackend.EFFICIENT_ATTENTION, folded=True),
    "Liger": Provider("log sum", _liger),
    "cut cross-entropy": Provider("log sum", _cut_cross_entropy),
    "product alone": Provider("product", product),
}
"""Of the loss, with and without its gradient, in the order of the tables."""
PRODUCT = {"product": Provider("product", product)}
TRAFFIC = {"copy": Provider("copy", _copy), "reading": Provider("reading", _reading)}
"""What the machine can do at best."""
