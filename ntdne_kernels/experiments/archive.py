"""Archives: images decoded once into one file, their classes, how they are split, and how they become tensors.

Shapes: N images of H × W pixels (H = W = image_size) in B bands, C classes.
Order: classes sorted by folder name, the files of a class sorted by name.
"""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import EuroSAT
from torchvision.transforms import v2
from tqdm import tqdm

from ntdne_kernels.experiments.images import MAX_PIXELS, PLUGINS, Unreadable, decode, resized, suffixes

CACHE_VERSION = 2  # to be raised whenever the same files would give other bytes
EIGHT_BITS = np.dtype(np.uint8)
DECODE_CHUNK = 256  # files handed to the threads at a time
MADE_CHUNK = 64  # made images drawn from one generator
SMALLEST_CLASS = 3  # images that a 70/10/20 split needs to have any for training and for testing
LIBRARIES = {"eurosat": ("EuroSAT", "eurosat/2750"), "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45")}
MADE = re.compile(r"made:(\d+)(?:x(\d+))?")
TECHNICAL = {  # folders that file servers, systems and tools make of copies; hidden ones begin with a dot
    *("@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__macosx", "__pycache__"),
}
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}  # of a set
JITTER = 0.4  # of contrast, brightness and colours, as in the authors' code
SHOWN = 4  # folders in a message
KNOWN_SOURCES = "expected a folder of class folders, or one of eurosat, resisc45, digits, made:N, made:NxC"


class ArchiveError(ValueError):
    """What is wrong with an archive, in one line for the person who named it."""


@dataclass(frozen=True)
class Archive:
    """Images in order, decoded to one size.

    Attributes:
        images: (N, H, W, B), mapped read-only from the cache file: uint8 where all files have 8 bits, uint16 in full
            range where they have up to 16, else float32; see `images.decode`. Pictures have B = 3, RGB.
        labels: (N,) int64 class of each image, 0..C−1.
        classes: C names.
        files: N file names relative to the archive's folder; "" for made images.
        name: what reports call the archive.
        skipped: unreadable files that were left out.
        left_out: how many files of the folder were not looked at, by their suffix.
    """

    images: np.memmap[Any, np.dtype[Any]]
    labels: Tensor
    classes: list[str]
    files: list[str]
    name: str
    skipped: list[str]
    left_out: dict[str, int]

    @property
    def notes(self) -> str:
        """What was left out, in one line; "" where nothing was."""
        if not self.left_out:
            return ""
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{n} {suffix}" + (f" (needs {PLUGINS[suffix]})" if suffix in PLUGINS else "") for suffix, n in counts]
        line = f"{self.name}: files that are no images by their suffix or place: {', '.join(kinds)}"
        return line.encode(errors="backslashreplace").decode()  # a name may be any bytes


@dataclass(frozen=True)
class _Source:
    """An archive yet to be decoded. `rows()` gives image i (H, W, B), or says why it cannot be read.

    `identity` tells apart sources whose images may differ, and `look` whether a file can be read now.
    """

    name: str
    classes: list[str]
    labels: list[int]
    files: list[str]
    identity: list[str]
    rows: Callable[[], Iterator[NDArray[Any] | str]]
    look: Callable[[str], NDArray[Any] | str] = lambda _: ""
    folder: Path = Path()
    left_out: dict[str, int] = field(default_factory=dict)


def open_archive(
    source: str,
    image_size: int,
    *,
    cache: Path | None = None,
    skip_unreadable: bool = False,
    download: bool = False,
    classes: list[str] | None = None,
    bands: Sequence[int] = (),
    max_pixels: int = MAX_PIXELS,
    smallest_class: int = SMALLEST_CLASS,
    nested: bool = False,
) -> Archive:
    """The archive that `source` names, with square images of image_size pixels a side.

    Files are decoded the first time, see `images.decode`, and resized whatever their aspect (bilinear, antialiased).
    The pixels are kept in the cache, under a name that follows from the files' names, sizes and times.

    A class has the images in its folder and in folders below. Hidden and technical folders are skipped, and each folder
    is visited once: a link to one that holds it, or that lies in the archive, leads nowhere new.

    Args:
        source: a folder of class folders; "eurosat" (torchvision) or "resisc45" (torchgeo); "digits" (scikit-learn's
            1,797 scans of 8×8 pixels); "made:N" or "made:NxC", N gratings in C = 10 classes, see `_gratings`. A folder
            that is called like one of these words is reached as "./digits".
        image_size: pixels.
        cache: folder of decoded images; ntdne_kernels in the user's cache folder by default.
        skip_unreadable: leave out files that are no images instead of raising.
        download: let torchvision or torchgeo fetch an archive that is not in cache/datasets, where they unpack it.
        classes: the names of the classes to keep; all by default.
        bands: of each file, counted from 1; all by default. See `images.decode`.
        max_pixels: of a file that is still read.
        smallest_class: images that each class must have, by default as many as a split needs.
        nested: the folders are the classes also where they look like the parts of a set, with the classes below; so
            they are where `classes` names them.

    Raises:
        ArchiveError: there is no such archive, a class in it has too few images to split, a file cannot be read, the
            files differ in their bands, there is another level of folders above the classes, or the cache cannot be
            written.
    """
    if image_size < 1:
        raise ArchiveError(f"image_size: expected 1 or more pixels, got {image_size}")
    cache = (cache or _user_cache()).expanduser()
    look = partial(_decode, image_size=image_size, bands=tuple(bands), max_pixels=max_pixels)
    found = _find(source, image_size, cache / "datasets", download, classes, look, nested)
    if bands and found.folder == Path():
        raise ArchiveError(f"bands: {found.name} is made of grey or RGB images; bands are chosen of files")
    _check_class_sizes(found, found.labels, smallest_class)
    path, reasons = _decoded_once(found, [image_size, *bands], cache)
    if reasons and not skip_unreadable:
        file, reason = next(iter(reasons.items()))
        others = f", and {len(reasons) - 1} more files" if len(reasons) > 1 else ""
        raise ArchiveError(
            f"{found.folder / file} cannot be read: {reason}{others}; --skip-unreadable leaves such files out"
        )
    kept = [i for i, file in enumerate(found.files) if file not in reasons]
    labels = [found.labels[i] for i in kept]
    _check_class_sizes(found, labels, smallest_class)
    return Archive(
        np.load(path, mmap_mode="r"),
        torch.tensor(labels),
        found.classes,
        [found.files[i] for i in kept],
        found.name,
        list(reasons),
        found.left_out,
    )


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ntdne_kernels"


def _check_class_sizes(source: _Source, labels: list[int], smallest: int) -> None:
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(source.classes))
    for name, count in zip(source.classes, counts, strict=True):
        if count < smallest:
            readable = "readable " if len(labels) < len(source.labels) else ""
            raise ArchiveError(
                f"class {name} of {source.name} has {count or 'no'} {readable}image{'' if count == 1 else 's'}; "
                f"a 70/10/20 split needs at least {SMALLEST_CLASS}"
            )


# Sources


def _find(
    source: str,
    image_size: int,
    root: Path,
    download: bool,
    classes: list[str] | None,
    look: Callable[[str], NDArray[Any] | str],
    nested: bool,
) -> _Source:
    if source == "digits":
        return _digits(image_size, classes)
    if source in LIBRARIES:
        name, subfolder = LIBRARIES[source]
        return _folder(_unpacked(source, root, root / subfolder, download), name, classes, look, nested)
    if match := MADE.fullmatch(source):
        return _made(int(match[1]), int(match[2] or 10), image_size, classes)
    folder = Path(source).expanduser().resolve()
    return _folder(folder, folder.name, classes, look, nested)


def _chosen(known: list[str], classes: list[str] | None, name: str) -> list[str]:
    """The known classes that are to be kept, in their order."""
    unknown = [wanted for wanted in classes or [] if wanted not in known]
    if unknown:
        raise ArchiveError(f"{name} has no class {', '.join(unknown)}; its classes are {', '.join(known)}")
    kept = [each for each in known if classes is None or each in classes]
    if len(kept) < 2:
        raise ArchiveError(f"{name}: expected at least 2 classes, got {'only ' + kept[0] if kept else 'none'}")
    return kept


def _folder(
    folder: Path, name: str, classes: list[str] | None, look: Callable[[str], NDArray[Any] | str], nested: bool
) -> _Source:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ArchiveError(f"{folder}: {error.strerror}; {KNOWN_SOURCES}") from None
    known = [
        entry.name
        for entry in entries
        if entry.is_dir() and not _technical(entry.name) and not folder.is_relative_to(os.path.realpath(entry.path))
    ]
    if not known:
        raise ArchiveError(f"{folder}: no class folders; {KNOWN_SOURCES}")
    kept = _chosen(known, classes, name)
    left_out = Counter(
        _suffix(entry.name) + (" outside the class folders" if _suffix(entry.name) in suffixes() else "")
        for entry in entries
        if not entry.is_dir() and not _technical(entry.name)
    )
    files, labels = [], []
    for label, found in enumerate(_files_of_classes(folder, kept)):
        images = [file for file in found if _suffix(file) in suffixes()]
        left_out.update(_suffix(file) for file in found if _suffix(file) not in suffixes())
        files += images
        labels += [label] * len(images)
    if files and classes is None and not nested:
        _check_levels(folder, kept, files)
    paths = [str(folder / file) for file in files]
    return _Source(
        name,
        kept,
        labels,
        files,
        [str(folder), *(json.dumps([file, *_size_and_time(path)]) for file, path in zip(files, paths, strict=True))],
        partial(_decode_all, paths, look),
        look,
        folder,
        dict(left_out),
    )


def _technical(name: str) -> bool:
    return name.startswith(".") or name.casefold() in TECHNICAL


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without a suffix"


def _files_of_classes(root: Path, classes: list[str]) -> list[list[str]]:
    """For each class its visible files at any depth, relative to the root, in the order of their names.

    Real folders come first, then what links lead to, and each once.
    """
    found: dict[str, list[str]] = {each: [] for each in classes}
    owners: dict[str, str] = {}  # of the real folders that were visited
    links: list[tuple[str, str]] = []

    def visit(top: str, owner: str) -> None:
        for at, folders, files in os.walk(top):
            real = os.path.realpath(at)
            if real in owners:
                if owners[real] != owner and (top == at or not Path(real).is_relative_to(root)):
                    raise ArchiveError(f"{root.name}: {real} is in two classes, {owners[real]} and {owner}, by a link")
                folders.clear()
                continue
            owners[real] = owner
            folders[:] = sorted(name for name in folders if not _technical(name))
            paths = [os.path.join(at, name) for name in folders]
            links.extend((path, owner) for path in paths if os.path.islink(path))
            found[owner] += [os.path.relpath(os.path.join(at, file), root) for file in files if not _technical(file)]

    for each in classes:
        visit(str(root / each), each)
    for link, owner in links:  # which grow on the way
        if not _leads_back(link, root):
            visit(link, owner)
    return [sorted(found[each], key=os.path.split) for each in classes]


def _leads_back(link: str, root: Path) -> bool:
    """Whether a link leads to a folder that holds it or the archive, or that the archive has under its own name."""
    real, holder = (Path(os.path.realpath(each)) for each in (link, os.path.dirname(link)))
    own = real.is_relative_to(root) and not any(map(_technical, real.relative_to(root).parts))
    return own or holder.is_relative_to(real) or root.is_relative_to(real)


def _check_levels(folder: Path, classes: list[str], files: list[str]) -> None:
    """ArchiveError where the folders are not the classes, but the parts of a set, say, with the classes below."""
    depths: dict[str, set[str]] = {}  # of each class, the folders below that hold its images
    for file in files:
        top, *below, _ = Path(file).parts
        depths.setdefault(top, set()).add(below[0] if below else "")
    nested = [top for top, below in depths.items() if "" not in below]
    parts = [each for each in classes if each.casefold() in PARTS]
    if len(nested) == len(depths) or len(parts) == len(classes):
        wrong = list(depths)
    else:
        wrong = [top for top in nested if top in parts]
    if not wrong:
        return
    seen = [f"{top}/{each}".rstrip("/") for top in wrong for each in sorted(depths[top])]
    shown = ", ".join(seen[:SHOWN]) + (f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else "")
    raise ArchiveError(
        f"{folder} has images in {shown}: expected a folder for each class, and the images in these; name one "
        f"part of the set, as {folder / wrong[0]}, or, if they are the classes, say so: --classes "
        f"{' '.join(classes)}"
    )


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing, which decoding will report
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _unpacked(word: str, root: Path, folder: Path, download: bool) -> Path:
    """The folder that the library has unpacked under root, or unpacks now."""
    if folder.is_dir():
        return folder.resolve()
    try:
        if word == "eurosat":
            EuroSAT(root, download=download)
        else:
            from torchgeo.datasets import RESISC45

            RESISC45(root, download=download, checksum=True)
    except ImportError as error:
        raise ArchiveError(
            f"{word} is not in {folder}, and fetching it needs torchgeo (pip install torchgeo); or give the folder "
            "with its class folders"
        ) from error
    except Exception as error:  # the libraries raise RuntimeError, URLError, errors of their own, and more
        hint = "" if download else "; --download fetches it"
        raise ArchiveError(f"{word} is not in {folder}{hint} ({' '.join(str(error).split())})") from error
    return folder.resolve()


def _digits(image_size: int, classes: list[str] | None) -> _Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    kept = _chosen([str(digit) for digit in digits.target_names], classes, "digits")
    order = [int(i) for c in kept for i in np.flatnonzero(digits.target == int(c))]

    def rows() -> Iterator[NDArray[np.uint8]]:
        for i in order:
            grey = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
            yield resized(grey[..., None].repeat(3, axis=-1), image_size)

    labels = [kept.index(str(digits.target[i])) for i in order]
    return _Source("digits", kept, labels, [f"digit {i}" for i in order], ["digits", *kept], rows)


def _made(N: int, C: int, image_size: int, classes: list[str] | None) -> _Source:
    known = [f"{c:0{len(str(C - 1))}}" for c in range(C)]
    kept = _chosen(known, classes, f"made:{N}x{C}")
    sizes = [len(range(int(each), N, C)) for each in kept]

    def rows() -> Iterator[NDArray[np.uint8]]:
        for each, size in zip(kept, sizes, strict=True):
            yield from _gratings(int(each), C, size, image_size)

    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    return _Source(f"made:{N}x{C}", kept, labels, [""] * len(labels), [f"made:{N}x{C}", *kept], rows)


def _gratings(c: int, C: int, count: int, image_size: int) -> Iterator[NDArray[np.uint8]]:
    """The first `count` images of class c of C: noisy sinusoidal gratings of any phase, contrast and colour.

    The classes share out the plane of orientation and log frequency among them, and an image lies anywhere in its
    class's cell. Orientations span a quarter turn, so that a mirrored image is of no other class. Image j does not
    depend on `count`. Below 16 pixels there is no room for many frequencies.
    """
    orientations = math.ceil(math.sqrt(C))
    frequencies = math.ceil(C / orientations)
    frequency, orientation = divmod(c, orientations)
    y, x = np.mgrid[:image_size, :image_size].astype(np.float32) * np.float32(2 * math.pi / image_size)
    for start in range(0, count, MADE_CHUNK):
        generator = np.random.default_rng((c, start))
        rows = min(MADE_CHUNK, count - start)
        uniform = generator.random((MADE_CHUNK, 7, 1, 1), np.float32)[:rows]
        wobble, phase, strength, tint = np.split(uniform, (2, 3, 4), axis=1)
        angle = (orientation + wobble[:, 0]) / orientations * (math.pi / 2)
        cycles = 2 * (image_size / 8) ** ((frequency + wobble[:, 1]) / frequencies)  # 2 to image_size/4
        wave = np.sin(cycles * (np.cos(angle) * x + np.sin(angle) * y) + 2 * math.pi * phase[:, 0])
        images = generator.standard_normal((rows, image_size, image_size, 3), np.float32)
        images *= 50
        images += (10 + 30 * strength) * wave[..., None]
        images += 80 + 96 * tint.reshape(rows, 1, 1, 3)
        yield from images.clip(0, 255).astype(np.uint8)


# Decoding


def _decode(path: str, image_size: int, bands: tuple[int, ...], max_pixels: int) -> NDArray[Any] | str:
    """The image (H, W, B), or why there is none."""
    try:
        return resized(decode(path, bands, max_pixels), image_size)
    except (Unreadable, OSError, MemoryError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _decode_all(paths: list[str], look: Callable[[str], NDArray[Any] | str]) -> Iterator[NDArray[Any] | str]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), DECODE_CHUNK):
            yield from pool.map(look, paths[start : start + DECODE_CHUNK])


def _decoded_once(source: _Source, how: list[int], cache: Path) -> tuple[Path, dict[str, str]]:
    """The .npy file with the readable images, and why each unreadable file is not in it; from the cache if possible."""
    key = hashlib.sha256(json.dumps([CACHE_VERSION, *how]).encode())
    for each in source.identity:
        key.update(b"\0" + os.fsencode(each))
    path = cache / f"{key.hexdigest()[:32]}.npy"

    def unreadable() -> dict[str, str]:
        reasons: dict[str, str] = json.loads(path.with_suffix(".json").read_text())["unreadable"]
        return reasons

    def usable() -> bool:
        # A file that could not be read may since have become readable without a change of its own, on a network say.
        return path.exists() and all(isinstance(source.look(str(source.folder / file)), str) for file in unreadable())

    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not usable():
            with FileLock(path.with_suffix(".lock")):  # another process may be decoding the same
                if not usable():
                    _write(source, path)
        return path, unreadable()
    except OSError as error:
        raise ArchiveError(
            f"decoded images cannot be kept in {cache}: {error.strerror or error}; --cache names another folder"
        ) from error


def _write(source: _Source, path: Path, depth: np.dtype[Any] = EIGHT_BITS) -> None:
    """Decode into `path` and its .json, so that `path` exists only when both are complete.

    All images get the depth of the first, or of `depth`; a deeper one makes it begin anew, as mixed archives are rare.
    """
    temporary = path.with_suffix(".tmp")
    unreadable: dict[str, str] = {}
    first, shape = "", (0, 0, 3)
    deeper: np.dtype[Any] | None = None
    path.unlink(missing_ok=True)  # one with other unreadable files
    try:
        with open(temporary, "wb") as file:  # no memory map, where a full disk would kill the process

            def write_header(N: int) -> None:
                of = {"descr": np.lib.format.dtype_to_descr(depth), "fortran_order": False, "shape": (N, *shape)}
                np.lib.format.write_array_header_1_0(file, of)

            progress = tqdm(source.rows(), f"Decoding {source.name}", len(source.files), unit="image", disable=None)
            for name, row in zip(source.files, progress, strict=True):
                if isinstance(row, str):
                    unreadable[name] = row
                    continue
                if file.tell() == 0:
                    first, shape, depth = name, row.shape, max(depth, row.dtype, key=lambda each: each.itemsize)
                    write_header(len(source.files))
                _check_alike(first, shape[-1], depth, name, row)
                if row.dtype.itemsize > depth.itemsize:
                    deeper = row.dtype
                    break
                file.write(_in_depth(row, depth).tobytes())
            file.seek(0)
            write_header(len(source.files) - len(unreadable))  # of the same length: NumPy leaves room for the count
        if deeper is not None:
            return _write(source, path, deeper)
        path.with_suffix(".json").write_text(json.dumps({"archive": source.name, "unreadable": unreadable}, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_alike(first: str, bands: int, depth: np.dtype[Any], name: str, row: NDArray[Any]) -> None:
    if row.shape[-1] != bands or (row.dtype.kind != depth.kind):
        raise ArchiveError(
            f"{name} has {row.shape[-1]} bands of {row.dtype}, and {first} {bands} of {depth}; expected the same bands "
            "in all images of an archive, of integers or of floats; --bands chooses some that all have"
        )


def _in_depth(image: NDArray[Any], depth: np.dtype[Any]) -> NDArray[Any]:
    return image if image.dtype == depth else image.astype(depth) * 257  # 255 becomes 65535


# Splits


class Split(NamedTuple):
    """Images of each part: int64 positions in the archive, class by class, in shuffled order within a class."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(labels: Tensor, how: str, seed: int) -> Split:
    """70/10/20 percent of each class for training, validation and testing.

    Args:
        labels: (N,) class of each image, in the archive's order.
        how: "seeded" shuffles each class by the seed. "authors" repeats the split of the paper's code: each class is
            shuffled by Python's generator, seeded with 42 anew; `seed` is not used.
        seed: 0 or more.

    Raises:
        ValueError: another `how`, or a class has fewer than 3 images.
    """
    if how not in ("seeded", "authors"):
        raise ValueError(f"how: expected 'seeded' or 'authors', got {how!r}")
    generator = np.random.default_rng(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for c in labels.unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        n = len(members)
        if n < SMALLEST_CLASS:
            raise ValueError(f"labels: expected at least {SMALLEST_CLASS} images in each class, got {n} in class {c}")
        order = list(range(n))
        if how == "authors":
            random.Random(42).shuffle(order)
        else:
            generator.shuffle(order)
        shuffled = members[order]
        cuts = int(0.7 * n), int(0.8 * n)  # as the authors' code has them: int(0.7 * 700) is 489
        for part, piece in zip(parts, shuffled.tensor_split(cuts), strict=True):
            part.append(piece)
    return Split(*map(torch.cat, parts))


# Samples


@dataclass(frozen=True)
class Normalisation:
    """What is taken off the bands of an image, and what they are then divided by: B numbers each.

    Integers count as shares of the largest one of their type, floats as they are.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    floats: bool = False


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation(archive: Archive, index: Tensor, bands: Sequence[int] = ()) -> Normalisation:
    """ImageNet's, for colours of 8 bits; of all else, that which standardises each band over some images.

    Args:
        archive: where the images are.
        index: (n,) those to standardise over, the training images.
        bands: that were chosen of the files; they may be other ones than red, green and blue.
    """
    images = archive.images
    B = images.shape[-1]
    if images.dtype == np.uint8 and B == 3 and not bands:
        return IMAGENET
    largest = np.iinfo(images.dtype).max if images.dtype.kind == "u" else 1
    # Of differences to the first image: squares of large values would leave nothing of a small deviation.
    offset = images[int(index[0])].reshape(-1, B).mean(axis=0, dtype=np.float64) if len(index) else np.zeros(B)
    total, squares, count = np.zeros(B), np.zeros(B), 0
    for chunk in index.sort().values.split(DECODE_CHUNK):
        values = images[chunk.numpy()].reshape(-1, B) - offset
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        count += len(values)
    mean = total / max(count, 1)
    deviation = np.sqrt(squares / max(count, 1) - mean**2)
    deviation = np.where(deviation > 0, deviation, largest)  # of a band that is the same everywhere
    return Normalisation(
        tuple(map(float, (mean + offset) / largest)),
        tuple(map(float, deviation / largest)),
        images.dtype.kind == "f",
    )


def transform(augment: bool, normalisation: Normalisation = IMAGENET) -> v2.Compose:
    """From an image (H, W, B) of an archive to (B, H, W) float32, normalised.

    Colours of 8 bits are augmented as in the authors' code: grey, colour jitter, mirrored. That is done on Pillow
    images, as there, which on a CPU is also faster than on tensors. Other bands, which may have no hue, get another
    contrast and brightness, and are mirrored.
    """
    colours = [
        Image.fromarray,
        v2.RandomGrayscale(p=0.2),
        v2.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER, hue=JITTER),
        v2.RandomHorizontalFlip(),
        np.array,
    ]
    of_colours = normalisation == IMAGENET
    return v2.Compose(
        [
            *(colours if augment and of_colours else []),
            v2.ToImage(),
            v2.ToPureTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=normalisation.mean, std=normalisation.deviation),
            *([_jittered, v2.RandomHorizontalFlip()] if augment and not of_colours else []),
        ]
    )


def _jittered(image: Tensor) -> Tensor:
    """Another contrast and brightness, of all bands (B, H, W) alike."""
    contrast, brightness = torch.empty(2).uniform_(-JITTER, JITTER)
    mean = image.mean(dim=(1, 2), keepdim=True)
    jittered: Tensor = mean + (1 + contrast) * (image - mean) + brightness
    return jittered


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Some images of an archive: samples (image (B, H, W), label, position), the position counted in this dataset.

    Workers of a DataLoader share the archive's file, however they are started.

    Args:
        archive: where the images are.
        index: (n,) images of the archive, in the order of the dataset.
        labels: (n,) label of each of these.
        transform: from an image (H, W, B) to (B, H, W), see `transform`.
        seed: of what the transform draws: with its position it decides on a sample, whichever process makes it. None
            leaves that to PyTorch's generator.

    Raises:
        ValueError: index and labels differ in length, or an image is not in the archive.
    """

    def __init__(
        self,
        archive: Archive,
        index: Tensor,
        labels: Tensor,
        transform: Callable[[NDArray[Any]], Tensor],
        seed: int | None = None,
    ) -> None:
        if index.shape != labels.shape or index.dim() != 1:
            raise ValueError(
                f"labels: expected one for each image of the index, got shapes {tuple(labels.shape)} and "
                f"{tuple(index.shape)}"
            )
        N = len(archive.images)
        outside = index[(index < 0) | (index >= N)]
        if len(outside):
            raise ValueError(f"index: expected images of the archive, 0 to {N - 1}, got {int(outside[0])}")
        self.images = archive.images
        self.index = index
        self.labels = labels
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        position = range(len(self))[position]
        image = np.array(self.images[int(self.index[position])])
        if self.seed is not None:
            # Mixed, because PyTorch's generator takes but 32 bits of a seed.
            mixed = np.random.SeedSequence([self.seed, position]).generate_state(1)
            torch.default_generator.manual_seed(int(mixed[0]))
        return self.transform(image), int(self.labels[position]), position

    # A memory map would be pickled as its bytes.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": self.images.filename}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"images": np.load(state["images"], mmap_mode="r")}
