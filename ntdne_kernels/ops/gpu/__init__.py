"""log p, its gradients and any loss on a GPU, through the kernels of `kernels.py`: memory O(B·D).

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ntdne_kernels.ops import scores as _scores  # noqa: F401  its PyTorch path is the definition of record_scores_
from ntdne_kernels.ops.class_sums import SMALLEST_PLAIN_SIGMA
from ntdne_kernels.ops.gpu import configs, kernels, launches
from ntdne_kernels.ops.leave_one_out import GradientInForward
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import (
    Archive,
    Batch,
    empty_bank_gradient,
    empty_class_sums,
    empty_log_scores,
    empty_loss,
    implement,
)

PROGRAMS_PER_MULTIPROCESSOR = 8
"""How many `class_log_sums` starts at least, where there are so many classes: few are idle in the last round."""


def missing(bank: Tensor) -> str | None:
    """What these kernels need and do not have here, or None where they can serve the bank."""
    if launches.INTERPRETED:
        if bank.device.type != "cpu":
            return f"CPU tensors under TRITON_INTERPRET=1, got {bank.device.type}"
    else:
        if bank.device.type != "cuda" or torch.version.hip is not None:
            return f"an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1 before the import), got {bank.device.type}"
        capability = launches.describe(bank.device).capability
        if capability < configs.SMALLEST_CAPABILITY:
            return f"a GPU of compute capability 8.0 or newer, got {capability // 10}.{capability % 10}"
    widest = configs.largest_D(launches.describe(bank.device).capability, bank.dtype)
    if bank.size(1) > widest:
        return f"a bank of at most {widest} columns of {bank.dtype} on this device, got {bank.size(1)}"
    return None


def _log_scores(batch: Batch, need_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`GradientInForward.log_scores` in three launches."""
    out = empty_log_scores(batch, need_direction)
    if len(batch.features) > 0:
        launches.stream_and_merge("merge_to_log_scores", batch, None, need_direction, None, out)
    return out


def _class_sums(batch: Batch, need_means: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.class_sums` in three launches."""
    out = empty_class_sums(batch, need_means)
    if len(batch.features) > 0 and len(batch.bank) > 0:
        launches.stream_and_merge("merge_to_class_sums", batch, None, need_means, None, out)
    else:
        for sums, nothing in zip(out, (-math.inf, -math.inf, 0, 0), strict=True):
            sums.fill_(nothing)
    return out


def _loss(  # noqa: PLR0913
    batch: Batch,
    image_labels: Tensor | None,
    image_position: Tensor | None,
    image_scores: Tensor | None,
    q: float | None,
    k: float | None,
    reduction: str,
    indicator: str,
    unit: float | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`GradientInForward.loss_and_gradient` in three launches."""
    out = empty_loss(batch, reduction, indicator, unit, need_gradient)
    if batch.features.size(0) == 0:
        out[0].zero_()
        return out
    archive = None
    if image_labels is not None and image_position is not None and image_scores is not None:
        archive = Archive(image_labels, image_position, image_scores)
    value, log_p, slope, gradient, log_sum_all = out
    loss = launches.LossArguments(LossSpec(q, k, reduction, indicator, unit), value, slope)
    launches.stream_and_merge(
        "merge_to_log_scores", batch, archive, need_gradient, loss, (log_p, gradient, log_sum_all)
    )
    return out


def class_log_sums(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """`Backend.class_log_sums` in one launch."""
    B, D = features.shape
    N, C = len(bank), len(offsets) - 1
    log_sums = bank.new_empty((C, B), dtype=torch.float64)
    if B == 0 or C == 0:
        return log_sums.t()
    with launches.on(bank.device):
        device, arithmetic = launches.describe(bank.device), launches.arithmetic_of(bank.dtype)
        config = configs.choose(device, "stream", arithmetic, D, B)
        features, bank = launches.with_unit_stride(features), launches.with_unit_stride(bank)
        blocks = triton.cdiv(B, config.block_b)
        splits = min(C, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, blocks))
        D1, D2 = configs.columns(D)
        kernels.class_log_sums[(blocks * splits,)](
            features, bank, index.contiguous(), offsets.contiguous(), log_sums,
            B, C, features.stride(0), bank.stride(0), math.log2(math.e) / sigma, splits,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=configs.class_tile(config, N, C),
            TRACKED=sigma < SMALLEST_PLAIN_SIGMA, PRECISION=launches.PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=255,  # all: left to itself the assembler spills 8 bytes here and there to fit one program more
        )  # fmt: skip
    return log_sums.t()


def _bank_gradient(batch: Batch, log_p: Tensor, log_sum_all: Tensor, grad_log_p: Tensor) -> Tensor:
    """`GradientInForward.bank_gradient` in two launches."""
    (B, D), N = batch.features.shape, len(batch.bank)
    gradient = empty_bank_gradient(batch)
    with launches.on(batch.bank.device):
        device, arithmetic = launches.describe(batch.bank.device), launches.arithmetic_of(batch.bank.dtype)
        config = configs.choose(device, "gradient", arithmetic, D, N)
        batch = launches.contiguous(batch)
        bank, layout = batch.bank, launches.KernelLayout.of(batch.layout)
        first = launches.prepare_launch(B, D, config.block_b, layout.sorted_labels, layout.gather, False, True, False)
        queries, neighbours = launches.prepare(first, None, batch, layout, None, config.block_b, log_p)
        D1, D2 = configs.columns(D)
        kernels.gradient_to_bank[(triton.cdiv(N, config.block_n),)](
            queries, bank, layout.order, neighbours, log_p, log_sum_all, grad_log_p.contiguous(), gradient,
            B, N, bank.stride(0), math.log2(math.e) / batch.sigma, batch.sigma,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n,
            GATHER=layout.gather, PRECISION=launches.PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return gradient


def record_scores_(scores: Tensor, log_p: Tensor, index: Tensor, image_labels: Tensor) -> None:
    """`scores.record_scores_` in one launch."""
    if index.size(0) == 0:
        return
    index = index.contiguous()
    launch_record = _record_launch(index.size(0), scores.device, scores.dtype, log_p.dtype)
    with launches.on(scores.device):
        stream = launches.stream_of(scores, log_p, index, image_labels)
        launch_record(stream, log_p, index, image_labels, scores, index.size(0), image_labels.size(0))


@lru_cache(maxsize=256)
def _record_launch(B: int, *_: Any) -> launches.Launch:
    return launches.Launch(kernels.record, (triton.cdiv(B, 64),), BLOCK=64)


log_scores = implement("triton_log_scores", _log_scores)
class_sums = implement("triton_class_sums", _class_sums)
bank_gradient = implement("triton_bank_gradient", _bank_gradient)
_loss_op = implement("triton_loss", _loss)


def fused_loss(
    batch: Batch, archive: Archive | None, spec: LossSpec, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`GradientInForward.loss_and_gradient` in one op."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _loss_op(
        batch,
        *(archive or (None, None, None)),
        *(spec.q, spec.k, spec.reduction, spec.indicator, spec.unit),
        need_gradient,
    )
    return result


if not launches.INTERPRETED:
    implement("record_scores_", record_scores_, "CUDA")
TRITON = GradientInForward(log_scores, class_sums, class_log_sums, bank_gradient, fused_loss, missing)
