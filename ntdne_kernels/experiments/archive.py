"""Archives: images decoded once into a file of bytes, their classes, how they are split, and how they become tensors.

Shapes: N images of H × W pixels (H = W = image_size), C classes, B images of a batch.
Order: classes sorted by folder name, the files of a class sorted by name.
"""

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import EuroSAT
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2
from tqdm import tqdm

CACHE_VERSION = 1  # to be raised whenever the same files would give other bytes
DECODE_CHUNK = 256  # files handed to the threads at a time
MADE_CHUNK = 64  # made images drawn from one generator
SMALLEST_CLASS = 3  # images that a 70/10/20 split needs to have any for training and for testing
LIBRARIES = {"eurosat": ("EuroSAT", "eurosat/2750"), "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45")}
MADE = re.compile(r"made:(\d+)(?:x(\d+))?")
KNOWN_SOURCES = "expected a folder of class folders, or one of eurosat, resisc45, digits, made:N, made:NxC"


class ArchiveError(ValueError):
    """What is wrong with an archive, in one line for the person who named it."""


@dataclass(frozen=True)
class Archive:
    """Images in order, decoded to one size.

    Attributes:
        images: (N, H, W, 3) uint8, RGB, mapped read-only from the cache file.
        labels: (N,) int64 class of each image, 0..C−1.
        classes: C names.
        files: N file names relative to the archive's folder; "" for made images.
        name: what reports call the archive.
        skipped: unreadable files that were left out.
    """

    images: np.memmap[Any, np.dtype[np.uint8]]
    labels: Tensor
    classes: list[str]
    files: list[str]
    name: str
    skipped: list[str]


@dataclass(frozen=True)
class _Source:
    """An archive yet to be decoded. `rows()` gives image i (H, W, 3), or says why it cannot be read.

    `identity` tells apart sources whose images may differ.
    """

    name: str
    classes: list[str]
    labels: list[int]
    files: list[str]
    identity: list[str]
    rows: Callable[[], Iterator[NDArray[np.uint8] | str]]
    folder: Path = Path()


def open_archive(
    source: str,
    image_size: int,
    *,
    cache: Path | None = None,
    skip_unreadable: bool = False,
    download: bool = False,
    classes: list[str] | None = None,
    smallest_class: int = SMALLEST_CLASS,
) -> Archive:
    """The archive that `source` names, with square images of image_size pixels a side.

    Files are decoded the first time: converted to RGB and resized whatever their aspect (bilinear, antialiased). The
    bytes are kept in the cache, under a name that follows from the files' names, sizes and times.

    Args:
        source: a folder of class folders; "eurosat" (torchvision) or "resisc45" (torchgeo); "digits" (scikit-learn's
            1,797 scans of 8×8 pixels); "made:N" or "made:NxC", N gratings in C = 10 classes, see `_gratings`. A folder
            that is called like one of these words is reached as "./digits".
        image_size: pixels.
        cache: folder of decoded images; ntdne_kernels in the user's cache folder by default.
        skip_unreadable: leave out files that are no images instead of raising.
        download: let torchvision or torchgeo fetch an archive that is not in cache/datasets, where they unpack it.
        classes: the names of the classes to keep; all by default.
        smallest_class: images that each class must have, by default as many as a split needs.

    Raises:
        ArchiveError: there is no such archive, a class in it has too few images to split, a file cannot be read, or the
            cache cannot be written.
    """
    if image_size < 1:
        raise ArchiveError(f"image_size: expected 1 or more pixels, got {image_size}")
    cache = (cache or _user_cache()).expanduser()
    found = _find(source, image_size, cache / "datasets", download, classes)
    _check_class_sizes(found, found.labels, smallest_class)
    path, reasons = _decoded_once(found, image_size, cache)
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


def _find(source: str, image_size: int, root: Path, download: bool, classes: list[str] | None) -> _Source:
    if source == "digits":
        return _digits(image_size, classes)
    if source in LIBRARIES:
        name, subfolder = LIBRARIES[source]
        return _folder(_unpacked(source, root, root / subfolder, download), name, image_size, classes)
    if match := MADE.fullmatch(source):
        return _made(int(match[1]), int(match[2] or 10), image_size, classes)
    folder = Path(source).expanduser().resolve()
    return _folder(folder, folder.name, image_size, classes)


def _chosen(known: list[str], classes: list[str] | None, name: str) -> list[str]:
    """The known classes that are to be kept, in their order."""
    unknown = [wanted for wanted in classes or [] if wanted not in known]
    if unknown:
        raise ArchiveError(f"{name} has no class {', '.join(unknown)}; its classes are {', '.join(known)}")
    kept = [each for each in known if classes is None or each in classes]
    if len(kept) < 2:
        raise ArchiveError(f"{name}: expected at least 2 classes, got {'only ' + kept[0] if kept else 'none'}")
    return kept


def _folder(folder: Path, name: str, image_size: int, classes: list[str] | None) -> _Source:
    try:
        known = [each for each in find_classes(folder)[0] if not each.startswith(".")]
    except OSError as error:
        raise ArchiveError(f"{folder}: {error.strerror or 'no class folders'}; {KNOWN_SOURCES}") from None
    kept = _chosen(known, classes, name)
    samples = make_dataset(folder, {each: c for c, each in enumerate(kept)}, IMG_EXTENSIONS, allow_empty=True)
    paths = [path for path, _ in samples]
    files = [os.path.relpath(path, folder) for path in paths]
    return _Source(
        name,
        kept,
        [label for _, label in samples],
        files,
        [str(folder), *(json.dumps([file, *_size_and_time(path)]) for file, path in zip(files, paths, strict=True))],
        partial(_decode_all, paths, image_size),
        folder,
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
            yield _resized(Image.fromarray(np.round(digits.images[i] * (255 / 16)).astype(np.uint8)), image_size)

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


def _resized(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR))


def _decode(path: str, image_size: int) -> NDArray[np.uint8] | str:
    """The image (H, W, 3), or why there is none."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # which Pillow would cut off at 255
                return f"pixels of more than 8 bits (Pillow's mode {image.mode})"
            return _resized(image, image_size)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, and more
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _decode_all(paths: list[str], image_size: int) -> Iterator[NDArray[np.uint8] | str]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), DECODE_CHUNK):
            yield from pool.map(partial(_decode, image_size=image_size), paths[start : start + DECODE_CHUNK])


def _decoded_once(source: _Source, image_size: int, cache: Path) -> tuple[Path, dict[str, str]]:
    """The .npy file with the readable images, and why each unreadable file is not in it; from the cache if possible."""
    key = hashlib.sha256(json.dumps([CACHE_VERSION, image_size]).encode())
    for each in source.identity:
        key.update(b"\0" + os.fsencode(each))
    path = cache / f"{key.hexdigest()[:32]}.npy"

    def unreadable() -> dict[str, str]:
        reasons: dict[str, str] = json.loads(path.with_suffix(".json").read_text())["unreadable"]
        return reasons

    def usable() -> bool:
        # A file that could not be read may since have become readable without a change of its own, on a network say.
        return path.exists() and all(
            isinstance(_decode(str(source.folder / file), image_size), str) for file in unreadable()
        )

    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not usable():
            with FileLock(path.with_suffix(".lock")):  # another process may be decoding the same
                if not usable():
                    _write(source, image_size, path)
        return path, unreadable()
    except OSError as error:
        raise ArchiveError(
            f"decoded images cannot be kept in {cache}: {error.strerror or error}; --cache names another folder"
        ) from error


def _write(source: _Source, image_size: int, path: Path) -> None:
    """Decode into `path` and its .json, so that `path` exists only when both are complete."""
    temporary = path.with_suffix(".tmp")
    unreadable: dict[str, str] = {}
    path.unlink(missing_ok=True)  # one with other unreadable files
    try:
        with open(temporary, "wb") as file:  # no memory map, where a full disk would kill the process

            def write_header() -> None:
                shape = (len(source.files) - len(unreadable), image_size, image_size, 3)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

            write_header()
            progress = tqdm(source.rows(), f"Decoding {source.name}", len(source.files), unit="image", disable=None)
            for name, row in zip(source.files, progress, strict=True):
                if isinstance(row, str):
                    unreadable[name] = row
                else:
                    file.write(row.tobytes())
            file.seek(0)
            write_header()  # of the same length: NumPy leaves room for the count to change
        path.with_suffix(".json").write_text(
            json.dumps({"archive": source.name, "image_size": image_size, "unreadable": unreadable}, indent=1)
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def transform(augment: bool) -> v2.Compose:
    """From an image (H, W, 3) uint8 to (3, H, W) float32, normalised by ImageNet's channel means and deviations.

    Augmented as in the authors' code: grey, colour jitter, mirrored. That is done on Pillow images, as there, which on
    a CPU is also faster than on tensors.
    """
    augmentations = [
        Image.fromarray,
        v2.RandomGrayscale(p=0.2),
        v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
        v2.RandomHorizontalFlip(),
        np.array,
    ]
    return v2.Compose(
        [
            *(augmentations if augment else []),
            v2.ToImage(),
            v2.ToPureTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Some images of an archive: samples (image (3, H, W), label, position), the position counted in this dataset.

    Workers of a DataLoader share the archive's file, however they are started.

    Args:
        archive: where the images are.
        index: (n,) images of the archive, in the order of the dataset.
        labels: (n,) label of each of these.
        transform: from an image (H, W, 3) uint8 to (3, H, W), see `transform`.
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
        transform: Callable[[NDArray[np.uint8]], Tensor],
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
