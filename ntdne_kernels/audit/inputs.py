"""The features of an archive as a memory bank: checked, read in blocks, normalised.

Shapes: N images, D features, n rows of a block.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.arguments import BANK_DTYPES, accumulator_dtype
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.progress import with_progress

BLOCK_VALUES = 1 << 23  # values looked at together: 65,536 rows of 128


def feature_bank(
    features: Any,
    labels: Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MemoryBank:
    """A memory bank of normalised features.

    Example:
        >>> bank = feature_bank(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 0]))
        >>> bank.rows([0, 1])
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Args:
        features: (N, D) of any length but 0: a float tensor, NumPy array, memory map or DataFrame. Read once, in order.
        labels: (N,) integers, −1 for unlabelled.
        device: where the bank lives; None: where the features are. Rows that a GPU has no room for stay in host memory.
        dtype: of the bank.
        scratch: folder for the rows, in a file without a name; None: they are kept in memory.
        progress: show it on standard error.

    Raises:
        TypeError: features are not floats, not dense or masked, or dtype is none of a bank.
        ValueError: features are no matrix, differ in number from the labels, do not fit in memory, or have rows that
            are 0 or not finite, which are named.
        OSError: the features cannot be read, or the scratch folder has no room.
    """
    if hasattr(features, "to_numpy"):
        features = features.to_numpy()
    N, D = _check_features(features)
    if len(labels) != N:
        raise ValueError(f"labels: expected one for each of the {N} rows of features, got {len(labels)}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype!r}")
    if scratch is not None and not Path(scratch).is_dir():
        raise NotADirectoryError(f"scratch: expected a folder, got {os.fspath(scratch)}")
    if device is None:
        device = features.device if isinstance(features, Tensor) else "cpu"
    bank = _allocate(labels, D, torch.device(device), dtype, scratch)
    _fill(bank, features, progress)
    return bank


def _check_features(features: Any) -> tuple[int, int]:
    """N and D.

    Raises:
        TypeError: features are not floats, or not dense.
        ValueError: they are no matrix, or hold no value.
    """
    dense = features.layout == torch.strided if isinstance(features, Tensor) else not hasattr(features, "toarray")
    if not dense:
        found = features.layout if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected a dense tensor or array, got {found}")
    if np.ma.isMaskedArray(features):
        raise TypeError("features: expected an array of values, got a masked one; features.filled(...) says of which")
    shape = tuple(features.shape) if hasattr(features, "shape") else ()
    if len(shape) != 2 or 0 in shape:
        found = f"shape {shape}" if hasattr(features, "shape") else type(features).__name__
        raise ValueError(f"features: expected a tensor, array or DataFrame (N, D) of at least one value, got {found}")
    floating = features.is_floating_point() if isinstance(features, Tensor) else features.dtype.kind == "f"
    if not floating:
        raise TypeError(f"features: expected float values, got {features.dtype}")
    return shape


def _allocate(
    labels: Tensor, D: int, device: torch.device, dtype: torch.dtype, scratch: str | os.PathLike[str] | None
) -> MemoryBank:
    """A bank on the device; in host memory where a GPU has no room for it; in a scratch folder where there is one.

    Raises:
        ValueError: there is no folder and not enough memory.
    """
    N, generator = len(labels), torch.Generator(device).manual_seed(0)  # leaves the caller's random state alone
    if scratch is not None:
        # The folder goes at once. Its file lives as long as the bank has it open.
        with tempfile.TemporaryDirectory(prefix="ntdne-audit-", dir=scratch) as folder:
            path = Path(folder) / "bank"
            return MemoryBank(labels, D, generator=generator, device=device, dtype=dtype, storage="disk", path=path)
    needed, storage = N * D * dtype.itemsize, "device"
    if device.type == "cuda" and needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
        storage = "host"
    if (device.type == "cpu" or storage == "host") and needed > (free := free_memory()):
        raise ValueError(
            f"features: a copy of {N} × {D} {str(dtype).removeprefix('torch.')} takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; give a scratch folder on a disk with that much room"
        )
    return MemoryBank(labels, D, generator=generator, device=device, dtype=dtype, storage=storage)


def _fill(bank: MemoryBank, features: Any, progress: bool) -> None:
    """Write the features (N, D) into the bank.

    Raises:
        ValueError: rows cannot be normalised. All of them are named.
    """
    N, D = features.shape
    block = rows_per_block(D)
    unusable: list[int] = []
    starts: Iterable[int] = range(0, N, block)
    for start in with_progress(starts, "Reading features") if progress else starts:
        rows = features[start : start + block]
        if not isinstance(rows, Tensor):
            # A copy in native byte order: torch takes no other order, and warns of memory maps that are read-only.
            rows = torch.from_numpy(np.array(rows, rows.dtype.newbyteorder("=")))
        rows = rows.detach()
        unusable += (_without_direction(rows, bank.storage.dtype) + start).tolist()
        if not unusable:
            images = torch.arange(start, start + len(rows), device=bank.device)
            bank.update_(rows.to(bank.device), images, momentum=0.0)
    _refuse("features", unusable, N)


def rows_per_block(D: int) -> int:
    """How many rows of D values are looked at together."""
    return max(BLOCK_VALUES // D, 1)


def _without_direction(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Which of the rows (n, D) a bank of the dtype cannot normalise."""
    norm = torch.linalg.vector_norm(rows.to(accumulator_dtype(dtype)), dim=1)
    usable: Tensor = (norm > 0) & norm.isfinite()
    return (~usable).nonzero().squeeze(1).cpu()


def _refuse(name: str, rows: list[int], N: int) -> None:
    if rows:
        named = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(f"{name}: expected rows of a positive, finite norm, got others at {len(rows)} of {N}: {named}")


def free_memory() -> float:
    """Free memory of the host in bytes; infinite where the system does not say.

    Example:
        >>> free_memory() > 0
        True
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return math.inf
