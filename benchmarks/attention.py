"""Attention kernels as providers, with the bank as keys and values: PyTorch's SDPA, and flex_attention.

SDPA gives weighted means of the bank's rows, which are a part of the loss's gradient. flex_attention also returns the
log-sum-exp and takes masks, so that two of its calls give the loss and its gradient.

Attention has little to do in parallel for a few queries. So the bank is folded into heads: each head sums a part of
the rows, for the same queries.

Shapes: B queries, N bank rows, D features, H heads.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contract import Call, NotSupported, Outputs, Provider
from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.timing import wall
from ntdne_kernels.ops.layout import class_ranges

BLOCK = 128
"""Queries, and rows, in a block of flex_attention's mask."""


def scaled_dot_product(backend: SDPBackend, *, folded: bool) -> Provider:
    """The weighted means by one of SDPA's backends, on one head or on the quickest of some numbers of heads."""

    def prepare(problem: Problem, gradient: bool) -> Call:
        if not gradient:
            raise NotSupported("has no form without the weighted means")
        (B, D), N, device = problem.features.shape, len(problem.bank), problem.bank.device
        if backend == SDPBackend.EFFICIENT_ATTENTION:
            check_32_bits(problem)
        features = problem.features.detach().to(problem.bank.dtype)

        def on(heads: int) -> Call:
            queries = features.expand(1, heads, B, D).contiguous()
            bank = problem.bank.view(1, heads, N // heads, D)

            def call() -> Outputs:
                with torch.no_grad(), sdpa_kernel(backend):
                    return (scaled_dot_product_attention(queries, bank, bank, scale=1 / SIGMA)[0],)

            return call

        def seconds(call: Call) -> float:
            return min(wall(call, device.type) for _ in range(4))  # the first call is slow

        try:
            if folded:
                counts = sorted({choose_heads(B, N, device, rounds) for rounds in (1, 2, 4, 8)})
                return min(map(on, counts), key=seconds)
            call = on(1)
            call()  # raises where the backend does not support the problem
            return call
        except RuntimeError as error:
            if any(words in str(error) for words in ("viable backend", "available kernel")):
                raise NotSupported(str(error).split(". ")[0]) from None
            raise

    return Provider("mean", prepare)


def choose_heads(B: int, N: int, device: torch.device, rounds: int, lowest: int = 1, highest: float = math.inf) -> int:
    """The divisor of N that comes closest to filling a device so many times, with a program for 128 queries and a head.

    Args:
        B: Queries.
        N: Bank rows.
        device: Of the bank.
        rounds: How many programs each multiprocessor, or thread, is to have.
        lowest: No number of heads below this one.
        highest: Aim at no more heads than this.
    """
    units = torch.get_num_threads()
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(max(rounds * units / math.ceil(B / BLOCK), lowest), highest)
    small = [n for n in range(1, math.isqrt(N) + 1) if N % n == 0]
    divisors = [n for n in {*small, *(N // n for n in small)} if n >= lowest]
    return min(divisors, key=lambda heads: abs(math.log(heads / wanted)))


def check_32_bits(problem: Problem) -> None:
    """Refuse a bank whose elements a kernel with 32-bit offsets cannot count."""
    if problem.bank.numel() >= 1 << 31:
        raise NotSupported("counts the elements of a bank in 32 bits")


def compiled_flex(problem: Problem, gradient: bool) -> Call:
    """`flex` as a user would run it."""
    if problem.bank.device.type == "cpu":
        raise NotSupported("compiled for a CPU flex_attention gives no log-sum-exp")
    return flex(problem, gradient, torch.compile(flex_attention, dynamic=False))


def flex(problem: Problem, gradient: bool, attention: Callable[..., Any]) -> Call:
    """The loss without a kernel of one's own: flex_attention over all rows, and over those of each query's class.

    Each of the two calls gives a log-sum-exp and a weighted mean, so that the gradient needs no further pass. Queries
    are put into class order, as the rows are: the second call can then skip blocks of other classes. Which blocks those
    are depends on the batch, so the time to make the masks is part of what is measured.
    """
    (B, D), (N, _) = problem.features.shape, problem.bank.shape
    device = problem.bank.device
    # The kernel counts the elements of a head in 32 bits, and a head of fewer than four blocks would waste it.
    heads = choose_heads(B, N, device, 2, lowest=math.ceil(N * D / (1 << 31)), highest=max(N / (4 * BLOCK), 1))
    length = N // heads  # rows of a head
    block_start = torch.arange(math.ceil(length / BLOCK), device=device) * BLOCK
    first = torch.arange(heads, device=device).unsqueeze(1) * length + block_start  # (H, blocks) first row of a block
    last = first + torch.minimum(length - block_start, torch.tensor(BLOCK, device=device))  # and the row after it

    def merged(queries: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """log Σ (B,) and the weighted mean (B, D)."""
        bank = problem.bank.view(1, heads, length, D)
        queries = queries.expand(1, heads, B, D)
        means, aux = attention(queries, bank, bank, block_mask=mask, scale=1 / SIGMA, return_aux=AuxRequest(lse=True))
        log_sums = aux.lse[0]
        shares = log_sums.softmax(dim=0).nan_to_num()  # NaN for a query that no row is compared with
        return log_sums.logsumexp(dim=0), (shares.unsqueeze(2) * means[0]).sum(dim=0)

    def call() -> Outputs:
        order = problem.labels.argsort()
        queries, own = problem.features.detach()[order].to(problem.bank.dtype), problem.index[order]
        classes, offsets = problem.label_index.classes, problem.label_index.offsets
        begin, end = class_ranges(problem.labels[order], classes, offsets).unbind(1)

        def others(b: Tensor, h: Tensor, query: Tensor, row: Tensor) -> Tensor:
            return h * length + row != own[query]

        def same(b: Tensor, h: Tensor, query: Tensor, row: Tensor) -> Tensor:
            row = h * length + row
            return (row != own[query]) & (row >= begin[query]) & (row < end[query])

        # (H, blocks of queries, blocks of rows): which contain a query's own row, and which a row of its class.
        query_block = torch.arange(B, device=device) // BLOCK
        has_own = torch.zeros(heads, math.ceil(B / BLOCK), len(block_start), dtype=torch.bool, device=device)
        has_own[own // length, query_block, own % length // BLOCK] = True
        lowest = begin.new_full((has_own.size(1),), N).scatter_reduce(0, query_block, begin, "amin")
        highest = end.new_zeros(has_own.size(1)).scatter_reduce(0, query_block, end, "amax")
        has_class = (last.unsqueeze(1) > lowest.view(1, -1, 1)) & (first.unsqueeze(1) < highest.view(1, -1, 1))

        log_all, mean_all = merged(queries, _block_mask(has_own, ~has_own, others, B, length))
        log_same, mean_same = merged(queries, _block_mask(has_class, None, same, B, length))
        log_p = (log_same - log_all).clamp(max=0)
        loss = ((1 - (Q * log_p).exp()) / Q).mean()
        if not gradient:
            return (loss,)
        slope = -((Q * log_p).exp() / (B * SIGMA)).unsqueeze(1)
        in_batch_order = torch.empty_like(mean_all)
        in_batch_order[order] = slope * (mean_same - mean_all)
        return loss, in_batch_order

    return call


def _block_mask(masked: Tensor, full: Tensor | None, mask_mod: Callable[..., Tensor], B: int, length: int) -> BlockMask:
    """Of blocks in which `mask_mod` decides element by element, and of blocks that are taken as a whole."""

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks.unsqueeze(0).to(torch.int8)
        return blocks.sum(dim=-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    masked_counts, masked_indices = listed(masked)
    full_counts, full_indices = listed(full) if full is not None else (None, None)
    return BlockMask.from_kv_blocks(
        masked_counts,
        masked_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(B, length),
        compute_q_blocks=False,
    )
