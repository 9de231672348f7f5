"""log p and its gradients on a GPU, through the kernels of `kernels.py`: memory O(B·D).

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ntdne_kernels.ops import scores as _scores  # noqa: F401  defines the op record_scores_
from ntdne_kernels.ops.bank_update import accumulator_dtype, skipped_counter
from ntdne_kernels.ops.leave_one_out import SHORTEST, Backend, bank_gradient_fake, class_sums_fake, log_scores_fake
from ntdne_kernels.ops.losses import Loss
from ntdne_kernels.ops.streaming import SMALLEST_PLAIN_SIGMA
from ntdne_kernels.ops.triton import kernels

try:
    from ntdne_kernels.ops.triton import hopper
except (ImportError, AttributeError):  # Gluon is experimental
    hopper = None  # type: ignore[assignment]
from ntdne_kernels.ops.triton.configs import (
    MERGE_WARPS,
    SMALLEST_CAPABILITY,
    Device,
    choose,
    class_tile,
    columns,
    hopper_tiles,
    hopper_width,
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
_HERE = nullcontext()


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


def _log_scores(
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
        unused = out[0]
        _sum_up("merge_to_log_scores", features, bank, labels, index, classes, [], sigma, need_direction, None, (
            *out, index, unused, unused, unused, unused, unused), (0.0, 0.0, 0.0))  # fmt: skip
    return out


def _class_sums(
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
        _sum_up("merge_to_class_sums", features, bank, labels, index, classes, [], sigma, need_means, None, out, ())
    else:
        for sums, nothing in zip(out, (-math.inf, -math.inf, 0, 0), strict=True):
            sums.fill_(nothing)
    return out


def _loss_fake(
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    sigma: float,
    q: float | None,
    k: float | None,
    reduction: str,
    indicator: str,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, D = features.shape
    log_p = bank.new_empty(B, dtype=accumulator_dtype(bank.dtype))
    value = log_p.new_empty(B if reduction == "none" else ())
    direction = log_p.new_empty((B if need_direction else 0, D))
    norms = log_p.new_empty(B if archive else 0)
    return value, log_p, torch.empty_like(log_p), direction, norms, torch.empty_like(log_p)


def _loss(
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    sigma: float,
    q: float | None,
    k: float | None,
    reduction: str,
    indicator: str,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Backend.loss` in three launches."""
    out = _loss_fake(features, bank, labels, index, classes, archive, sigma, q, k, reduction, indicator, need_direction)
    value, log_p, slope, direction, norms, log_sum_all = out
    if len(features) == 0:
        value.zero_()
        return out
    index = index.contiguous()
    scores = archive[2] if archive else log_p
    parts = log_p.new_empty((len(features), 2), dtype=torch.float64) if reduction != "none" else log_p
    q_or_1 = 1.0 if q is None else q
    log_k = -math.inf if k is None else math.log(k)
    merged = (log_p, direction, log_sum_all, index, scores, norms if archive else log_p, value, slope, parts)
    numbers = (q_or_1, log_k, -math.expm1(q_or_1 * log_k) / q_or_1)
    kind = _LossKind("snca" if q is None else "ntdne", k is not None, indicator, reduction)
    _sum_up(
        "merge_to_log_scores", features, bank, labels, index, classes, archive, sigma, need_direction, kind, merged,
        numbers, norms,
    )  # fmt: skip
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


def _bank_gradient(
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
        labels, index = labels.contiguous(), index.contiguous()
        layout = _Layout.of([c.contiguous() for c in classes], bank)
        launch = _prepare_launch(B, D, config.block_b, layout.by_range, layout.gather, False, True)
        queries, places = _prepare(launch, None, features, bank, labels, index, layout, [], config.block_b, log_p)
        D1, D2 = columns(D)
        kernels.gradient_to_bank[(triton.cdiv(N, config.block_n),)](
            queries, bank, layout.order, layout.first, places, log_p, log_sum_all, grad_log_p.contiguous(), gradient,
            B, N, bank.stride(0), math.log2(math.e) / sigma, sigma,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, BY_RANGE=layout.by_range,
            GATHER=layout.gather, PRECISION=PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return gradient


def _features_gradient(
    direction: Tensor, log_p: Tensor, slope: Tensor | None, grad: Tensor, features: Tensor, norms: Tensor
) -> Tensor:
    """`leave_one_out.features_gradient` in one launch."""
    B, D = direction.shape
    gradient = torch.empty_like(direction, dtype=features.dtype)
    if B == 0:
        return gradient
    launch = _gradient_launch(
        B, D, slope is not None, len(norms) > 0, features.device, features.dtype, direction.dtype, grad.dtype,
        features.stride(), grad.dim(), grad.stride(),
    )  # fmt: skip
    with _on(direction.device):
        launch(
            _stream(direction, grad, features),
            direction, log_p, log_p if slope is None else slope, grad, features, norms if len(norms) > 0 else log_p,
            gradient, B, grad.stride(0) if grad.dim() else 0, features.stride(0), features.stride(1),
        )  # fmt: skip
    return gradient


@lru_cache(maxsize=256)
def _gradient_launch(B: int, D: int, has_slope: bool, normalised: bool, *_: Any) -> "_Launch":
    """The other arguments, which the compiled kernel depends on, tell launches apart."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_B = max(2048 // BLOCK_D, 1)
    return _Launch(
        kernels.gradient_to_features, (triton.cdiv(B, BLOCK_B),),
        D=D, HAS_SLOPE=has_slope, NORMALISED=normalised, BLOCK_B=BLOCK_B, BLOCK_D=BLOCK_D,
    )  # fmt: skip


def record_scores_(scores: Tensor, log_p: Tensor, index: Tensor, image_labels: Tensor) -> None:
    """`scores.record_scores_` in one launch."""
    if len(index) == 0:
        return
    index = index.contiguous()
    launch = _record_launch(len(index), scores.device, scores.dtype, log_p.dtype)
    with _on(scores.device):
        launch(_stream(scores, log_p, index, image_labels), log_p, index, image_labels, scores, len(index),
               len(image_labels))  # fmt: skip


@lru_cache(maxsize=256)
def _record_launch(B: int, *_: Any) -> "_Launch":
    return _Launch(kernels.record, (triton.cdiv(B, 64),), BLOCK=64)


class _Launch:
    """A kernel with all that is compiled into it, and its grid.

    Once it is compiled it is launched without Triton's look at each argument: 11 µs in place of 33 (H200, triton 3.6).
    Arguments must then be like those it was compiled with; see `_stream`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], constants
        self.compiled: tuple[Any, ...] | None = None

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        if stream is not None and self.compiled is not None:
            run, function, metadata, constants = self.compiled
            run(*self.grid, stream, function, metadata, None, None, None, *arguments, *constants)
            return
        made = self.kernel[self.grid](*arguments, **self.constants)
        if stream is not None:
            constants = tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)
            self.compiled = made.run, made.function, made.packed_metadata, constants


class _LossKind(NamedTuple):
    """What of a loss is compiled into a kernel."""

    loss: str
    pruning: bool
    indicator: str
    reduction: str


class _Layout(NamedTuple):
    """Which rows of the bank belong to which class, as kernels take it; see `leave_one_out.neighbours_of`."""

    first: Tensor
    """Labels of the rows, or the classes."""
    offsets: Tensor
    order: Tensor
    position: Tensor
    by_range: bool
    gather: bool

    @staticmethod
    def of(classes: list[Tensor], unused: Tensor) -> "_Layout":
        first, *rest = classes
        offsets, order, position = (*rest, first, first, first)[:3] if len(rest) < 3 else rest
        return _Layout(first, offsets, order, position, len(rest) > 0, len(rest) > 1)


def _prepare_launch(
    B: int, D: int, block_b: int, by_range: bool, gather: bool, look_up: bool, has_labels: bool
) -> _Launch:
    return _Launch(
        kernels.prepare, (block_b * triton.cdiv(B, block_b) // 16,),
        D=D, BY_RANGE=by_range, GATHER=gather, LOOK_UP=look_up, HAS_LABELS=has_labels, SHORTEST=SHORTEST,
        BLOCK_Q=16, BLOCK=128,
    )  # fmt: skip


def _prepare(
    launch: _Launch,
    stream: int | None,
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    layout: _Layout,
    archive: list[Tensor],
    block_b: int,
    norms: Tensor,
) -> tuple[Tensor, Tensor]:
    """The features in the bank's dtype (B', D), sorted by class, and (B' + 1, 4) where their neighbours stand."""
    B, D = features.shape
    image_labels, position, N = (
        (archive[0], archive[1], len(archive[0])) if archive else (index, layout.position, len(bank))
    )
    padded = block_b * triton.cdiv(B, block_b)
    queries = torch.empty((padded, D), dtype=bank.dtype, device=bank.device)
    places = index.new_empty((padded + 1, 4))
    C = len(layout.first)
    launch(
        stream,
        features, index if labels is None else labels, index, layout.first, layout.offsets, position, image_labels,
        queries, places, norms, skipped_counter(bank.device),
        B, N, C, features.stride(0), features.stride(1), C.bit_length(),
    )  # fmt: skip
    return queries, places


class _Plan(NamedTuple):
    """How one size of problem is cut up and launched."""

    prepare: _Launch
    stream: _Launch
    merge: _Launch
    block_b: int
    slots: tuple[int, ...]
    """(splits, blocks, sums of a block, queries of a block)"""
    rows_per_split: int
    tracked: bool
    hopper: int
    """Bank rows per tile of the kernel for Hopper GPUs; 0: the portable one."""


@lru_cache(maxsize=256)
def _plan(
    merge: str,
    device: Device,
    B: int,
    N: int,
    D: int,
    bank_dtype: torch.dtype,
    arithmetic: str,
    by_range: bool,
    gather: bool,
    look_up: bool,
    has_labels: bool,
    tracked: bool,
    weighted: bool,
    loss: _LossKind | None,
    hopper_serves: bool,
    *_: Any,
) -> _Plan:
    """The arguments that the compiled kernels depend on besides tell plans apart."""
    kinds = 1 if by_range else 2
    config = choose(device, "range" if by_range else "labels", arithmetic, D, B)
    tiles = None
    if hopper_serves and not tracked and by_range and not gather:
        tiles = hopper_tiles(device, D, B)
    config = config if tiles is None else tiles
    rows = config.block_n * triton.cdiv(triton.cdiv(N, split_count(device, config, B, N, D, kinds)), config.block_n)
    splits, blocks = triton.cdiv(N, rows), triton.cdiv(B, config.block_b)
    D1, D2 = columns(D)
    numbers = {"TRACKED": tracked, "SHIFT": _FLOAT16_SHIFT if bank_dtype == torch.float16 else 0, "WEIGHTED": weighted}
    if tiles is not None:
        stream = _Launch(
            hopper.stream, (splits * blocks,),
            D=D, W=hopper_width(D), BLOCK_B=config.block_b, BLOCK_N=config.block_n, STAGES=config.num_stages,
            WEIGHTED=weighted, FOLD_ROWS=FOLD_ROWS, REGISTERS=240, num_warps=4,
        )  # fmt: skip
    else:
        stream = _Launch(
            kernels.stream, (kinds * splits * blocks,),
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, BY_RANGE=by_range, GATHER=gather,
            **numbers, PRECISION=PRECISION[arithmetic], FOLD_ROWS=FOLD_ROWS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    constants: dict[str, Any] = {}
    if merge == "merge_to_log_scores":
        name, pruning, indicator, reduction = loss or _LossKind("", False, "current", "none")
        constants = {"LOSS": name, "PRUNING": pruning, "INDICATOR": indicator, "REDUCTION": reduction}
        constants |= {"LOOK_UP": look_up, "BLOCK": 256}
    element_size = accumulator_dtype(bank_dtype).itemsize
    return _Plan(
        _prepare_launch(B, D, config.block_b, by_range, gather, look_up, has_labels),
        stream,
        _Launch(
            getattr(kernels, merge), (B,),
            D=D, BLOCK_B=config.block_b, **numbers, **merge_blocks(D, element_size, splits), **constants,
            num_warps=MERGE_WARPS,
        ),
        config.block_b,
        (splits, blocks, 2, config.block_b),
        rows,
        tracked,
        0 if tiles is None else config.block_n,
    )  # fmt: skip


def _sum_up(
    merge: str,
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    sigma: float,
    weighted: bool,
    loss: _LossKind | None,
    merged: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    norms: Tensor | None = None,
) -> None:
    """Sum the splits of the bank up for each query; the kernel `merge` makes `merged` of them and of `numbers`."""
    B, D = features.shape
    N = len(bank)
    with _on(bank.device):
        device, arithmetic = describe(bank.device), _arithmetic(bank.dtype)
        bank, index = _with_unit_stride(bank), index.contiguous()
        labels = None if labels is None else labels.contiguous()
        layout = _Layout.of([c.contiguous() for c in classes], index)
        tracked = sigma < SMALLEST_PLAIN_SIGMA or bank.dtype == torch.float16
        plan = _plan(
            merge, device, B, N, D, bank.dtype, arithmetic, layout.by_range, layout.gather, len(archive) > 0,
            labels is not None, tracked, weighted, loss, hopper_serves(bank), bank.device, len(layout.first),
            features.dtype, features.stride(), bank.stride(0), merged[0].dtype,
        )  # fmt: skip
        stream = _stream(features, bank, index, labels if labels is not None else index, *classes, *archive)
        first = merged[0]
        queries, places = _prepare(
            plan.prepare, stream, features, bank, labels, index, layout, archive, plan.block_b,
            first if norms is None or not archive else norms,
        )  # fmt: skip
        totals = bank.new_empty(plan.slots, dtype=accumulator_dtype(bank.dtype))
        maxima = torch.empty_like(totals) if tracked else totals
        vectors = totals.new_empty((*plan.slots, D if weighted else 0))
        scale = math.log2(math.e) / sigma
        if plan.hopper:
            plan.stream(
                stream, *hopper.descriptors(queries, bank, plan.hopper), places, totals, vectors, B, N, scale,
                plan.rows_per_split,
            )  # fmt: skip
        else:
            plan.stream(
                stream, queries, bank, places if not layout.gather else layout.order, layout.first, places,
                totals, maxima, vectors, B, N, bank.stride(0), scale, plan.slots[0], plan.rows_per_split,
            )  # fmt: skip
        count = (B, len(archive[0]) if archive else N) if merge == "merge_to_log_scores" else (B,)
        plan.merge(stream, totals, maxima, vectors, places, *merged, *count, scale, plan.slots[0], *numbers)


def hopper_serves(bank: Tensor) -> bool:
    """Whether the kernel of hopper.py can read the bank: by TMA, whose rows begin at multiples of 16 bytes."""
    return (
        hopper is not None
        and bank.dtype == torch.bfloat16
        and len(bank) < 1 << 31
        and (bank.data_ptr() | bank.stride(0) * bank.element_size()) % 16 == 0
        and not INTERPRETED
    )


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
    here = device.type == "cpu" or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


def _stream(*tensors: Tensor) -> int | None:
    """The current stream, for launches without Triton's own look at the arguments; None where it is needed.

    Compiled kernels count on pointers at multiples of 16 bytes, and on the dtypes they were compiled for.
    """
    if INTERPRETED:
        return None
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    return None if pointers % 16 else torch._C._cuda_getCurrentRawStream(tensors[0].device.index)


def _arithmetic(dtype: torch.dtype) -> str:
    """The column of the table; float32 products as PyTorch's own setting has them."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "fp64" if dtype == torch.float64 else "16-bit"


def _with_unit_stride(bank: Tensor) -> Tensor:
    """The bank, or a copy where its rows are not contiguous or too far apart."""
    return bank if bank.stride(1) == 1 and bank.stride(0) <= _LARGEST_STRIDE else bank.contiguous()


_LIBRARY = torch.library.Library("ntdne_kernels", "FRAGMENT")


def _op(signature: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An op of the package. torch.library.custom_op would add 20 µs to a call, and 85 where a gradient is wanted."""
    name = signature.split("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ntdne_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ntdne_kernels, name).default


_BATCH = "Tensor features, Tensor bank, Tensor labels, Tensor index, Tensor[] classes, float sigma"
log_scores = _op(
    f"triton_log_scores({_BATCH}, bool need_direction) -> (Tensor, Tensor, Tensor)", _log_scores, log_scores_fake
)
class_sums = _op(
    f"triton_class_sums({_BATCH}, bool need_means) -> (Tensor, Tensor, Tensor, Tensor)", _class_sums, class_sums_fake
)
bank_gradient = _op(
    f"triton_bank_gradient({_BATCH}, Tensor log_p, Tensor log_sum_all, Tensor grad_log_p) -> Tensor",
    _bank_gradient,
    bank_gradient_fake,
)
loss_op = _op(
    "triton_loss(Tensor features, Tensor bank, Tensor? labels, Tensor index, Tensor[] classes, Tensor[] archive, "
    "float sigma, float? q, float? k, str reduction, str indicator, bool need_direction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
)
features_gradient = _op(
    "triton_features_gradient(Tensor direction, Tensor log_p, Tensor? slope, Tensor grad, Tensor features, "
    "Tensor norms) -> Tensor",
    _features_gradient,
    lambda direction, log_p, slope, grad, features, norms: torch.empty_like(direction, dtype=features.dtype),
)


def fused_loss(
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    sigma: float,
    loss: Loss,
    need_direction: bool,
) -> tuple[Tensor, ...]:
    """`Backend.loss` in one op."""
    result: tuple[Tensor, ...] = loss_op(
        features, bank, labels, index, classes, archive, sigma, loss.q, loss.k, loss.reduction, loss.indicator,
        need_direction,
    )  # fmt: skip
    return result


if not INTERPRETED:
    _LIBRARY.impl("record_scores_", record_scores_, "CUDA")
TRITON = Backend(log_scores, class_sums, class_masses, bank_gradient, features_gradient, fused_loss)
