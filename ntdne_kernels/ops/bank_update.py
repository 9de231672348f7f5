"""The bank update: f ← normalise(m·f + (1 − m)·f_new), eq. 15 with m = 1 − λ.

`update_bank` below is the definition, in PyTorch. It runs where no compiled kernel exists; loading the library built
from csrc/ puts the C++ kernel in its place on CPUs and the CUDA kernel on GPUs.

Shapes: B features, N bank rows, D values each.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

VANISHING = 1e-12
"""A row whose blend with the new feature is shorter than this becomes the new feature."""

_skipped: dict[torch.device, Tensor] = {}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 bank, float32 for every other: the dtype of sums, scores and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


torch.library.define(
    "ntdne_kernels::update_bank_", "(Tensor(a!) bank, Tensor features, Tensor index, float momentum) -> ()"
)


@torch.library.impl("ntdne_kernels::update_bank_", "CompositeExplicitAutograd")
@torch.no_grad()
def update_bank_in_pytorch(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> None:
    """Blend (B, D) `features` into the rows `index` (B,) of the (N, D) `bank`, in place and in batch order.

    Features are normalised first; index −1 marks a feature that has no row. On a CPU a feature without a direction
    (norm 0 or not finite) or an index outside the bank raises a RuntimeError and nothing is written; elsewhere that
    feature is left out and counted (`skipped_rows`).
    """
    warn_fallback(bank.device.type)
    wide = accumulator_dtype(bank.dtype)
    new = features.to(wide)
    norm = torch.linalg.vector_norm(new, dim=1)
    valid = (norm > 0) & norm.isfinite() & (index >= 0) & (index < bank.size(0))
    skipped = (~valid & (index != -1)).sum()
    if bank.device.type == "cpu":
        if skipped:
            raise RuntimeError("update_bank_: a feature has norm 0 or is not finite, or an index is out of range")
    else:
        _skipped[bank.device] = _skipped.get(bank.device, 0) + skipped
    new = (new / norm.unsqueeze(1))[valid]
    index = index[valid]
    # One round for the first update of each row, one for the second, ...: the batch order.
    order = torch.argsort(index, stable=True)
    position = torch.arange(len(index), device=index.device)
    starts_row = torch.ones_like(index, dtype=torch.bool)
    starts_row[1:] = index[order][1:] != index[order][:-1]
    repeat = position - torch.cummax(torch.where(starts_row, position, 0), dim=0).values if len(index) else position
    for turn in range(int(repeat.max()) + 1 if len(index) else 0):
        chosen = order[repeat == turn]
        rows = index[chosen]
        blend = momentum * bank[rows].to(wide) + (1 - momentum) * new[chosen]
        length = torch.linalg.vector_norm(blend, dim=1, keepdim=True)
        bank[rows] = torch.where(length < VANISHING, new[chosen], blend / length).to(bank.dtype)


@torch.library.register_fake("ntdne_kernels::update_bank_")  # type: ignore[untyped-decorator]
def _update_bank_fake(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> None:
    return None


@torch.library.custom_op("ntdne_kernels::skipped_rows", mutates_args=())
def skipped_rows(bank: Tensor) -> int:
    """Features that updates on the bank's device have left out since the program started. Synchronises."""
    return int(_skipped.get(bank.device, 0))


_warned: set[str] = set()


def warn_fallback(device_type: str) -> None:
    """Say once per device type that the update runs without its compiled kernel, and what is missing."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    if not LIBRARY_LOADED:
        missing = "the package was built without a C++ compiler or without torch"
    elif device_type == "cuda":
        missing = "the package was built without nvcc"
    else:
        return  # no compiled kernel exists for this kind of device
    warnings.warn(
        f"ntdne_kernels: bank updates on {device_type} run through PyTorch because {missing}. They are right, but "
        "slower. With the missing tool on the PATH: pip install --force-reinstall --no-deps --no-build-isolation .",
        RuntimeWarning,
        stacklevel=2,
    )


def _load_library() -> bool:
    for path in Path(__file__).parent.parent.glob("_C*.so"):
        torch.ops.load_library(path)
        return True
    return False


LIBRARY_LOADED = _load_library()
