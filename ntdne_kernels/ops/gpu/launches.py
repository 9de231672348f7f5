"""How the kernels are launched: which plan a problem gets, with what each kernel is compiled, and on which stream.

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ntdne_kernels.arguments import SHORTEST, accumulator_dtype
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.capture import check_not_capturing
from ntdne_kernels.ops.class_sums import SMALLEST_PLAIN_SIGMA
from ntdne_kernels.ops.gpu import configs, kernels
from ntdne_kernels.ops.gpu.configs import Device
from ntdne_kernels.ops.layout import ClassLayout, ClassOrder, PlainLabels
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Archive, Batch
from ntdne_kernels.user_warning import warn_user

try:
    from ntdne_kernels.ops.gpu import hopper
except (ImportError, AttributeError):  # Gluon is experimental
    hopper = None  # type: ignore[assignment]

# The products of 16-bit rows are exact in either mode; the bank's gradient has float32 factors, which meet as TF32.
PRECISION = {"16-bit": "tf32", "tf32": "tf32", "ieee": "ieee", "fp64": "ieee"}
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set before triton was imported: the kernels run on CPU tensors, slowly."""
INTERPRETED_DEVICE = Device(capability=90, multiprocessors=3, shared=227 << 10)
FOLD_ROWS = 1 << 14
"""Rows summed in registers before they are added to memory."""
# Of the larger strides a tile's offsets would not fit 32 bits. No bank but a view of something else has such.
LARGEST_STRIDE = 1 << 23
_FLOAT16_SHIFT = 14  # float16 ends at 2^16
BLOCK_Q = 16  # queries that a program of `prepare` takes
_HERE = nullcontext()
_NOT_COMPILED = (CompilationError, PTXASError, OutOfResources)


class Launch:
    """A kernel with all that is compiled into it, and its grid.

    Once it is compiled it is launched without Triton's look at each argument: 11 µs in place of 33 (H200, triton 3.6).
    Arguments must then be like those it was compiled with; see `stream_of`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], constants
        self.compiled: tuple[Any, ...] | None = None

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        """Launch on the stream; None: Triton looks at each argument."""
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


class LossArguments(NamedTuple):
    """A loss, and where it and its slope go."""

    spec: LossSpec
    value: Tensor
    """() or (B,)"""
    slope: Tensor
    """(B,)"""

    @property
    def constants(self) -> tuple[str, bool, str, str]:
        """What of the loss is compiled into a kernel: which one, whether it prunes, the indicator, the reduction."""
        spec = self.spec
        return "snca" if spec.q is None else "ntdne", spec.k is not None, spec.indicator, spec.reduction


class KernelLayout(NamedTuple):
    """Which rows of the bank belong to which class, as kernels take it: ranges of rows, or of places in an order."""

    classes: Tensor
    offsets: Tensor
    order: Tensor
    position: Tensor
    gather: bool
    sorted_labels: bool
    """`classes` are the sorted labels of all rows; there are no offsets."""

    @staticmethod
    def of(layout: ClassLayout) -> "KernelLayout":
        """Plain labels are sorted.

        That takes 0.2 ms for 10^6 of them, where kernels that compare labels took 1.0 ms longer than those that know
        ranges (H200, B = 256).
        """
        if isinstance(layout, PlainLabels):
            labels, order = torch.sort(layout.row_labels, stable=True)
            position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            return KernelLayout(labels, labels, order, position, True, True)
        classes, offsets = layout.classes.contiguous(), layout.offsets.contiguous()
        if isinstance(layout, ClassOrder):
            return KernelLayout(classes, offsets, classes, classes, False, False)
        return KernelLayout(classes, offsets, layout.order.contiguous(), layout.position.contiguous(), True, False)


def prepare_launch(
    B: int, D: int, block_b: int, sorted_labels: bool, gather: bool, look_up: bool, has_labels: bool, snca: bool
) -> Launch:
    """How `kernels.prepare` is launched for B queries of D columns."""
    return Launch(
        kernels.prepare, (block_b * triton.cdiv(B, block_b) // BLOCK_Q,),
        D=D, SORTED_LABELS=sorted_labels, GATHER=gather, LOOK_UP=look_up, HAS_LABELS=has_labels, SNCA=snca,
        SHORTEST=SHORTEST, BLOCK_Q=BLOCK_Q, BLOCK=256,
    )  # fmt: skip


def prepare(
    launch: Launch,
    stream: int | None,
    batch: Batch,
    layout: KernelLayout,
    archive: Archive | None,
    block_b: int,
    norms: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `kernels.prepare` makes: the features in the bank's dtype, sorted by class; where their neighbours stand."""
    features, bank, labels, index = batch.features, batch.bank, batch.labels, batch.own
    (B, D), C = features.shape, layout.classes.size(0)
    image_labels, position = (index, layout.position) if archive is None else archive[:2]
    padded = block_b * triton.cdiv(B, block_b)
    queries = torch.empty((padded, D), dtype=bank.dtype, device=bank.device)
    neighbours = index.new_empty(4 * padded + 1 + padded // BLOCK_Q)
    launch(
        stream,
        features, index if labels is None else labels, index, layout.classes, layout.offsets, position, image_labels,
        queries, neighbours, norms, skipped_counter(bank.device),
        B, bank.size(0) if archive is None else image_labels.size(0), C, features.stride(0), features.stride(1),
        C.bit_length(),
    )  # fmt: skip
    return queries, neighbours


class Plan(NamedTuple):
    """How one size of problem is cut up and launched."""

    prepare: Launch
    stream: Launch
    merge: Launch
    block_b: int
    slots: tuple[int, ...]
    """(splits, blocks, sums of a block, queries of a block)"""
    rows_per_split: int
    hopper: int
    """Bank rows per tile of the kernel for Hopper GPUs; 0: the portable one."""


class Case(NamedTuple):
    """What a plan depends on."""

    merge: str
    device: Device
    B: int
    N: int
    D: int
    dtype: torch.dtype
    """of the bank"""
    arithmetic: str
    """as `arithmetic_of` says"""
    sorted_labels: bool
    gather: bool
    look_up: bool
    has_labels: bool
    tracked: bool
    weighted: bool
    loss: tuple[str, bool, str, str] | None
    """as `LossArguments.constants`"""
    hopper_serves: bool


@lru_cache(maxsize=256)
def plan_of(case: Case, *_: Any) -> Plan:
    """How to launch a case. The compiled kernels depend on the other arguments too, so they tell plans apart."""
    device, arithmetic, B, N, D = case.device, case.arithmetic, case.B, case.N, case.D
    config, hopper_rows = configs.choose(device, "stream", arithmetic, D, B), 0
    if case.hopper_serves and not case.tracked and not case.gather:
        tiles = configs.hopper_tiles(device, D, B)
        config, hopper_rows = (config, 0) if tiles is None else (tiles, tiles.block_n)
    rows = config.block_n * triton.cdiv(triton.cdiv(N, configs.split_count(device, config, B, N, D)), config.block_n)
    splits, blocks = triton.cdiv(N, rows), triton.cdiv(B, config.block_b)
    D1, D2 = configs.columns(D)
    of_sums = {
        "TRACKED": case.tracked,
        "SHIFT": _FLOAT16_SHIFT if case.dtype == torch.float16 else 0,
        "WEIGHTED": case.weighted,
    }
    if hopper_rows > 0:
        stream = Launch(
            hopper.stream, (splits * blocks,),
            D=D, W=configs.hopper_width(D), BLOCK_B=config.block_b, BLOCK_N=config.block_n, STAGES=config.num_stages,
            WEIGHTED=case.weighted, FOLD_ROWS=FOLD_ROWS, REGISTERS=240, num_warps=4,
        )  # fmt: skip
    else:
        stream = Launch(
            kernels.stream, (splits * blocks,),
            D=D, D1=D1, D2=D2, BLOCK_B=config.block_b, BLOCK_N=config.block_n, GATHER=case.gather,
            **of_sums, PRECISION=PRECISION[arithmetic], FOLD_ROWS=FOLD_ROWS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    constants: dict[str, Any] = {}
    if case.merge == "merge_to_log_scores":
        name, pruning, indicator, reduction = case.loss or ("", False, "current", "none")
        constants = {"LOSS": name, "PRUNING": pruning, "INDICATOR": indicator, "REDUCTION": reduction}
        constants |= {"LOOK_UP": case.look_up, "BLOCK_Q": BLOCK_Q, "BLOCK": 256}
    element_size, snca = accumulator_dtype(case.dtype).itemsize, case.loss is not None and case.loss[0] == "snca"
    return Plan(
        prepare_launch(
            B, D, config.block_b, case.sorted_labels, case.gather, case.look_up, case.has_labels, snca
        ),
        stream,
        Launch(
            getattr(kernels, case.merge), (B,),
            D=D, BLOCK_B=config.block_b, **of_sums, **configs.merge_blocks(D, element_size, splits), **constants,
            num_warps=configs.MERGE_WARPS,
        ),
        config.block_b,
        (splits, blocks, 2, config.block_b),
        rows,
        hopper_rows,
    )  # fmt: skip


def stream_and_merge(
    merge: str,
    batch: Batch,
    archive: Archive | None,
    weighted: bool,
    loss: LossArguments | None,
    out: tuple[Tensor, ...],
) -> None:
    """Sum over the bank in splits for each query; the kernel `merge` makes `out`, and a loss, of the sums."""
    with on(batch.bank.device):
        batch = contiguous(batch)
        features, bank, labels, index, *_, sigma = batch
        (B, D), N = features.shape, bank.size(0)
        device, arithmetic = describe(bank.device), arithmetic_of(bank.dtype)
        layout = KernelLayout.of(batch.layout)
        tracked = sigma < SMALLEST_PLAIN_SIGMA or bank.dtype == torch.float16
        case = Case(
            merge, device, B, N, D, bank.dtype, arithmetic, layout.sorted_labels, layout.gather, archive is not None,
            labels is not None, tracked, weighted, None if loss is None else loss.constants, hopper_serves(bank),
        )  # fmt: skip
        plan = plan_of(
            case, bank.device, layout.classes.size(0), features.dtype, features.stride(), bank.stride(0), out[0].dtype,
            None if archive is None else archive.scores.dtype,
        )  # fmt: skip
        stream = stream_of(features, bank, index if labels is None else labels, index, *layout[:4], *(archive or ()))
        norms = out[0] if archive is None else torch.empty_like(out[0])
        queries, neighbours = prepare(plan.prepare, stream, batch, layout, archive, plan.block_b, norms)
        totals = bank.new_empty(plan.slots, dtype=accumulator_dtype(bank.dtype))
        maxima = torch.empty_like(totals) if tracked else totals
        vectors = totals.new_empty((*plan.slots, D if weighted else 0))
        scale = math.log2(math.e) / sigma
        if plan.hopper:
            try:
                plan.stream(
                    stream, *hopper.descriptors(queries, bank, plan.hopper), neighbours, totals, vectors, B, N, scale,
                    plan.rows_per_split,
                )  # fmt: skip
            except _NOT_COMPILED as error:
                _do_without_hopper(error)
                stream_and_merge(merge, batch, archive, weighted, loss, out)
                return
        else:
            plan.stream(
                stream, queries, bank, layout.order, neighbours, totals, maxima, vectors, B, N, bank.stride(0), scale,
                plan.rows_per_split,
            )  # fmt: skip
        if merge == "merge_to_class_sums":
            plan.merge(stream, totals, maxima, vectors, neighbours, *out, B, scale, plan.slots[0])
            return
        unused = out[0]
        value, slope, losses, q, k, unit = unused, unused, unused, 1.0, 0.0, 0.0
        if loss is not None:
            value, slope = loss.value, loss.slope
            q, k, unit = 1.0 if loss.spec.q is None else loss.spec.q, loss.spec.k or 0.0, loss.spec.unit or 0.0
            if loss.spec.reduction != "none":
                losses = unused.new_empty(B, dtype=torch.float64)
        log_k = math.log(k) if k > 0 else -math.inf
        plan.merge(
            stream, totals, maxima, vectors, neighbours, *out, index, unused if archive is None else archive.scores,
            features, norms, value, slope, losses,
            B, N if archive is None else archive.labels.size(0), features.stride(0), features.stride(1), scale,
            plan.slots[0], q, log_k, -math.expm1(q * log_k) / q, unit,
        )  # fmt: skip


def _do_without_hopper(error: Exception) -> None:
    """From here on the portable kernel alone, which is said once: Gluon, in which the other is written, changes."""
    global hopper
    hopper = None  # type: ignore[assignment]
    plan_of.cache_clear()
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
        return INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return Device(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device of a process, whatever device the tensors are on."""
    here = device.type == "cpu" or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


def stream_of(*tensors: Tensor) -> int | None:
    """The current stream, for launches without Triton's own look at the arguments; None where it is needed.

    Compiled kernels count on pointers at multiples of 16 bytes, and on the dtypes they were compiled for.
    """
    if INTERPRETED:
        return None
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    return None if pointers % 16 else torch._C._cuda_getCurrentRawStream(tensors[0].device.index)


def arithmetic_of(dtype: torch.dtype) -> str:
    """The column of the table; float32 products as PyTorch's own setting has them."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "fp64" if dtype == torch.float64 else "16-bit"


def contiguous(batch: Batch) -> Batch:
    """The batch as kernels read it; features may have any strides."""
    features, bank, labels, own, layout, sigma = batch
    labels = None if labels is None else labels.contiguous()
    return Batch(features, with_unit_stride(bank), labels, own.contiguous(), layout, sigma)


def with_unit_stride(bank: Tensor) -> Tensor:
    """The bank, or a copy where its rows are not contiguous or too far apart."""
    return bank if bank.stride(1) == 1 and bank.stride(0) <= LARGEST_STRIDE else bank.contiguous()
