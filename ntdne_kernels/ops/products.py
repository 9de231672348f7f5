"""What is done with a tile: two matrix products, exact with sums in float32 or float64, and an exponential between.

Shapes: B queries, n rows of a tile, D features.
"""

import torch
from torch import Tensor

from ntdne_kernels.ops.schema import implement


def scaled_scores_(out: Tensor, queries: Tensor, tile: Tensor, scale: float) -> Tensor:
    """out (B, n) = scale · queries @ tileᵀ; queries (B, D) and tile (n, D) of the bank's dtype."""
    if tile.dtype in (torch.float32, torch.float64):
        return out.addmm_(queries, tile.t(), beta=0, alpha=scale)
    if tile.device.type == "cuda":
        return torch.mul(torch.mm(queries, tile.t(), out_dtype=torch.float32), scale, out=out)
    if tile.dtype == torch.bfloat16:
        torch.ops.ntdne_kernels.bf16_mm_(out, queries, tile.t(), scale)
        return out
    return out.addmm_(queries.float(), tile.t().float(), beta=0, alpha=scale)


def weighted_rows(weights: Tensor, tile: Tensor) -> Tensor:
    """Weights (B, n) @ tile (n, D), in the dtype of the weights.

    For a bfloat16 tile the weights, positive and as many as rows, are rounded to bfloat16 too, whose exponents reach
    as far as float32's; float16 would lose small weights, so there the tile is widened.
    """
    if tile.dtype != torch.bfloat16:
        return weights @ tile.to(weights.dtype)
    if tile.device.type == "cuda":
        return torch.mm(weights.bfloat16(), tile, out_dtype=torch.float32)
    out = weights.new_empty((len(weights), tile.size(1)))
    torch.ops.ntdne_kernels.bf16_mm_(out, weights.bfloat16(), tile, 1.0)
    return out


def exp_(logits: Tensor) -> Tensor:
    """exp(logits) in place."""
    if logits.dtype == torch.float32 and logits.is_contiguous():
        torch.ops.ntdne_kernels.exp_(logits)
        return logits
    return logits.exp_()


def exp_in_pytorch(x: Tensor) -> None:
    """x (any shape) = exp(x), in place. The definition; csrc/ has a kernel for CPUs."""
    x.exp_()


def bf16_mm_in_pytorch(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out (M, L) = alpha · a @ b in float32, for bfloat16 a (M, K) and b (K, L).

    The definition; csrc/ has a kernel for CPUs that multiply bfloat16 themselves.
    """
    out.addmm_(a.float(), b.float(), beta=0, alpha=alpha)


implement("exp_", exp_in_pytorch)
implement("bf16_mm_", bf16_mm_in_pytorch)
