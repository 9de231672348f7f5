"""Writing files so that they are complete or absent, and checking where they are to be written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def check_folder(folder: Path, archive: Path | None = None) -> None:
    """ValueError where a folder for outputs cannot be written to, or lies in the folder of the images."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output: expected a folder that can be written to, but {existing} is none")
    if archive is not None and folder.resolve().is_relative_to(archive.resolve()):
        raise ValueError(f"--output: {folder} lies in the archive {archive}, which stays as it is; give another folder")


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
