"""log p and its gradients on a GPU, through the kernels of `kernels.py`: memory O(B·D).

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ntdne_kernels.ops.bank_update import accumulator_dtype
from ntdne_kernels.ops.leave_one_out import Backend, bank_gradient_fake, class_sums_fake, log_scores_fake
from ntdne_kernels.ops.losses import loss_and_slope_fake
from ntdne_kernels.ops.streaming import SMALLEST_PLAIN_SIGMA
from ntdne_kernels.ops.triton import kernels
from ntdne_kernels.ops.triton.configs import (
    MERGE_WARPS,
    SMALLEST_CAPABILITY,
    Device,
    choose,
    class_tile,
    columns,
    largest_D,
    merge_blocks,
    split_count,
)

# The products of 16-bit rows are exact in either mode; the bank's gradient has float32 factors, which meet as TF32.
PRECISION = {"16-bit": "tf32", "tf32": "tf32", "ieee": "ieee", "fp64": "ieee"}
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set before triton was imported: the kernels run on CPU tensors, slowly."""
_INTERPRETED_DEVICE = Device(capability=90, multiprocessors=3, shared=227 << 10)
FOLD_ROWS = 1 << 14
"""Rows summed in registers before they are added to memory."""
PROGRAMS_PER_MULTIPROCESSOR = 8
"""How many `class_masses` starts at least, where there are so many classes: few are idle in the last round."""
# Of the larger strides a tile's offsets would not fit 32 bits. No bank but a view of something else has such.
_LARGEST_STRIDE = 1 << 23
_FLOAT16_SHIFT = 14  # float16 ends at 2^16


def missing(bank: Tensor) -> str | None:
    """What these kernels need and do not have here, or None where they can serve the bank."""
    capability = _INTERPRETED_DEVICE.capability
    if INTERPRETED:
        if bank.device.type != "cpu":
            return f"CPU tensors under TRITON_INTERPRET=1, got {bank.device.type}"
    else:
        if bank.device.type != "cuda" or torch.version.hip is not None:
            return f"an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1 before the import), got {bank.device.type}"
        properties = torch.cuda.get_device_properties(bank.device)
        capability = 10 * properties.major + properties.minor
        if capability < SMALLEST_CAPABILITY:
            return f"a GPU of compute capability 8.0 or newer, got {properties.major}.{properties.minor}"
    most = largest_D(capability, bank.dtype)
    if bank.size(1) > most:
        return f"a bank of at most {most} columns of {bank.dtype} on this device, got {bank.size(1)}"
    return None


@torch.library.custom_op("ntdne_kernels::triton_log_scores", mutates_args=())
def log_scores(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.log_scores` in three launches."""
    out = log_scores_fake(features, bank, labels, index, classes, sigma, need_direction)
    if len(features) > 0:
        _sum_up(kernels.merge_to_log_scores, out, features, bank, labels, index, classes, sigma, need_direction)
    return out


@torch.library.custom_op("ntdne_kernels::triton_class_sums", mutates_args=())
def class_sums(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.class_sums` in three launches."""
    out = class_sums_fake(features, bank, labels, index, classes, sigma, need_means)
    if len(features) > 0 and len(bank) > 0:
        _sum_up(kernels.merge_to_class_sums, out, features, bank, labels, index, classes, sigma, need_means)
    else:
        for sums, nothing in zip(out, (-math.inf, -math.inf, 0, 0), strict=True):
            sums.fill_(nothing)
    return out


def class_masses(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """`Backend.class_masses` in one launch."""
    B, D = features.shape
    N, C = len(bank), len(offsets) - 1
    log_masses = bank.new_empty((C, B), dtype=torch.float64)
    if B == 0 or C == 0:
        return log_masses.t()
    with _on(bank.device):
        device, arithmetic = describe(bank.device), _arithmetic(bank.dtype)
        config = choose(device, "range", arithmetic, D, B)
        features, bank = _with_unit_stride(features), _with_unit_stride(bank)
        blocks = triton.cdiv(B, config.block_b)
        splits = min(C, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, blocks))
        D1, D2 = columns(D)
        kernels.class_masses[(blocks * splits,)](
            features, bank, index.contiguous(), offsets.contiguous(), log_masses,
            B, C, features.stride(0), bank.stride(0), math.log2(math.e) / sigma, splits,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=class_tile(config, N, C),
            TRACKED=sigma < SMALLEST_PLAIN_SIGMA, PRECISION=PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=255,  # all: left to itself the assembler spills 8 bytes here and there to fit one program more
        )  # fmt: skip
    return log_masses.t()


@torch.library.custom_op("ntdne_kernels::triton_bank_gradient", mutates_args=())
def bank_gradient(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    log_p: Tensor,
    log_sum_all: Tensor,
    grad_log_p: Tensor,
) -> Tensor:
    """`Backend.bank_gradient` in two launches."""
    B, D = features.shape
    N = len(bank)
    gradient = bank_gradient_fake(features, bank)
    with _on(bank.device):
        device, arithmetic = describe(bank.device), _arithmetic(bank.dtype)
        config = choose(device, "gradient", arithmetic, D, N)
        bank = _with_unit_stride(bank)
        queries = _Queries.prepare(features, bank, labels, index, classes, config.block_b)
        D1, D2 = columns(D)
        kernels.gradient_to_bank[(triton.cdiv(N, config.block_n),)](
            *queries.of_rows(bank), log_p, log_sum_all, grad_log_p.contiguous(), gradient,
            B, N, bank.stride(0), math.log2(math.e) / sigma, sigma,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, BY_RANGE=queries.by_range,
            GATHER=queries.order is not None, PRECISION=PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return gradient


@torch.library.custom_op("ntdne_kernels::triton_loss_and_slope", mutates_args=())
def loss_and_slope(
    log_p: Tensor, indicator: Tensor | None, q: float | None, k: float | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """`losses.loss_and_slope` in one launch."""
    value, slope = loss_and_slope_fake(log_p, indicator, q, k, reduction)
    q_or_1 = 1.0 if q is None else q
    log_k = -math.inf if k is None else math.log(k)
    with _on(log_p.device):
        kernels.loss_and_slope[(1,)](
            log_p, log_p if indicator is None else indicator.contiguous(), value, slope,
            len(log_p), q_or_1, log_k, -math.expm1(q_or_1 * log_k) / q_or_1,
            SNCA=q is None, PRUNING=k is not None, HAS_INDICATOR=indicator is not None, REDUCTION=reduction, BLOCK=1024,
        )  # fmt: skip
    return value, slope


@torch.library.custom_op("ntdne_kernels::triton_features_gradient", mutates_args=())
def features_gradient(
    direction: Tensor, log_p: Tensor, slope: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """`leave_one_out.features_gradient` in one launch."""
    B, D = direction.shape
    gradient = torch.empty_like(direction, dtype=dtype)
    if B == 0:
        return gradient
    BLOCK_D = min(triton.next_power_of_2(D), 128)
    with _on(direction.device):
        kernels.gradient_to_features[(triton.cdiv(B, 16), triton.cdiv(D, BLOCK_D))](
            direction, log_p, log_p if slope is None else slope, grad, gradient,
            B, grad.stride(0) if grad.dim() else 0,
            D=D, HAS_SLOPE=slope is not None, BLOCK_B=16, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return gradient


def _sum_up(
    merge: Any,
    out: tuple[Tensor, ...],
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    weighted: bool,
) -> None:
    """Sum the splits of the bank up for each query; the kernel `merge` makes `out` of them."""
    B, D = features.shape
    N = len(bank)
    with _on(bank.device):
        device, arithmetic = describe(bank.device), _arithmetic(bank.dtype)
        kernel, kinds = ("labels", 2) if len(classes) == 1 else ("range", 1)
        config = choose(device, kernel, arithmetic, D, B)
        bank = _with_unit_stride(bank)
        queries = _Queries.prepare(features, bank, labels, index, classes, config.block_b)
        splits = split_count(device, config, B, N, D, kinds)
        blocks = triton.cdiv(B, config.block_b)
        tracked = sigma < SMALLEST_PLAIN_SIGMA or bank.dtype == torch.float16
        numbers = {
            "TRACKED": tracked,
            "SHIFT": _FLOAT16_SHIFT if bank.dtype == torch.float16 else 0,
            "WEIGHTED": weighted,
        }
        totals = bank.new_empty((splits, blocks, 2, config.block_b), dtype=accumulator_dtype(bank.dtype))
        maxima = torch.empty_like(totals) if tracked else totals
        vectors = totals.new_empty((*totals.shape, D if weighted else 0))
        D1, D2 = columns(D)
        scale = math.log2(math.e) / sigma
        kernels.stream[(kinds * splits * blocks,)](
            *queries.of_rows(bank), totals, maxima, vectors,
            B, N, bank.stride(0), scale, splits, config.block_n * triton.cdiv(triton.cdiv(N, splits), config.block_n),
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, BY_RANGE=queries.by_range,
            GATHER=queries.order is not None, **numbers, PRECISION=PRECISION[arithmetic], FOLD_ROWS=FOLD_ROWS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        merge[(B,)](
            totals, maxima, vectors, queries.places, *out, B, scale, splits,
            D=D, BLOCK_B=config.block_b, **numbers, **merge_blocks(D, totals.element_size()), num_warps=MERGE_WARPS,
        )  # fmt: skip


class _Queries(NamedTuple):
    """What `kernels.prepare` makes of a batch: its features in the bank's dtype and where its neighbours stand."""

    features: Tensor
    places: Tensor
    bank_labels: Tensor
    order: Tensor | None
    by_range: bool

    @staticmethod
    def prepare(
        features: Tensor, bank: Tensor, labels: Tensor, index: Tensor, classes: list[Tensor], block_b: int
    ) -> "_Queries":
        B, D = features.shape
        labels, index, (first, *rest) = labels.contiguous(), index.contiguous(), (c.contiguous() for c in classes)
        by_range = len(rest) > 0
        order, position = rest[1:] if len(rest) > 1 else (None, first)
        padded = block_b * triton.cdiv(B, block_b)
        queries = torch.empty((padded, D), dtype=bank.dtype, device=bank.device)
        places = labels.new_empty((padded, 4))
        if B > 0:
            kernels.prepare[(padded // 16,)](
                features, labels, index, first, rest[0] if by_range else first, position, queries, places,
                B, len(bank), len(first), features.stride(0), features.stride(1), len(first).bit_length(),
                D=D, BY_RANGE=by_range, GATHER=order is not None, BLOCK_Q=16, BLOCK=128,
            )  # fmt: skip
        return _Queries(queries, places, first, order, by_range)

    def of_rows(self, bank: Tensor) -> tuple[Tensor, ...]:
        """The arguments that the kernels which visit the bank begin with."""
        order = self.places if self.order is None else self.order
        return self.features, bank, order, self.bank_labels, self.places


@cache
def describe(device: torch.device) -> Device:
    """The device as the table of tile shapes sees it."""
    if device.type == "cpu":
        return _INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return Device(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device of a process, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arithmetic(dtype: torch.dtype) -> str:
    """The column of the table; float32 products as PyTorch's own setting has them."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "fp64" if dtype == torch.float64 else "16-bit"


def _with_unit_stride(bank: Tensor) -> Tensor:
    """The bank, or a copy where its rows are not contiguous or too far apart."""
    return bank if bank.stride(1) == 1 and bank.stride(0) <= _LARGEST_STRIDE else bank.contiguous()


log_scores.register_fake(log_scores_fake)
class_sums.register_fake(class_sums_fake)
bank_gradient.register_fake(bank_gradient_fake)
loss_and_slope.register_fake(loss_and_slope_fake)


@features_gradient.register_fake
def _(direction: Tensor, log_p: Tensor, slope: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(direction, dtype=dtype)


TRITON = Backend(log_scores, class_sums, class_masses, bank_gradient, loss_and_slope, features_gradient)
