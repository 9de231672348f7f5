"""Where the rows of a memory bank live: on its device, in host memory, or in a file that is mapped into memory.

A file holds the N·D values as they stand in memory, and <path>.json describes the bank they are of. A process that is
killed loses nothing it has written to the mapped rows: the system has them, and whoever opens the file next finds them.
`flush` is for machines that stop.

The description is written before the file gets its size, and says "ready": false until the rows are filled (`mark`): a
start that did not finish is started anew.

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

KINDS = ("device", "host", "disk")
FORMAT = 1
LOCK_SECONDS = 10.0  # a killed process's DataLoader workers, which have its lock too, outlive it by 5


class Rows(NamedTuple):
    """The rows of a bank, and whether they are still to be filled."""

    rows: Tensor
    """(N, D), contiguous."""
    fresh: bool
    """Their values mean nothing yet; False for those of a file that was filled before."""


def allocate(
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    path: str | os.PathLike[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Rows:
    """Rows for a bank.

    Once fresh rows of a file are filled, say so: `mark(path, ready=True)`. The file is locked as long as a tensor of
    its rows lives, here or in a forked process.

    Args:
        kind: "device"; "host", memory of the host, which a GPU can read on its own (pinned) where `device` is one; or
            "disk", the file `path`, which is created, with its place on the disk, or taken up where it is there.
        shape: (N, D).
        dtype: of the rows.
        device: of the features that the bank is for.
        path: the file; its folder must be there. Only for "disk".
        facts: what else must be the same for a file to be taken up, as JSON has it; a fingerprint of the labels, say.

    Raises:
        ValueError: kind or path is not as described, or the file is another bank's (the message says where they differ)
            or none. Nothing was changed.
        OSError: the file cannot be opened for writing, another bank has it open (BlockingIOError), or the disk has no
            place for it. Nothing is left behind.
    """
    check_choice("storage", kind, KINDS)
    if (path is not None) != (kind == "disk"):
        raise ValueError(f"path: expected a file for storage='disk', and None otherwise, got {path!r} for {kind!r}")
    if path is not None:
        return _map(Path(path), shape, dtype, facts or {})
    if kind == "host":
        # PyTorch takes a power of two of pinned bytes; PYTORCH_CUDA_ALLOC_CONF=pinned_max_round_threshold_mb:1024 takes
        # what is asked for.
        return Rows(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda"), fresh=True)
    return Rows(torch.empty(shape, dtype=dtype, device=device), fresh=True)


def mark(path: str | os.PathLike[str], *, ready: bool) -> None:
    """Say whether the file's rows can be taken up as they are.

    Rows that are ready are flushed first. Those that are about to change places, say, are not ready.
    """
    if ready:
        flush(path)
    _write_description(Path(path), _read_description(Path(path)) | {"ready": ready})


def flush(path: str | os.PathLike[str]) -> None:
    """Return once everything written to the rows is on the disk, where a machine that stops leaves it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def take_place(new: Path, path: Path) -> None:
    """Let the rows of the file `new`, which are filled but not marked, and its facts, be those of `path`.

    Where that is interrupted, the rows of one of them are ready, or of none: never are they taken for others.
    """
    flush(new)  # which may take long, and the rows of `path` are still there
    mark(path, ready=False)
    new.replace(path)
    _description_of(new).replace(_description_of(path))
    mark(path, ready=True)


def _map(path: Path, shape: tuple[int, int], dtype: torch.dtype, facts: dict[str, Any]) -> Rows:
    if fcntl is None:
        raise ValueError("storage: 'disk' needs file locks, which Windows does not have")
    values = shape[0] * shape[1] * dtype.itemsize
    size = max(values, 1)  # of a rank that has no row: an empty file cannot be mapped
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
    """Leave no file that was created, or emptied, for nothing."""
    if os.fstat(file).st_size == 0:
        path.unlink()


def _lock(file: int, path: Path) -> None:
    """Keep every other process, and this one, from opening the file for another bank."""
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
    """Whether the file holds this bank's rows; ValueError where it holds something else worth keeping."""
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
    """Give the file its size and its place on the disk.

    A full disk is an error now; met later, by a write to a mapped page, it would kill the process.
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
    """Replace <path>.json as a whole; the lock keeps others from doing so at the same time."""
    written = path.with_name(path.name + ".json.new")
    try:
        written.write_text(json.dumps(description, indent=1) + "\n")
        written.replace(_description_of(path))
    except BaseException:
        written.unlink(missing_ok=True)
        raise
