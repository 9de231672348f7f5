"""Ways to compute the loss, ours and others, and parts of the work, which say how fast any way can be.

A provider prepares a problem, which is not timed, and gives back the call that is, or says in `NotSupported` why it has
none. What a call computes and gives back is its `result`:

    "loss"     the loss and, where asked for, its gradient to the features (B, D)
    "mean"     (H, B, D) softmax-weighted means over the whole bank in H parts, which remain to be merged: what an
               attention kernel makes where keys and values are the bank. It knows no classes and excludes nobody
    "log sum"  log Σ_j exp(f_i·f_j/σ) − f_i·f_r/σ, averaged, and its gradient: what fused losses of language models
               make, with the query's own row r for the target
    "product"  F·Bankᵀ (B, N), and in a gradient's place a second product with the bank (B, D)
    others     nothing that is compared here

Shapes: B queries, N bank rows, D features, H heads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.timing import wall
from ntdne_kernels.functional import ntdne_loss
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.layout import class_ranges

Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of the bank, by the arithmetic of its products."""


class NotSupported(Exception):
    """A provider cannot serve a problem."""


class Provider(NamedTuple):
    result: str
    prepare: Callable[[Problem, bool], Run]
    """(problem, whether the gradient is wanted) → the call."""


@contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """Float32 products of PyTorch as the name says, in its older setting, which sets the newer ones too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# The loss in PyTorch


def naive(problem: Problem, *, wide: bool = True) -> Tensor:
    """As one writes it: b×N logits, softmax, masked sum, autograd. Wide: a float32 softmax of 16-bit products."""
    logits = problem.features.to(problem.bank.dtype) @ problem.bank.t()
    logits = (logits.float() if wide else logits) / SIGMA
    logits = logits.scatter(1, problem.index.unsqueeze(1), -torch.inf)
    same = problem.labels.unsqueeze(1) == problem.bank_labels
    return truncated((torch.softmax(logits, dim=1) * same).sum(dim=1))


def chunked(problem: Problem) -> Tensor:
    """In chunks of rows, each computed again for the gradient; unit rows bound the logits by 1/σ."""
    features = problem.features
    length = max(CHUNK_ELEMENTS // len(features), 1)
    everything = same = features.new_zeros(len(features), dtype=torch.float32)
    for start in range(0, len(problem.bank), length):
        chunk = problem.bank[start : start + length], problem.bank_labels[start : start + length]
        of_chunk = checkpoint(_sums, features, *chunk, problem.labels, problem.index - start, use_reentrant=False)
        everything, same = everything + of_chunk[0], same + of_chunk[1]
    return truncated(same / everything)


CHUNK_ELEMENTS = 1 << 24
"""Logits of a chunk: 64 MB in float32."""


def _sums(features: Tensor, rows: Tensor, row_labels: Tensor, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    weights = (((features.to(rows.dtype) @ rows.t()).float() - 1) / SIGMA).exp()  # gradients add up in float32
    weights = weights.masked_fill(own.unsqueeze(1) == torch.arange(len(rows), device=own.device), 0)
    return weights.sum(dim=1), (weights * (labels.unsqueeze(1) == row_labels)).sum(dim=1)


def truncated(p: Tensor) -> Tensor:
    """Eq. 9; the gradient of p^q is infinite at 0, and times 0 not a number."""
    return ((1 - p.clamp(min=torch.finfo(p.dtype).tiny) ** Q) / Q).mean()


def _loss(loss: Callable[[Problem], Tensor]) -> Provider:
    def prepare(problem: Problem, gradient: bool) -> Run:
        def run() -> Outputs:
            with torch.set_grad_enabled(gradient):
                value = loss(problem)
            return (value.detach(), *torch.autograd.grad(value, problem.features)) if gradient else (value,)

        return run

    return Provider("loss", prepare)


def _naive_in_16_bits(problem: Problem, gradient: bool) -> Run:
    if problem.bank.dtype == torch.float32:
        raise NotSupported("of 16-bit banks alone: else it is naive")
    return _loss(partial(naive, wide=False)).prepare(problem, gradient)


def _compiled(problem: Problem, gradient: bool) -> Run:
    return _loss(torch.compile(naive, dynamic=False)).prepare(problem, gradient)


# Ours


def ours(problem: Problem, backend: str, *, plain_labels: bool = False) -> Tensor:
    """With the classes known beforehand, as NTDNELoss has them, or with a plain tensor of labels."""
    bank_labels = problem.bank_labels if plain_labels else problem.classes
    return ntdne_loss(
        problem.features, problem.bank, problem.labels, bank_labels, problem.index, sigma=SIGMA, q=Q, backend=backend
    )


def _triton(problem: Problem, gradient: bool, *, plain_labels: bool = False) -> Run:
    missing = BACKENDS["triton"].missing(problem.bank)
    if missing is not None:
        raise NotSupported(f"needs {missing}")
    return _loss(partial(ours, backend="triton", plain_labels=plain_labels)).prepare(problem, gradient)


# Attention kernels


def _attention(backend: SDPBackend, *, folded: bool) -> Provider:
    def prepare(problem: Problem, gradient: bool) -> Run:
        if not gradient:
            raise NotSupported("has no form without the weighted means")
        (B, D), N, device = problem.features.shape, len(problem.bank), problem.bank.device
        if backend == SDPBackend.EFFICIENT_ATTENTION:
            _check_32_bits(problem)
        features = problem.features.detach().to(problem.bank.dtype)

        def on(heads: int) -> Run:
            queries = features.expand(1, heads, B, D).contiguous()
            bank = problem.bank.view(1, heads, N // heads, D)

            def run() -> Outputs:
                with torch.no_grad(), sdpa_kernel(backend):
                    return (scaled_dot_product_attention(queries, bank, bank, scale=1 / SIGMA)[0],)

            return run

        def seconds(run: Run) -> float:
            return min(wall(run, device.type) for _ in range(4))  # the first is slow

        counts = sorted({_heads(B, N, device, rounds) for rounds in (1, 2, 4, 8)}) if folded else [1]
        try:
            return min(map(on, counts), key=seconds) if folded else _tried(on(1))
        except RuntimeError as error:
            if any(words in str(error) for words in ("viable backend", "available kernel")):
                raise NotSupported(str(error).split(". ")[0]) from None
            raise

    return Provider("mean", prepare)


def _tried(run: Run) -> Run:
    run()
    return run


def _heads(B: int, N: int, device: torch.device, rounds: int, least: int = 1, most: float = math.inf) -> int:
    """Of the divisors of N that which comes closest to filling a device so many times, with 128 queries a block."""
    units = torch.get_num_threads()
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(max(rounds * units / math.ceil(B / BLOCK), least), most)
    small = [n for n in range(1, math.isqrt(N) + 1) if N % n == 0]
    divisors = [n for n in {*small, *(N // n for n in small)} if n >= least]
    return min(divisors, key=lambda heads: abs(math.log(heads / wanted)))


def _check_32_bits(problem: Problem) -> None:
    if problem.bank.numel() >= 1 << 31:
        raise NotSupported("counts the elements of a bank in 32 bits")


BLOCK = 128
"""Queries, and rows, of a block of flex_attention's mask."""


def flex(problem: Problem, gradient: bool, attention: Callable[..., Any] | None = None) -> Run:
    """The same function with no kernel of one's own: flex_attention over all rows, and over those of the query's class.

    Each gives a log-sum-exp and a weighted mean, so that the gradient needs no second pass. The bank is folded into
    heads; queries stand in the order of their classes, as rows do: the second leaves out blocks of other classes. Which
    those are depends on the batch, so that the masks are made in the time that is measured.
    """
    if attention is None:
        if problem.bank.device.type == "cpu":
            raise NotSupported("compiled for a CPU flex_attention gives no log-sum-exp")
        attention = torch.compile(flex_attention, dynamic=False)
    (B, D), (N, _) = problem.features.shape, problem.bank.shape
    device = problem.bank.device
    # The kernel counts the elements of a head in 32 bits; heads of fewer than four blocks would waste it.
    heads = _heads(B, N, device, 2, least=math.ceil(N * D / (1 << 31)), most=max(N / (4 * BLOCK), 1))
    length = N // heads  # rows of a head
    of_block = torch.arange(math.ceil(length / BLOCK), device=device) * BLOCK
    first = torch.arange(heads, device=device).unsqueeze(1) * length + of_block  # (H, blocks) rows that begin a block
    last = first + torch.minimum(length - of_block, torch.tensor(BLOCK, device=device))

    def merged(queries: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """log Σ (B,) and the weighted mean (B, D)."""
        bank = problem.bank.view(1, heads, length, D)
        queries = queries.expand(1, heads, B, D)
        means, more = attention(queries, bank, bank, block_mask=mask, scale=1 / SIGMA, return_aux=AuxRequest(lse=True))
        log_sums = more.lse[0]
        shares = log_sums.softmax(dim=0).nan_to_num()  # of a query without any row
        return log_sums.logsumexp(dim=0), (shares.unsqueeze(2) * means[0]).sum(dim=0)

    def run() -> Outputs:
        order = problem.labels.argsort()
        queries, own = problem.features.detach()[order].to(problem.bank.dtype), problem.index[order]
        begin, end = class_ranges(problem.labels[order], problem.classes.classes, problem.classes.offsets).unbind(1)

        def others(b: Tensor, h: Tensor, query: Tensor, row: Tensor) -> Tensor:
            return h * length + row != own[query]

        def same(b: Tensor, h: Tensor, query: Tensor, row: Tensor) -> Tensor:
            row = h * length + row
            return (row != own[query]) & (row >= begin[query]) & (row < end[query])

        # (H, blocks of queries, blocks of rows): which hold a query's own row, which a row of its class.
        blocks = torch.arange(B, device=device) // BLOCK
        with_own = torch.zeros(heads, math.ceil(B / BLOCK), len(of_block), dtype=torch.bool, device=device)
        with_own[own // length, blocks, own % length // BLOCK] = True
        lowest = begin.new_full((with_own.size(1),), N).scatter_reduce(0, blocks, begin, "amin")
        highest = end.new_zeros(with_own.size(1)).scatter_reduce(0, blocks, end, "amax")
        of_class = (last.unsqueeze(1) > lowest.view(1, -1, 1)) & (first.unsqueeze(1) < highest.view(1, -1, 1))

        log_all, mean_all = merged(queries, _mask(with_own, ~with_own, others, B, length))
        log_same, mean_same = merged(queries, _mask(of_class, None, same, B, length))
        log_p = (log_same - log_all).clamp(max=0)
        loss = truncated(log_p.exp())
        if not gradient:
            return (loss,)
        slope = -((Q * log_p).exp() / (B * SIGMA)).unsqueeze(1)
        in_order = torch.empty_like(mean_all)
        in_order[order] = slope * (mean_same - mean_all)
        return loss, in_order

    return run


def _mask(partly: Tensor, wholly: Tensor | None, mask_mod: Callable[..., Tensor], B: int, length: int) -> BlockMask:
    """Of blocks to look into element by element, and of blocks to take as they are."""

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks.unsqueeze(0).to(torch.int8)
        return blocks.sum(dim=-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(
        *listed(partly),
        *(listed(wholly) if wholly is not None else (None, None)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(B, length),
        compute_q_blocks=False,
    )


# Losses of language models


def _liger(problem: Problem, gradient: bool) -> Run:
    """With the memory for logits that `chunked` has: the default takes the queries one by one."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss
    except ImportError:
        raise NotSupported("liger-kernel is not installed") from None
    _check_device(problem)
    budget = max(CHUNK_ELEMENTS // problem.features.numel(), 1)
    return log_sum(partial(loss, chunk_mem_const=budget), problem, gradient)


def _cut_cross_entropy(problem: Problem, gradient: bool) -> Run:
    """Without its filter, which at N = 10⁶ would drop every row of the bank from the gradient."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise NotSupported("cut-cross-entropy is not installed") from None
    _check_device(problem)
    _check_32_bits(problem)
    if gradient and problem.bank.dtype == torch.float32:
        raise NotSupported("has a gradient in 16 bits alone")
    return log_sum(partial(linear_cross_entropy, filter_eps=None), problem, gradient)


def _check_device(problem: Problem) -> None:
    if problem.bank.device.type == "cpu":
        raise NotSupported("has kernels for GPUs alone")


def log_sum(loss: Callable[..., Tensor], problem: Problem, gradient: bool) -> Run:
    """The mean cross-entropy loss(features, weight, target), the bank as the last layer, the query's row as target."""

    def run() -> Outputs:
        with torch.set_grad_enabled(gradient):
            value = loss((problem.features / SIGMA).to(problem.bank.dtype), problem.bank, problem.index)
        return (value.detach(), *torch.autograd.grad(value, problem.features)) if gradient else (value,)

    return run


# The floor


def product(problem: Problem, gradient: bool) -> Run:
    queries = problem.features.detach().to(problem.bank.dtype)

    def run() -> Outputs:
        similarities = queries @ problem.bank.t()
        return (similarities, similarities @ problem.bank) if gradient else (similarities,)

    return run


def _copy(problem: Problem, gradient: bool) -> Run:
    to = torch.empty_like(problem.bank)
    return lambda: (to.copy_(problem.bank),)


def _reading(problem: Problem, gradient: bool) -> Run:
    return lambda: (problem.bank.sum(),)


PROVIDERS = {
    "naive": _loss(naive),
    "naive in 16 bits": Provider("loss", _naive_in_16_bits),
    "naive, compiled": Provider("loss", _compiled),
    "chunked": _loss(chunked),
    "streaming": _loss(partial(ours, backend="streaming")),
    "streaming, plain labels": _loss(partial(ours, backend="streaming", plain_labels=True)),
    "triton": Provider("loss", _triton),
    "triton, plain labels": Provider("loss", partial(_triton, plain_labels=True)),
    "flex attention": Provider("loss", flex),
    "SDPA flash": _attention(SDPBackend.FLASH_ATTENTION, folded=False),
    "SDPA flash, folded": _attention(SDPBackend.FLASH_ATTENTION, folded=True),
    "SDPA cuDNN": _attention(SDPBackend.CUDNN_ATTENTION, folded=False),
    "SDPA cuDNN, folded": _attention(SDPBackend.CUDNN_ATTENTION, folded=True),
    "SDPA efficient, folded": _attention(SDPBackend.EFFICIENT_ATTENTION, folded=True),
    "Liger": Provider("log sum", _liger),
    "cut cross-entropy": Provider("log sum", _cut_cross_entropy),
    "product alone": Provider("product", product),
}

PRODUCT = {"product": Provider("product", product)}
TRAFFIC = {"copy": Provider("copy", _copy), "reading": Provider("reading", _reading)}
