"""A tree of links to an archive's images, in a folder for each class.

An image keeps its name below its class's folder. Where another one has that name already, the one that moved there gets
the class it came from, and a number where that is not enough: 1.png, 1 (ash).png, 1 (ash 2).png. Images that stay in
their class folders always keep their names. Names that differ in case alone count as the same, since on some disks they
are.

Shapes: N images.
"""

import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path, PurePath

from ntdne_kernels.experiments.sources import is_technical

LINKS = ("symbolic", "hard", "copies")
ILLEGAL = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
MAX_BYTES = 255  # of a name, on Linux and macOS


def check_class_names(names: Collection[str], existing: Collection[str] = ()) -> None:
    """ValueError unless a folder can be made for each class on every common system.

    Args:
        names: of the classes.
        existing: those that have folders already, which are not checked.

    Example:
        >>> check_class_names(["oak", "a/b"])
        Traceback (most recent call last):
        ValueError: class 'a/b': expected a name that a folder can have, got '/' in it
    """
    known = {_folded(name): name for name in existing}
    for name in sorted(set(names) - set(existing)):
        fault = _fault(name)
        if fault:
            raise ValueError(f"class {name!r}: expected a name that a folder can have, {fault}")
        other = known.setdefault(_folded(name), name)
        if other != name:
            raise ValueError(f"class {name!r} differs from {other!r} by case alone; expected one of the two")


def _fault(name: str) -> str:
    """Why no folder can have this name; "" where one can."""
    illegal = ILLEGAL.search(name)
    if illegal:
        return f"got {illegal[0]!r} in it"
    if not name.strip() or name != name.strip() or name.endswith("."):
        return "got blanks or a dot at its end" if name.strip(" .") else "got none"
    if is_technical(name):
        return "got one of a hidden or technical folder, which is passed over"
    if RESERVED.fullmatch(name):
        return "got one that Windows keeps for itself"
    return f"got one of more than {MAX_BYTES} bytes" if len(name.encode()) > MAX_BYTES else ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def tree_names(paths: Sequence[str], given: Sequence[str], labels: Sequence[str | None]) -> list[str | None]:
    """The name of each image's link, as "oak/1.png"; None where it has no label.

    Example:
        >>> tree_names(["ash/1.png", "oak/1.png"], ["ash", "oak"], ["oak", "oak"])
        ['oak/1 (ash).png', 'oak/1.png']

    Args:
        paths: N file names, in their class folders or not.
        given: N labels that they had, "" for none.
        labels: N labels that they get, None for none.
    """
    names: list[str | None] = [None] * len(paths)
    taken: set[str] = set()
    below = [_below(path, label) for path, label in zip(paths, given, strict=True)]
    stays = [
        label == old and path == f"{old}/{rest}"
        for path, old, label, rest in zip(paths, given, labels, below, strict=True)
    ]
    for image in sorted(range(len(paths)), key=lambda image: not stays[image]):  # stable: in order of the archive
        label = labels[image]
        if label is None:
            continue
        name = f"{label}/{below[image]}"
        if not stays[image]:
            name = _free(name, given[image], taken)
        names[image] = name
        taken.add(_folded(name))
    return names


def _below(path: str, label: str) -> str:
    """A file's name below its class's folder; without folders where it is in none."""
    parts = PurePath(path).parts
    inside = len(parts) > 1 and parts[0] == label and ".." not in parts
    return "/".join(parts[1:]) if inside else parts[-1]


def _free(name: str, given: str, taken: set[str]) -> str:
    """The name, with what tells it from those taken."""
    if _folded(name) not in taken:
        return name
    stem, suffix = os.path.splitext(name)
    origin = given if given and not _fault(given) else ""
    marks = (origin if n == 1 else f"{origin} {n}".strip() for n in count(1 if origin else 2))
    return next(free for mark in marks if _folded(free := f"{stem} ({mark}){suffix}") not in taken)


def make_tree(
    files: Sequence[Path], names: Sequence[str | None], tree: Path, relative_to: Path | None, kind: str
) -> None:
    """Make the links of a tree.

    Args:
        files: absolute path of each of the N images.
        names: of the links, from `tree_names`.
        tree: the folder where they are made; it may be moved afterwards.
        relative_to: where the tree will be: symbolic links are relative to that; None: they are absolute.
        kind: one of LINKS.

    Raises:
        ValueError: a file is missing, or links of this kind cannot be made here.
        OSError: the disk is full.
    """
    chosen = [(file, name) for file, name in zip(files, names, strict=True) if name is not None]
    missing = [file for file, _ in chosen if not file.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ValueError(f"--links: expected the images' files, but {missing[0]}{others} not there")
    for file, name in chosen:
        link = tree / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if kind == "copies":
            shutil.copy2(file, link)
            continue
        try:
            if kind == "hard":
                os.link(file, link)
            else:
                link.symlink_to(file if relative_to is None else os.path.relpath(file, (relative_to / name).parent))
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            others = "--links copies" if kind == "hard" else "--links hard or copies"
            raise ValueError(f"--links: {kind} links cannot be made here: {error}; {others} may do") from None
