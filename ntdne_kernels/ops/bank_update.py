"""The bank update: f ← normalise(m·f + (1 − m)·f_new), eq. 15 with m = 1 − λ.

`update_bank_in_pytorch` is the definition. It serves devices without a compiled kernel; loading the library built from
csrc/ puts the C++ kernel in its place on CPUs and the CUDA kernel on GPUs.

Shapes: B features, N bank rows, D values each.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops.capture import check_not_capturing
from ntdne_kernels.ops.schema import implement
from ntdne_kernels.user_warning import warn_user

VANISHING = 1e-12
"""A row whose blend with the new feature is shorter than this, or not finite, becomes the new feature."""

_warned: set[str] = set()


def skipped_counter(device: torch.device) -> Tensor:
    """(1,) int64: features without a direction that were left out on the device since the program started.

    Those that the CUDA library left out of updates it counts itself.

    Raises:
        RuntimeError: it would be made within a CUDA graph, each replay of which would set it to 0.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _counter(device)


@cache
@torch.inference_mode(False)
def _counter(device: torch.device) -> Tensor:
    check_not_capturing(device, "the first step on a device makes a counter; run a step before the capture")
    return torch.zeros(1, dtype=torch.int64, device=device)


@torch.no_grad()
def update_bank_in_pytorch(
    bank: Tensor, features: Tensor, index: Tensor, momentum: float, position: Tensor | None = None
) -> None:
    """Blend (B, D) `features` into the rows `index` (B,) of the (N, D) `bank`, in place and in batch order.

    Features are normalised first; index −1 marks a feature that has no row. On a CPU a feature without a direction
    (norm 0 or not finite) or an index outside the bank raises a RuntimeError and nothing is written; elsewhere that
    feature is left out and counted. With `position` the index counts its entries, which are the rows; one outside them
    is treated as one outside the bank. Whatever shares memory with the bank is read as it was before the call.
    """
    check_not_capturing(bank.device, "bank updates through PyTorch wait for the GPU; they need their compiled kernel")
    _warn_of_missing_kernel(bank.device.type)
    with torch.autocast(bank.device.type, enabled=False):
        # Contiguous, because sums over other strides are added up in another order.
        new = features.to(accumulator_dtype(bank.dtype)).contiguous()
        norm = torch.linalg.vector_norm(new, dim=1)
        if position is not None:
            inside = (index >= 0) & (index < len(position))
            index = torch.where(inside, position[torch.where(inside, index, 0)], torch.where(index == -1, -1, -2))
        valid = (norm > 0) & norm.isfinite() & (index >= 0) & (index < len(bank))
        skipped = (~valid & (index != -1)).sum()
        if bank.device.type != "cpu":
            skipped_counter(bank.device).add_(skipped)
        elif skipped:
            raise RuntimeError("update_bank_: a feature has norm 0 or is not finite, or an index is out of range")
        new, index = (new / norm.unsqueeze(1))[valid], index[valid]
        turns = _turns(index)
        for turn in range(int(turns.max()) + 1 if len(turns) else 0):
            chosen = turns == turn
            rows, unit = index[chosen], new[chosen]
            blend = momentum * bank[rows].to(new.dtype) + (1 - momentum) * unit
            length = torch.linalg.vector_norm(blend, dim=1, keepdim=True)
            has_direction = (length >= VANISHING) & length.isfinite()
            bank[rows] = torch.where(has_direction, blend / length, unit).to(bank.dtype)


def _turns(index: Tensor) -> Tensor:
    """How often each index (B,) stood in the batch before: updates of one turn touch different rows."""
    ordered, order = torch.sort(index, stable=True)
    place = torch.arange(len(index), device=index.device)
    first_of_row = torch.searchsorted(ordered, ordered)
    return torch.empty_like(index).scatter_(0, order, place - first_of_row)


def skipped_rows_in_pytorch(bank: Tensor) -> int:
    """Features that updates on the bank's device have left out since the program started. Synchronises."""
    return 0


def _warn_of_missing_kernel(device_type: str) -> None:
    """Say once per device type that the update runs without its compiled kernel, and what is missing."""
    if device_type in LOAD_ERRORS and device_type not in _warned:
        _warned.add(device_type)
        warn_user(
            f"bank updates on {device_type} run through PyTorch, right but slower: {LOAD_ERRORS[device_type]}. "
            "Once that is mended, in its folder: pip install --force-reinstall --no-deps --no-build-isolation -e .",
            RuntimeWarning,
        )


def _load_libraries() -> dict[str, str]:
    """Load what was built; why there is no kernel for a kind of device, for those without."""
    errors = {}
    for device_type, name, needs in (
        ("cpu", "_C_cpu", "a C++ compiler or torch"),
        ("cuda", "_C_cuda", "torch with CUDA, or an nvcc of its CUDA version,"),
    ):
        library = Path(__file__).parent.parent / f"{name}.abi3.so"
        if not library.exists():
            place = library.parent.parent
            errors[device_type] = (
                f"{needs} was missing where ntdne_kernels was built, or {place} holds its source alone"
            )
            continue
        try:
            torch.ops.load_library(library)
        except OSError as error:  # built for CUDA, and torch was exchanged for one without
            errors[device_type] = f"{library.name} does not load ({error})"
    return errors


implement("update_bank_", update_bank_in_pytorch)
implement("skipped_rows", skipped_rows_in_pytorch)
LOAD_ERRORS = _load_libraries()
