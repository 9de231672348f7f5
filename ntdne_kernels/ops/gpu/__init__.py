"""log p and its gradients on a GPU, through the kernels of `kernels.py`: memory O(B·D).

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ntdne_kernels.arguments import SHORTEST, accumulator_dtype
from ntdne_kernels.ops import scores as _scores  # noqa: F401  defines the op record_scores_
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.capture import check_not_capturing
from ntdne_kernels.ops.class_sums import SMALLEST_PLAIN_SIGMA
from ntdne_kernels.ops.gpu import kernels
from ntdne_kernels.ops.gpu.configs import (
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
from ntdne_kernels.ops.leave_one_out import Backend, bank_gradient_fake, class_sums_fake, log_scores_fake
from ntdne_kernels.ops.losses import Loss
from ntdne_kernels.user_warning import warn_user

try:
    from ntdne_kernels.ops.gpu import hopper
except (ImportError, AttributeError):  # Gluon is experimental
    hopper = None  # type: ignore[assignment]

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
BLOCK_Q = 16  # queries that a program of `prepare` takes
_HERE = nullcontext()
_NOT_COMPILED = (CompilationError, PTXASError, OutOfResources)


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
        _sum_up("merge_to_log_scores", features, bank, labels, index, classes, [], sigma, need_direction, None, out)
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
        _sum_up("merge_to_class_sums", features, bank, labels, index, classes, [], sigma, need_means, None, out)
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
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, D = features.shape
    log_p = bank.new_empty(B, dtype=accumulator_dtype(bank.dtype))
    value = log_p.new_empty(B if reduction == "none" else ())
    gradient = log_p.new_empty((B if need_gradient else 0, D))
    return value, log_p, torch.empty_like(log_p), gradient, torch.empty_like(log_p)


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
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Backend.loss` in three launches."""
    out = _loss_fake(features, bank, labels, index, classes, archive, sigma, q, k, reduction, indicator, need_gradient)
    if features.size(0) == 0:
        out[0].zero_()
        return out
    value, log_p, slope, gradient, log_sum_all = out
    loss = _LossKind("snca" if q is None else "ntdne", k is not None, indicator, reduction)
    _sum_up(
        "merge_to_log_scores", features, bank, labels, index, classes, archive, sigma, need_gradient, loss,
        (log_p, gradient, log_sum_all), value, slope, q, k,
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
        config = choose(device, "stream", arithmetic, D, B)
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
        layout = _Layout.of(classes)
        launch = _prepare_launch(B, D, config.block_b, layout.sorted_labels, layout.gather, False, True, False)
        queries, places = _prepare(launch, None, features, bank, labels, index, layout, [], config.block_b, log_p)
        D1, D2 = columns(D)
        kernels.gradient_to_bank[(triton.cdiv(N, config.block_n),)](
            queries, bank, layout.order, places, log_p, log_sum_all, grad_log_p.contiguous(), gradient,
            B, N, bank.stride(0), math.log2(math.e) / sigma, sigma,
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n,
            GATHER=layout.gather, PRECISION=PRECISION[arithmetic],
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return gradient


def record_scores_(scores: Tensor, log_p: Tensor, index: Tensor, image_labels: Tensor) -> None:
    """`scores.record_scores_` in one launch."""
    if index.size(0) == 0:
        return
    index = index.contiguous()
    launch = _record_launch(index.size(0), scores.device, scores.dtype, log_p.dtype)
    with _on(scores.device):
        launch(_stream(scores, log_p, index, image_labels), log_p, index, image_labels, scores, index.size(0),
               image_labels.size(0))  # fmt: skip


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
        if stream is not None:  # to load what is compiled is nothing that a capture allows
            why = (
                f"the kernel {self.kernel.__name__} has not run for such arguments yet; run the step before the capture"
            )
            check_not_capturing(torch.device("cuda"), why)
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
    """Which rows of the bank belong to which class, as kernels take it: ranges of rows, or of places in an order."""

    classes: Tensor
    offsets: Tensor
    order: Tensor
    position: Tensor
    gather: bool
    sorted_labels: bool
    """`classes` are the sorted labels of all rows; there are no offsets."""

    @staticmethod
    def of(tensors: list[Tensor]) -> "_Layout":
        """From what `leave_one_out.neighbours_of` takes.

        Labels of the rows are sorted: 0.2 ms for 10^6 of them, where kernels that compare labels took 1.0 ms longer
        than those that know ranges (H200, B = 256).
        """
        if len(tensors) == 1:
            labels, order = torch.sort(tensors[0], stable=True)
            position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            return _Layout(labels, labels, order, position, True, True)
        classes, offsets, *rest = (tensor.contiguous() for tensor in tensors)
        order, position = rest or (classes, classes)
        return _Layout(classes, offsets, order, position, len(rest) > 0, False)


def _prepare_launch(
    B: int, D: int, block_b: int, sorted_labels: bool, gather: bool, look_up: bool, has_labels: bool, snca: bool
) -> _Launch:
    return _Launch(
        kernels.prepare, (block_b * triton.cdiv(B, block_b) // BLOCK_Q,),
        D=D, SORTED_LABELS=sorted_labels, GATHER=gather, LOOK_UP=look_up, HAS_LABELS=has_labels, SNCA=snca,
        SHORTEST=SHORTEST, BLOCK_Q=BLOCK_Q, BLOCK=256,
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
    """What `kernels.prepare` makes: the features in the bank's dtype, sorted by class; where their neighbours stand."""
    (B, D), C = features.shape, layout.classes.size(0)
    image_labels, position, *_ = archive or (index, layout.position)
    padded = block_b * triton.cdiv(B, block_b)
    queries = torch.empty((padded, D), dtype=bank.dtype, device=bank.device)
    places = index.new_empty(4 * padded + 1 + padded // BLOCK_Q)
    launch(
        stream,
        features, index if labels is None else labels, index, layout.classes, layout.offsets, position, image_labels,
        queries, places, norms, skipped_counter(bank.device),
        B, image_labels.size(0) if archive else bank.size(0), C, features.stride(0), features.stride(1),
        C.bit_length(),
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
    sorted_labels: bool,
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
    config, hopper_rows = choose(device, "stream", arithmetic, D, B), 0
    if hopper_serves and not tracked and not gather:
        tiles = hopper_tiles(device, D, B)
        config, hopper_rows = (config, 0) if tiles is None else (tiles, tiles.block_n)
    rows = config.block_n * triton.cdiv(triton.cdiv(N, split_count(device, config, B, N, D)), config.block_n)
    splits, blocks = triton.cdiv(N, rows), triton.cdiv(B, config.block_b)
    D1, D2 = columns(D)
    numbers = {"TRACKED": tracked, "SHIFT": _FLOAT16_SHIFT if bank_dtype == torch.float16 else 0, "WEIGHTED": weighted}
    if hopper_rows > 0:
        stream = _Launch(
            hopper.stream, (splits * blocks,),
            D=D, W=hopper_width(D), BLOCK_B=config.block_b, BLOCK_N=config.block_n, STAGES=config.num_stages,
            WEIGHTED=weighted, FOLD_ROWS=FOLD_ROWS, REGISTERS=240, num_warps=4,
        )  # fmt: skip
    else:
        stream = _Launch(
            kernels.stream, (splits * blocks,),
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, GATHER=gather,
            **numbers, PRECISION=PRECISION[arithmetic], FOLD_ROWS=FOLD_ROWS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    constants: dict[str, Any] = {}
    if merge == "merge_to_log_scores":
        name, pruning, indicator, reduction = loss or _LossKind("", False, "current", "none")
        constants = {"LOSS": name, "PRUNING": pruning, "INDICATOR": indicator, "REDUCTION": reduction}
        constants |= {"LOOK_UP": look_up, "BLOCK_Q": BLOCK_Q, "BLOCK": 256}
    element_size, snca = accumulator_dtype(bank_dtype).itemsize, loss is not None and loss.loss == "snca"
    return _Plan(
        _prepare_launch(B, D, config.block_b, sorted_labels, gather, look_up, has_labels, snca),
        stream,
        _Launch(
            getattr(kernels, merge), (B,),
            D=D, BLOCK_B=config.block_b, **numbers, **merge_blocks(D, element_size, splits), **constants,
            num_warps=MERGE_WARPS,
        ),
        config.block_b,
        (splits, blocks, 2, config.block_b),
        rows,
        hopper_rows,
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
    out: tuple[Tensor, ...],
    value: Tensor | None = None,
    slope: Tensor | None = None,
    q: float | None = None,
    k: float | None = None,
) -> None:
    """Sum the splits of the bank up for each query; the kernel `merge` makes `out`, and a loss, of the sums."""
    B, D = features.shape
    N = bank.size(0)
    with _on(bank.device):
        device, arithmetic = describe(bank.device), _arithmetic(bank.dtype)
        bank, index = _with_unit_stride(bank), index.contiguous()
        labels = None if labels is None else labels.contiguous()
        layout = _Layout.of(classes)
        tracked = sigma < SMALLEST_PLAIN_SIGMA or bank.dtype == torch.float16
        plan = _plan(
            merge, device, B, N, D, bank.dtype, arithmetic, layout.sorted_labels, layout.gather, len(archive) > 0,
            labels is not None, tracked, weighted, loss, hopper_serves(bank), bank.device, layout.classes.size(0),
            features.dtype, features.stride(), bank.stride(0), out[0].dtype, archive[2].dtype if archive else None,
        )  # fmt: skip
        stream = _stream(features, bank, labels if labels is not None else index, index, *layout[:4], *archive)
        norms = torch.empty_like(out[0]) if archive else out[0]
        queries, places = _prepare(
            plan.prepare, stream, features, bank, labels, index, layout, archive, plan.block_b, norms
        )
        totals = bank.new_empty(plan.slots, dtype=accumulator_dtype(bank.dtype))
        maxima = torch.empty_like(totals) if tracked else totals
        vectors = totals.new_empty((*plan.slots, D if weighted else 0))
        scale = math.log2(math.e) / sigma
        if plan.hopper:
            try:
                plan.stream(
                    stream, *hopper.descriptors(queries, bank, plan.hopper), places, totals, vectors, B, N, scale,
                    plan.rows_per_split,
                )  # fmt: skip
            except _NOT_COMPILED as error:
                _do_without_hopper(error)
                rest = (sigma, weighted, loss, out, value, slope, q, k)
                _sum_up(merge, features, bank, labels, index, classes, archive, *rest)
                return
        else:
            plan.stream(
                stream, queries, bank, layout.order, places, totals, maxima, vectors, B, N, bank.stride(0), scale,
                plan.rows_per_split,
            )  # fmt: skip
        if merge == "merge_to_class_sums":
            plan.merge(stream, totals, maxima, vectors, places, *out, B, scale, plan.slots[0])
            return
        unused = out[0]
        losses = unused if loss is None or loss.reduction == "none" else unused.new_empty(B, dtype=torch.float64)
        q_or_1, log_k = 1.0 if q is None else q, -math.inf if k is None else math.log(k)
        plan.merge(
            stream, totals, maxima, vectors, places, *out, index, archive[2] if archive else unused, features, norms,
            unused if value is None else value, unused if slope is None else slope, losses,
            B, archive[0].size(0) if archive else N, features.stride(0), features.stride(1), scale, plan.slots[0],
            q_or_1, log_k, -math.expm1(q_or_1 * log_k) / q_or_1,
        )  # fmt: skip


def _do_without_hopper(error: Exception) -> None:
    """From here on the portable kernel alone, which is said once: Gluon, in which the other is written, changes."""
    global hopper
    hopper = None  # type: ignore[assignment]
    _plan.cache_clear()
    warn_user(
        f"the kernel for Hopper GPUs does not compile with triton {triton.__version__}, and the loss takes the slower, "
        f"portable one: {error}",
        RuntimeWarning,
    )


def hopper_serves(bank: Tensor) -> bool:
    """Whether the kernel of hopper.py can read the bank: by TMA, whose rows begin at multiples of 16 bytes."""
    return (
        hopper is not None
        and bank.dtype == torch.bfloat16
        and bank.size(0) < 1 << 31
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
    "float sigma, float? q, float? k, str reduction, str indicator, bool need_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
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
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Backend.loss` in one op."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = loss_op(
        features, bank, labels, index, classes, archive, sigma, loss.q, loss.k, loss.reduction, loss.indicator,
        need_gradient,
    )  # fmt: skip
    return result


if not INTERPRETED:
    _LIBRARY.impl("record_scores_", record_scores_, "CUDA")
TRITON = Backend(log_scores, class_sums, class_masses, bank_gradient, fused_loss)
