"""What a folder of `ntdne embed` says of itself, and whether the images are still those that its rows are of.

Shapes: N images.
"""

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntdne_kernels.experiments.images import MAX_PIXELS

FEATURES, LABELS, FILES, STAMPS, ABOUT = "features.npy", "labels.npy", "files.txt", "stamps.npy", "embed.json"
PARTIAL = f"{FEATURES}.partial"  # until all rows are there
FORMAT = 1  # of embed.json
# What the command need not say.
DEFAULTS = {"weights": "default", "white": None, "dtype": "float16", "max_pixels": MAX_PIXELS}
MAX_NAMED = 3  # files in a message
SECOND = 10**9  # nanoseconds


def read_about(folder: Path) -> dict[str, Any] | None:
    """What embed.json in the folder says; None where there is none; ValueError where it is something else."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
        if about["format"] != FORMAT:
            raise ValueError(f"{folder / ABOUT}: expected format {FORMAT}, got {about['format']}")
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{folder / ABOUT} is none of ntdne embed") from None
    return about


def read_files(folder: Path) -> list[str]:
    """The N names in files.txt, which may be any bytes."""
    return os.fsdecode((folder / FILES).read_bytes()).removesuffix("\n").split("\n")


def check_finished(folder: Path) -> None:
    """ValueError where a folder is that of an `ntdne embed` that has not come to an end; it names what finishes it."""
    about = read_about(folder) if (folder / PARTIAL).is_file() and not (folder / FEATURES).exists() else None
    if about is not None:
        raise ValueError(
            f"{folder}: {about['progress']['seen']} of {about['images']} images are encoded; this goes on with them: "
            f"{_command(folder, about)}"
        )


def _command(folder: Path, about: dict[str, Any]) -> str:
    """The command that goes on with the rows in a folder."""
    words = ["ntdne", "embed", about["folder"], "--encoder", about["encoder"], "--image-size", about["image_size"]]
    for name, default in DEFAULTS.items():
        value = about.get(name, default)
        words += [] if value == default else [f"--{name.replace('_', '-')}", value]
    words += ["--bands", ",".join(map(str, about["bands"]))] if about["bands"] else []
    words += ["--classes", *about["classes"]] if about.get("classes") else []
    words += ["--skip-unreadable"] if about["progress"]["unreadable"] else []
    return shlex.join(map(str, [*words, "--output", folder]))


def stamps_of(paths: Iterable[str]) -> NDArray[np.int64]:
    """(N, 2): size in bytes and time of the last change, in nanoseconds, of each file; 0, 0 where there is none."""
    return np.array([_stamp(path) for path in paths], np.int64).reshape(-1, 2)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link, too, which decoding will report
        return 0, 0
    return status.st_size, status.st_mtime_ns


def check_images(files: Iterable[Path], images: Path | None = None) -> None:
    """Check that the images of folders of `ntdne embed` are as they were when the folders were made.

    Each image is looked up once, and none is read: its size and the time of its last change are compared. A copy of
    the archive may have other times altogether; then the sizes decide. Nothing is said where no image is to be found,
    as on another machine, of images that were deleted or added, nor of folders of other kinds.

    Args:
        files: features and labels, in such folders or not.
        images: where the images are; None: where they were. Elsewhere some may be missing.

    Raises:
        ValueError: some images have changed, or were moved: into the folder of another class, say.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        about = read_about(folder)
        if about is not None and (folder / STAMPS).is_file():
            _compare(folder, Path(about["folder"]), images)


def _compare(folder: Path, place: Path, images: Path | None) -> None:
    """ValueError where images in their place, or in a copy of it, are others than a folder's rows are of."""
    root = images or place
    if not root.is_dir():
        return
    names, before = read_files(folder), np.load(folder / STAMPS)
    now = stamps_of(os.path.join(root, name) for name in names)
    gone = ~now.any(axis=1)
    if gone.all():
        return
    (old_size, old), (size, time) = before.T, now.T
    copied = not np.isin(time[~gone], old).any()
    # Archives as .tar keep times in whole seconds.
    same_time = (time == old) | ((time % SECOND == 0) & (time == old // SECOND * SECOND))
    changed = ~gone & ((size != old_size) | ~(same_time | copied))
    moved = gone & _elsewhere(root, names, before) if gone.any() else gone
    if not (changed | moved).any():
        return
    said = [_said(names, which, what) for which, what in ((changed, "changed"), (moved, "moved")) if which.any()]
    raise ValueError(
        f"{root}: of the {len(names)} images that {folder} was made of {' and '.join(said)}; put them back, or make "
        "features of them as they are: ntdne embed with another --output"
    )


def _elsewhere(root: Path, names: list[str], before: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) whether a file that is none of the N names has an image's size and time: as one that was moved has."""
    known = {os.path.join(root, name) for name in names}
    paths = (os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files)
    others = set(map(tuple, stamps_of(path for path in paths if path not in known).tolist()))
    return np.array([tuple(stamp) in others for stamp in before.tolist()])


def _said(names: list[str], which: Any, what: str) -> str:
    """As "2 have moved (oak/1.png, oak/2.png)", of those that `which` (N,) marks."""
    rows = np.flatnonzero(which)
    first = ", ".join(names[row] for row in rows[:MAX_NAMED])
    return (
        f"{len(rows)} {'has' if len(rows) == 1 else 'have'} {what} ({first}{' ...' if len(rows) > MAX_NAMED else ''})"
    )
