"""Where the rows of a memory bank live: on its device, in host memory, or in a file that is mapped into memory.

A file holds the N·D values as in memory, and <path>.json describes the bank they belong to. If the process is killed,
nothing it wrote to the mapped rows is lost: the system keeps the pages and writes them to the file. If the machine
stops, only what was flushed before survives (`flush`).

The description is written before the file gets its size, with "ready": false until the rows are filled (`mark`). A file
that is not ready is filled again.

Shapes: N rows, D values.
"""

import errno
import json
import mmap
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import check_choice

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STORAGE_KINDS = ("device", "host", "disk")
FORMAT = 1
LOCK_SECONDS = 10.0  # the DataLoader workers of a killed process hold its lock for up to 5 s after it


class Rows(NamedTuple):
    """The rows of a bank, and whether they must still be filled."""

    rows: Tensor
    """(N, D), contiguous."""
    fresh: bool
    """The values mean nothing yet; False for a file that was filled before."""


def allocate(
    storage_kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    path: str | os.PathLike[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Rows:
    """Make the rows of a bank, or open the file that holds them.

    Call `mark(path, ready=True)` once fresh rows of a file are filled. The file stays locked as long as a tensor of its
    rows lives, here or in a forked process.

    Args:
        storage_kind: "device"; "host", memory of the host, pinned if `device` is a GPU, which then reads it directly;
            or "disk", the file `path`, which is created at its full size, or opened with its rows if it exists.
        shape: (N, D).
        dtype: of the rows.
        device: of the features that the bank is for.
        path: the file, in a folder that exists. Only for "disk".
        facts: values for JSON that must be the same to open an existing file, such as a fingerprint of the labels.

    Raises:
        ValueError: storage_kind or path is not as described, the file is no bank's, or it is another bank's; the
            message says where they differ. Nothing was changed.
        OSError: the file cannot be opened for writing, another bank has it open (BlockingIOError), or the disk has no
            room for it. Nothing is left behind.
    """
    check_choice("storage", storage_kind, STORAGE_KINDS)
    if (path is not None) != (storage_kind == "disk"):
        raise ValueError(
            f"path: expected a file for storage='disk', and None otherwise, got {path!r} for {storage_kind!r}"
        )
    if path is not None:
        return _map(Path(path), shape, dtype, facts or {})
    if storage_kind == "host":
        # PyTorch rounds pinned memory up to a power of two; PYTORCH_CUDA_ALLOC_CONF=pinned_max_round_threshold_mb:1024
        # stops that.
        return Rows(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda"), fresh=True)
    return Rows(torch.empty(shape, dtype=dtype, device=device), fresh=True)


def mark(path: str | os.PathLike[str], *, ready: bool) -> None:
    """Record whether the file's rows can be used as they are.

    Rows that are ready are flushed first. Rows that are about to be replaced are not ready.
    """
    if ready:
        flush(path)
    _write_description(Path(path), _read_description(Path(path)) | {"ready": ready})


def flush(path: str | os.PathLike[str]) -> None:
    """Return once everything written to the rows is on the disk, where it survives a machine that stops."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def take_place(new: Path, path: Path) -> None:
    """Replace the file `path` by the file `new`, which is filled but not marked ready, together with its description.

    If that is interrupted, at most one of the two files is ready, and each description is that of its own rows.
    """
    flush(new)  # may take long, and until here the rows of `path` are ready
    mark(path, ready=False)
    new.replace(path)
    _description_of(new).replace(_description_of(path))
    mark(path, ready=True)


def _map(path: Path, shape: tuple[int, int], dtype: torch.dtype, facts: dict[str, Any]) -> Rows:
    if fcntl is None:
        raise ValueError("storage: 'disk' needs file locks, which Windows does not have")
    values = shape[0] * shape[1] * dtype.itemsize
    size = max(values, 1)  # an empty file cannot be mapped, and a rank may have no row
    expected = {"format": FORMAT, "shape": shape, "dtype": str(dtype).removeprefix("torch."), **facts}
    expected = json.loads(json.dumps(expected))  # a tuple comes back as a list
    description = _description_of(path)
    file = _open(path)
    try:
        with ExitStack() as undo:
            _lock(file, path)
            undo.callback(_remove_if_empty, file, path)
            found = _read_description(path) if description.exists() else None
            fresh = not _check(path, os.fstat(file).st_size, size, found, expected)
            if fresh:
                undo.callback(os.ftruncate, file, 0)
                undo.callback(description.unlink, missing_ok=True)
                _write_description(path, expected | {"ready": False})
                _reserve(file, size, path)
            mapping = mmap.mmap(file, size)  # holds the file, and with it the lock
            undo.pop_all()
    finally:
        os.close(file)
    return Rows(torch.frombuffer(mapping, dtype=torch.uint8)[:values].view(dtype).view(shape), fresh)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"path: expected a file to write to: {error.strerror}", str(path)) from None


def _remove_if_empty(file: int, path: Path) -> None:
    """Remove a file that was created, or emptied, before the failure."""
    if os.fstat(file).st_size == 0:
        path.unlink()


def _lock(file: int, path: Path) -> None:
    """Keep other processes, and other banks of this one, from opening the file."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise BlockingIOError(
                    errno.EAGAIN, "path: expected a file for this bank alone, but another bank has it open", str(path)
                ) from None
            time.sleep(0.1)
    if os.fstat(file).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, "path: the file was removed while another bank had it open", str(path))


def _check(path: Path, size: int, expected_size: int, found: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
    """Whether the file holds this bank's rows; ValueError if it holds anything else that should be kept."""
    description = _description_of(path)
    if found is None:
        if size > 0:
            raise ValueError(f"path: expected a new file or a bank's, got {path} without {description.name}")
        return False
    if not found.pop("ready"):
        return False
    differing = [
        f"{name} (file: {found.get(name)}, here: {expected.get(name)})"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f"path: expected the file of this bank, but {path} is another one's: {', '.join(differing)}. Give another "
            f"path, or remove the file and {description}"
        )
    if size != expected_size:
        raise ValueError(f"path: expected {expected_size} bytes, as {description} says, got {size} in {path}")
    return True


def _reserve(file: int, size: int, path: Path) -> None:
    """Give the file its size and reserve its room on the disk.

    A full disk raises here. Later, a write to a mapped page would kill the process.
    """
    os.ftruncate(file, 0)
    free = shutil.disk_usage(path.parent).free
    try:
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(file, size)
        if sys.platform != "darwin":
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        reason = f"path: expected place for {size} bytes, {free} are free: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from None


def _description_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_description(path: Path) -> dict[str, Any]:
    """What <path>.json says."""
    description = _description_of(path)
    try:
        found: dict[str, Any] = json.loads(description.read_bytes())
        if not isinstance(found["ready"], bool):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"path: expected {description} to describe a bank's file, as it was written beside it; remove both to "
            "start anew"
        ) from None
    return found


def _write_description(path: Path, description: dict[str, Any]) -> None:
    """Replace <path>.json in one step; the lock keeps others from doing so at the same time."""
    written = path.with_name(path.name + ".json.new")
    try:
        written.write_text(json.dumps(description, indent=1) + "\n")
        written.replace(_description_of(path))
    except BaseException:
        written.unlink(missing_ok=True)
        raise
