"""Writing files so that they are complete or absent, and checking where they are to be written.

A folder of outputs is of one source, which a file in it names, and of one process at a time.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def check_folder(folder: Path, archive: Path | None = None) -> None:
    """ValueError where a folder for outputs cannot be written to, or lies in the folder of the images."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output: expected a folder that can be written to, but {existing} is none")
    if archive is not None and folder.resolve().is_relative_to(archive.resolve()):
        raise ValueError(f"--output: {folder} lies in the archive {archive}, which stays as it is; give another folder")


def check_source(record: Path, source: str) -> None:
    """ValueError where a JSON file says that the outputs in its folder are of another source; there may be no file."""
    try:
        found = json.loads(record.read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found and found != source:
        raise ValueError(
            f"--output: {record.parent} holds what was made of {found}, and would be replaced by what is made of "
            f"{source}; give another folder"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder meanwhile.

    What is locked is an empty, hidden file beside the folder, .NAME.lock. The lock is the system's, and ends with the
    process, however that ends; a file that a killed one left does no harm. Where no lock can be had, as on some network
    disks, or beside a folder whose parent cannot be written to, that is said on standard error.

    Raises:
        ValueError: another process writes there.
        OSError: the folder's parent cannot be made.
    """
    place = folder.resolve()
    made = [each for each in place.parents if not each.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"--output: another process writes to {folder}; give another folder, or wait until it has ended"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter is filelock's of a disk without flock
        reason = getattr(error, "strerror", None) or error
        print(f"ntdne: {folder} is not locked ({reason}): start nothing else that writes there", file=sys.stderr)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # before the release: whoever opened the file meanwhile sees that it is gone
                os.unlink(lock.lock_file)
            lock.release()
        for each in made:  # where nothing was written
            with suppress(OSError):
                each.rmdir()


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name in its folder, then rename it, so that it is never there in part."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # the system does not name the file when a disk is full
        raise
