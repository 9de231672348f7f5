"""Where an archive's images come from: class folders, libraries' archives, scikit-learn's digits, made gratings.

Nothing is decoded here: a `Source` lists the images, and its `images()` decodes them one by one.

Shapes: N images of H × W pixels in B bands, C classes.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import EuroSAT

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.experiments.embedded import stamps_of
from ntdne_kernels.experiments.images import MAX_PIXELS, PLUGINS, Unreadable, decode, resized, suffixes
from ntdne_kernels.labels import read_labels, unicode_forms

DECODE_CHUNK = 256  # files handed to the threads at a time
GRATINGS_CHUNK = 64  # images drawn from one generator
LIBRARIES = {"eurosat": ("EuroSAT", "eurosat/2750"), "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45")}
MADE = re.compile(r"made:(\d+)(?:x(\d+))?")
TECHNICAL = {  # folders that file servers, operating systems and tools create; hidden ones begin with a dot
    *("@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__macosx", "__pycache__"),
}
UNLABELLED_FOLDER = "_unlabeled"  # where FiftyOne's export to class folders puts the images without a label
SET_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
MAX_LISTED = 4  # folders in a message
KNOWN_SOURCES = "expected a folder of class folders, or one of eurosat, resisc45, digits, made:N, made:NxC"


UNREADABLE = (Unreadable, OSError, MemoryError)  # what decoding raises for a file


def reason_of(error: Exception) -> str:
    """Why a file cannot be read."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class ArchiveError(ValueError):
    """What is wrong with an archive, in one line for the person who named it."""


class Decoding(NamedTuple):
    """How a file becomes an image of the archive."""

    image_size: int
    """Pixels a side."""
    bands: tuple[int, ...] = ()
    """Bands of each file, counted from 1; all by default. See `images.decode`."""
    max_pixels: int = MAX_PIXELS
    """Files of more pixels count as unreadable."""

    def read(self, path: str) -> NDArray[Any] | str:
        """The image (H, W, B), or the reason why the file cannot be read."""
        try:
            return resized(decode(path, self.bands, self.max_pixels), self.image_size)
        except UNREADABLE as error:
            return reason_of(error)


@dataclass(frozen=True)
class Source:
    """An archive that is not decoded yet.

    Attributes:
        name: what reports call the archive.
        classes: C names.
        labels: class of each of the N images, 0..C−1.
        files: N file names relative to the folder; "" for made images.
        identity: texts that differ wherever the images may differ; part of the cache's key.
        images: iterates over the images (H, W, B); for a file that cannot be read it gives the reason instead.
        folder: where the files are; `Path()` where there are none.
        left_out: how many files of the folder are no images, by their suffix.
    """

    name: str
    classes: list[str]
    labels: list[int]
    files: list[str]
    identity: list[str]
    images: Callable[[], Iterator[NDArray[Any] | str]]
    folder: Path = Path()
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder, not opened yet.

    Attributes:
        folder: its resolved path.
        classes: names of the class folders.
        files: N file names relative to the folder.
        labels: class of each image, 0..C−1; −1 for those beside the class folders and in the folder _unlabeled.
        left_out: how many files of the folder are no images, by their suffix.
    """

    folder: Path
    classes: list[str]
    files: list[str]
    labels: list[int]
    left_out: dict[str, int]

    def paths(self) -> list[str]:
        """The files' paths."""
        return [str(self.folder / file) for file in self.files]

    @cached_property
    def stamps(self) -> NDArray[np.int64]:
        """(N, 2) sizes and times of the files, see `stamps_of`."""
        return stamps_of(self.paths())

    def versions(self) -> list[str]:
        """A text for each image that differs wherever its file has another name, size or time."""
        return [json.dumps([file, *stamp]) for file, stamp in zip(self.files, self.stamps.tolist(), strict=True)]


def left_out_notes(name: str, left_out: dict[str, int]) -> str:
    """What of an archive's folder is no image, in one line; "" where everything is."""
    if not left_out:
        return ""
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    files = [f"{n} {suffix}" + (f" (needs {PLUGINS[suffix]})" if suffix in PLUGINS else "") for suffix, n in counts]
    line = f"{name}: files that are no images by their suffix or place: {', '.join(files)}"
    return line.encode(errors="backslashreplace").decode()  # a name may be any bytes


def find_source(
    source: str, decoding: Decoding, datasets: Path, *, download: bool, classes: list[str] | None, nested: bool
) -> Source:
    """The archive that `source` names; arguments as `open_archive` has them.

    Args:
        source: a folder, or a word as "digits".
        decoding: how files become images.
        datasets: folder where libraries unpack their archives.
        download: let a library fetch what is not there.
        classes: names of the classes to keep; None: all.
        nested: do not check whether the folders look like the parts of a set.

    Raises:
        ArchiveError: there is no such archive or class, or the folders are not the classes.
    """
    if source == "digits":
        return _digits(decoding.image_size, classes)
    if match := MADE.fullmatch(source):
        return _gratings_archive(int(match[1]), int(match[2] or 10), decoding.image_size, classes)
    if source in LIBRARIES:
        name, subfolder = LIBRARIES[source]
        folder = _unpacked(source, datasets, datasets / subfolder, download)
    else:
        folder = Path(source).expanduser().resolve()
        name = folder.name
    return _class_folders(folder, name, classes, decoding, nested)


def _selected(known: list[str], classes: list[str] | None, name: str, least: int = 2) -> list[str]:
    """The known classes that are to be kept, in their order; ArchiveError where they are fewer than `least`."""
    unknown = [wanted for wanted in classes or [] if wanted not in known]
    if unknown:
        raise ArchiveError(f"{name} has no class {', '.join(unknown)}; its classes are {', '.join(known)}")
    kept = [each for each in known if classes is None or each in classes]
    if len(kept) < least:
        raise ArchiveError(f"{name}: expected at least {least} classes, got {'only ' + kept[0] if kept else 'none'}")
    return kept


# Folders


def image_files(folder: str | Path, classes: list[str] | None = None) -> ImageFiles:
    """The images of a folder, whatever their number: in class folders and beside them.

    Args:
        folder: of class folders, of images, or of both.
        classes: names of the class folders to keep, without the images beside them; None: all.

    Raises:
        ArchiveError: there is no such folder or class, it holds no images, or its folders are not the classes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for file in ("new.jpg", "oak/1.png", "oak/notes.txt"):
        ...         Path(folder, file).parent.mkdir(exist_ok=True)
        ...         Path(folder, file).touch()
        ...     image_files(folder).files
        ['new.jpg', 'oak/1.png']
    """
    folder = Path(folder).expanduser().resolve()
    entries, known = _entries(folder)
    found = _listed(folder, entries, _selected(known, classes, folder.name, least=0), beside=classes is None)
    if not found.files:
        raise ArchiveError(f"{folder}: expected images, in class folders or beside them, got none")
    if classes is None:
        _check_levels(folder, found)
    check_names(folder.name, found.classes)
    return found


def check_names(archive: str, classes: list[str]) -> None:
    """ArchiveError where names of class folders are read as something else, once labels are text: −1, or 1.0 as 1."""
    found = read_labels(classes, "classes")
    numbers = isinstance(found, Tensor)
    read = list(map(str, found.tolist())) if isinstance(found, Tensor) else [name or "" for name in found]
    for name, back in zip(classes, read, strict=True):
        if name != back or (numbers and back.startswith("-")):
            meaning = "unlabelled" if back == str(UNLABELLED) else repr(back)
            raise ArchiveError(
                f"class {name!r} of {archive} would be read as {meaning} where labels are written as text; rename its "
                "folder"
            )


def _class_folders(folder: Path, name: str, classes: list[str] | None, decoding: Decoding, nested: bool) -> Source:
    entries, known = _entries(folder)
    if not known:
        raise ArchiveError(f"{folder}: no class folders; {KNOWN_SOURCES}")
    found = _listed(folder, entries, _selected(known, classes, name), beside=False)
    if found.files and classes is None and not nested:
        _check_levels(folder, found)
    return Source(
        name,
        found.classes,
        found.labels,
        found.files,
        [str(folder), *found.versions()],
        partial(_decode_all, found.paths(), decoding),
        folder,
        found.left_out,
    )


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """What is in a folder, by name, and which of it are class folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ArchiveError(f"{folder}: {error.strerror}; {KNOWN_SOURCES}") from None
    classes = [
        entry.name
        for entry in entries
        if entry.is_dir()
        and entry.name != UNLABELLED_FOLDER
        and not is_technical(entry.name)
        and not folder.is_relative_to(os.path.realpath(entry.path))
    ]
    twice = next((name for name, same in unicode_forms(classes).items() if len(same) > 1), None)
    if twice is not None:
        raise ArchiveError(f"{folder}: two folders are called {twice!r}, in two forms of Unicode; merge them")
    return entries, classes


def _listed(folder: Path, entries: list[os.DirEntry[str]], classes: list[str], beside: bool) -> ImageFiles:
    """The images of class folders and, where wanted, those beside them; the latter first, with label −1."""
    unlabelled, *of_classes = _files_of_classes(folder, [UNLABELLED_FOLDER, *classes])
    outside = [entry.name for entry in entries if not entry.is_dir() and not is_technical(entry.name)] + unlabelled
    files = [file for file in outside if beside and _suffix(file) in suffixes()]
    labels = [-1] * len(files)
    left_out = Counter(
        _suffix(file) + (" outside the class folders" if _suffix(file) in suffixes() else "")
        for file in outside
        if not (beside and _suffix(file) in suffixes())
    )
    for label, found in enumerate(of_classes):
        images = [file for file in found if _suffix(file) in suffixes()]
        left_out.update(_suffix(file) for file in found if _suffix(file) not in suffixes())
        files += images
        labels += [label] * len(images)
    return ImageFiles(folder, classes, files, labels, dict(left_out))


def is_technical(name: str) -> bool:
    """Whether a file or folder of this name is hidden or a system's, and no part of an archive."""
    return name.startswith(".") or name.casefold() in TECHNICAL


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without a suffix"


def _files_of_classes(root: Path, classes: list[str]) -> list[list[str]]:
    """The visible files of each class at any depth, relative to the root, in the order of their names.

    Real folders are visited before the targets of links, and each folder once.
    """
    found: dict[str, list[str]] = {each: [] for each in classes}
    owners: dict[str, str] = {}  # class of each real folder that was visited
    links: list[tuple[str, str]] = []

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # `_unlabeled` need not be there
            raise ArchiveError(f"{root.name}: the folder {error.filename} cannot be read: {error.strerror}")

    def visit(top: str, owner: str) -> None:
        for at, folders, files in os.walk(top, onerror=refuse):
            real = os.path.realpath(at)
            if real in owners:
                if owners[real] != owner and (top == at or not Path(real).is_relative_to(root)):
                    raise ArchiveError(f"{root.name}: {real} is in two classes, {owners[real]} and {owner}, by a link")
                folders.clear()
                continue
            owners[real] = owner
            folders[:] = sorted(name for name in folders if not is_technical(name))
            paths = [os.path.join(at, name) for name in folders]
            links.extend((path, owner) for path in paths if os.path.islink(path))
            found[owner] += [os.path.relpath(os.path.join(at, file), root) for file in files if not is_technical(file)]

    for each in classes:
        visit(str(root / each), each)
    for link, owner in links:  # visiting appends the links that it finds
        if not _leads_back(link, root):
            visit(link, owner)
    return [sorted(found[each], key=os.path.split) for each in classes]


def _leads_back(link: str, root: Path) -> bool:
    """Whether a link leads to a folder that holds it or the archive, or into the archive itself."""
    real, holder = (Path(os.path.realpath(each)) for each in (link, os.path.dirname(link)))
    in_archive = real.is_relative_to(root) and not any(map(is_technical, real.relative_to(root).parts))
    return in_archive or holder.is_relative_to(real) or root.is_relative_to(real)


def _check_levels(folder: Path, images: ImageFiles) -> None:
    """ArchiveError where the folders are not the classes, but the parts of a set, say, with the classes below."""
    classes = images.classes
    subfolders: dict[str, set[str]] = {}  # of each class, those that hold images; "" for the class's own folder
    for file in (file for file, label in zip(images.files, images.labels, strict=True) if label >= 0):
        top, *below, _ = Path(file).parts
        subfolders.setdefault(top, set()).add(below[0] if below else "")
    nested = [top for top, below in subfolders.items() if "" not in below]
    parts = [each for each in classes if each.casefold() in SET_PARTS]
    if len(nested) == len(subfolders) or len(parts) == len(classes):
        wrong = list(subfolders)
    else:
        wrong = [top for top in nested if top in parts]
    if not wrong:
        return
    found = [f"{top}/{each}".rstrip("/") for top in wrong for each in sorted(subfolders[top])]
    listed = ", ".join(found[:MAX_LISTED]) + (f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else "")
    raise ArchiveError(
        f"{folder} has images in {listed}: expected a folder for each class, and the images in these; name one "
        f"part of the set, as {folder / wrong[0]}, or, if they are the classes, say so: --classes "
        f"{' '.join(classes)}"
    )


def _decode_all(paths: list[str], decoding: Decoding) -> Iterator[NDArray[Any] | str]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), DECODE_CHUNK):
            yield from pool.map(decoding.read, paths[start : start + DECODE_CHUNK])


# Libraries


def _unpacked(source: str, datasets: Path, folder: Path, download: bool) -> Path:
    """The folder where the library has unpacked its archive, or unpacks it now."""
    if folder.is_dir():
        return folder.resolve()
    try:
        if source == "eurosat":
            EuroSAT(datasets, download=download)
        else:
            from torchgeo.datasets import RESISC45

            RESISC45(datasets, download=download, checksum=True)
    except ImportError as error:
        raise ArchiveError(
            f"{source} is not in {folder}, and fetching it needs torchgeo (pip install torchgeo); or give the folder "
            "with its class folders"
        ) from error
    except Exception as error:  # the libraries raise RuntimeError, URLError, errors of their own, and more
        hint = "" if download else "; --download fetches it"
        raise ArchiveError(f"{source} is not in {folder}{hint} ({' '.join(str(error).split())})") from error
    return folder.resolve()


def _digits(image_size: int, classes: list[str] | None) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    kept = _selected([str(digit) for digit in digits.target_names], classes, "digits")
    order = [int(i) for c in kept for i in np.flatnonzero(digits.target == int(c))]

    def images() -> Iterator[NDArray[np.uint8]]:
        for i in order:
            grey = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
            yield resized(grey[..., None].repeat(3, axis=-1), image_size)

    labels = [kept.index(str(digits.target[i])) for i in order]
    return Source("digits", kept, labels, [f"digit {i}" for i in order], ["digits", *kept], images)


# Made images


def _gratings_archive(N: int, C: int, image_size: int, classes: list[str] | None) -> Source:
    name = f"made:{N}x{C}"
    known = [f"{c:0{len(str(C - 1))}}" for c in range(C)]
    kept = _selected(known, classes, name)
    sizes = [len(range(int(each), N, C)) for each in kept]

    def images() -> Iterator[NDArray[np.uint8]]:
        for each, size in zip(kept, sizes, strict=True):
            yield from _gratings(int(each), C, size, image_size)

    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    return Source(name, kept, labels, [""] * len(labels), [name, *kept], images)


def _gratings(c: int, C: int, count: int, image_size: int) -> Iterator[NDArray[np.uint8]]:
    """The first `count` images of class c of C: noisy sinusoidal gratings of any phase, contrast and colour.

    The plane of orientation and log frequency is divided into a cell for each class, and an image lies anywhere in its
    class's cell. Orientations span a quarter turn, so that a mirrored image is of no other class. Image j does not
    depend on `count`. Below 16 pixels there is no room for many frequencies.
    """
    orientations = math.ceil(math.sqrt(C))
    frequencies = math.ceil(C / orientations)
    frequency, orientation = divmod(c, orientations)
    y, x = np.mgrid[:image_size, :image_size].astype(np.float32) * np.float32(2 * math.pi / image_size)
    for start in range(0, count, GRATINGS_CHUNK):
        generator = np.random.default_rng((c, start))
        size = min(GRATINGS_CHUNK, count - start)
        uniform = generator.random((GRATINGS_CHUNK, 7, 1, 1), np.float32)[:size]
        offsets, phase, strength, tint = np.split(uniform, (2, 3, 4), axis=1)
        angle = (orientation + offsets[:, 0]) / orientations * (math.pi / 2)
        cycles = 2 * (image_size / 8) ** ((frequency + offsets[:, 1]) / frequencies)  # 2 to image_size/4
        wave = np.sin(cycles * (np.cos(angle) * x + np.sin(angle) * y) + 2 * math.pi * phase[:, 0])
        images = generator.standard_normal((size, image_size, image_size, 3), np.float32)
        images *= 50
        images += (10 + 30 * strength) * wave[..., None]
        images += 80 + 96 * tint.reshape(size, 1, 1, 3)
        yield from images.clip(0, 255).astype(np.uint8)
