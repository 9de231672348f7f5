"""Features of a folder of images by a pretrained network, written as they are made: `ntdne embed`.

What it leaves in a folder:

    features.npy   (N, F), the rows in the order of files.txt
    labels.npy     (N,) the images' class folders as text, "" for images beside them
    files.txt      N file names relative to the folder of images, one a line
    stamps.npy     (N, 2) their sizes and times, by which `embedded.check_images` tells whether they have changed
    embed.json     encoder, weights, transform, archive and versions; and how many rows are safely on the disk

Rows are appended to features.npy.partial, which gets its name when all else is there. So a run may be killed at any
moment, and goes on where it was.

Shapes: N images, b of a batch, of S × S pixels; F features.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ntdne_kernels
from ntdne_kernels.arguments import check_choice
from ntdne_kernels.experiments.embedded import (
    ABOUT,
    FEATURES,
    FILES,
    FORMAT,
    LABELS,
    PARTIAL,
    STAMPS,
    check_finished,
    check_images,
    read_about,
    read_files,
)
from ntdne_kernels.experiments.files import check_folder, locked, write_whole
from ntdne_kernels.experiments.images import MAX_PIXELS, decode
from ntdne_kernels.experiments.pretrained import DEFAULT, Extractor, make_extractor
from ntdne_kernels.experiments.sources import (
    UNREADABLE,
    ArchiveError,
    ImageFiles,
    image_files,
    left_out_notes,
    reason_of,
)
from ntdne_kernels.progress import with_progress
from ntdne_kernels.user_warning import warn_user

DTYPES = ("float16", "float32")
SAVE_SECONDS = 10  # between the moments when rows are brought to the disk and counted
MAX_WORKERS = 8
# What rows depend on: those of a folder are continued only where all of it is the same.
IDENTITY = (
    *("encoder", "weights_sha256", "image_size", "transform", "bands", "white", "dtype", "max_pixels"),
    "archive_sha256",
)
SAMPLED = 16  # images, over all the archive, that are looked at before
DARK = 0.25  # of white: where hardly a pixel of an image of more than 8 bits is brighter, it was stored in other units


@dataclass(frozen=True)
class Embeddings:
    """What `embed` wrote.

    Attributes:
        features: (N, F) float16 or float32, mapped into memory.
        labels: (N,) names of classes as text, "" for none.
        files: N file names relative to the folder of images.
        about: what embed.json says.
        folder: of these files.
    """

    features: NDArray[Any]
    labels: NDArray[np.str_]
    files: list[str]
    about: dict[str, Any]
    folder: Path


def embed(  # noqa: PLR0913 (independent settings, all but two with defaults)
    photos: str | Path,
    encoder: str,
    output: str | Path | None = None,
    *,
    weights: str | Path = DEFAULT,
    image_size: int | None = None,
    bands: Sequence[int] = (),
    white: float | None = None,
    classes: list[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    dtype: str = "float16",
    device: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Embeddings:
    """Write the features of all images of a folder, or what is missing of them.

    Memory does not grow with N, but for the names of the files. Continued with the same batch size, a run that was
    killed gives the same bits as one that was not.

        found = embed("photos", "efficientnet-lite0", image_size=160)
        audit = audit_labels(found.features, found.labels)

    Args:
        photos: folder of class folders, of images, or of both.
        encoder: see `pretrained.make_extractor`.
        output: folder for the files; None: embeddings/NAME of the photos.
        weights: see `pretrained.make_extractor`.
        image_size: S; see `pretrained.make_extractor`.
        bands: three of each file, counted from 1; () for the colours of pictures. See `images.decode`.
        white: the stored value that becomes white in files of more than 8 bits, as 10000; larger ones do too. None: the
            largest of their bits, and a warning where that makes images nearly black. See `images.decode`.
        classes: class folders to keep; None: all, and the images beside them.
        max_pixels: files of more pixels count as unreadable.
        skip_unreadable: leave out files that cannot be read, instead of raising.
        batch_size: b.
        dtype: of the file, "float16" or "float32".
        device: where the encoder runs; None: a GPU where there is one.
        workers: processes that decode; None: up to 8, one for each core beside a GPU, for four cores beside a CPU,
            which has the encoder to run as well.
        progress: show it on standard error, and which files are no images by their suffix or place.

    Raises:
        ValueError: there are no such images, encoder or weights; a file cannot be read; a feature is not finite in the
            dtype; the folder holds features of other images or by another encoder; or another process writes there.
        OSError: a file cannot be written.
    """
    check_choice("dtype", dtype, DTYPES)
    if white is not None and not 0 < white < math.inf:
        raise ValueError(f"white: expected a positive number, got {white}")
    images = image_files(photos, classes)
    broken = next((file for file in images.files if "\n" in file), None)
    if broken is not None:
        raise ArchiveError(f"{images.folder / broken!r}: expected names without line breaks, as {FILES} has one a line")
    if progress and images.left_out:
        print(left_out_notes(images.folder.name, images.left_out), file=sys.stderr)
    output = Path("embeddings", images.folder.name) if output is None else Path(output)
    check_folder(output, images.folder)
    extractor = make_extractor(encoder, weights, image_size)
    about = {
        "format": FORMAT,
        "encoder": encoder,
        "weights": DEFAULT if str(weights) == DEFAULT else str(Path(weights).resolve()),
        "weights_sha256": extractor.fingerprint(),
        "image_size": extractor.image_size,
        "transform": str(extractor.transform),
        "bands": list(bands),
        "white": white,
        "max_pixels": max_pixels,
        "dtype": dtype,
        "values": extractor.F,
        "folder": str(images.folder),
        "classes": classes,
        "images": len(images.files),
        "archive_sha256": hashlib.sha256("\0".join(images.versions()).encode()).hexdigest(),
        "versions": {module.__name__: module.__version__ for module in (ntdne_kernels, torch, torchvision, PIL)},
    }
    with locked(output), _Rows(output, about) as rows:
        if not rows.complete:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            paths = images.paths()
            if white is None:
                _warn_if_dark(paths[:: math.ceil(len(paths) / SAMPLED)], bands, max_pixels)
            batches = Batches(extractor, paths[rows.seen :], bands, white, max_pixels, batch_size, device, workers)
            for features, reasons in with_progress(batches, "Encoding images") if progress else batches:
                files = images.files[rows.seen : rows.seen + len(reasons)]
                unreadable = {file: reason for file, reason in zip(files, reasons, strict=True) if reason}
                if unreadable and not skip_unreadable:
                    file, reason = next(iter(unreadable.items()))
                    raise ArchiveError(
                        f"{images.folder / file} cannot be read: {reason}; --skip-unreadable leaves such files out"
                    )
                rows.append(features, len(files), unreadable)
            rows.finish(images)
    return _opened(output)


def open_embeddings(folder: str | Path) -> Embeddings:
    """The features in a folder that `embed` wrote.

    Raises:
        ValueError: it wrote none there, has not come to an end, or images have changed since, see `check_images`.
    """
    found = _opened(Path(folder))
    check_images([found.folder / FEATURES])
    return found


def _opened(folder: Path) -> Embeddings:
    about = read_about(folder)
    if about is None:
        raise ValueError(f"{folder}: expected a folder of ntdne embed, but there is no {ABOUT}")
    check_finished(folder)
    features, labels, files = np.load(folder / FEATURES, mmap_mode="r"), np.load(folder / LABELS), read_files(folder)
    if not len(features) == len(labels) == len(files):
        raise ValueError(
            f"{folder}: expected as many features as labels and files, got {len(features)}, {len(labels)} and "
            f"{len(files)}"
        )
    return Embeddings(features, labels, files, about, folder)


class Batches:
    """The features of image files, batch by batch: (n, F) float32 of the n files that can be read, and b reasons.

    The reason is "" for a file that was read.

    Args:
        extractor: makes the features.
        paths: of the files.
        bands: see `embed`.
        white: see `embed`.
        max_pixels: see `embed`.
        batch_size: b.
        device: where the encoder runs.
        workers: see `embed`.
    """

    def __init__(
        self,
        extractor: Extractor,
        paths: Sequence[str],
        bands: Sequence[int] = (),
        white: float | None = None,
        max_pixels: int = MAX_PIXELS,
        batch_size: int = 64,
        device: str = "cpu",
        workers: int | None = None,
    ) -> None:
        self.extractor, self.device = extractor, torch.device(device)
        if workers is None:
            cores = len(os.sched_getaffinity(0))
            workers = min(MAX_WORKERS, cores if self.device.type != "cpu" else cores // 4)
        self.loader = DataLoader(
            _Images(paths, extractor, tuple(bands), white, max_pixels),
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the workers' seeds would move the caller's
        )

    def __len__(self) -> int:
        return len(self.loader)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        module = self.extractor.module.to(self.device)
        for pixels, reasons in self.loader:
            if len(pixels):
                pixels = pixels.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield module(pixels).float().cpu(), reasons
            else:
                yield torch.empty(0, self.extractor.F), reasons


class _Images(Dataset[Tensor | str]):
    """Image files as the encoder takes them; for one that cannot be read the reason."""

    def __init__(
        self, paths: Sequence[str], extractor: Extractor, bands: tuple[int, ...], white: float | None, max_pixels: int
    ) -> None:
        self.paths, self.bands, self.white, self.max_pixels = paths, bands, white, max_pixels
        self.transform, self.smallest = extractor.transform, 2 * extractor.image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, image: int) -> Tensor | str:
        try:
            # A large JPEG is decoded at a fraction of its size that is still large beside what the encoder sees.
            return self.transform(decode(self.paths[image], self.bands, self.max_pixels, self.smallest, self.white))
        except (*UNREADABLE, ValueError) as error:  # the latter: bands that the encoder does not take
            return reason_of(error)


def _warn_if_dark(paths: Sequence[str], bands: Sequence[int], max_pixels: int) -> None:
    """Warn where these images are of 16 bits, of which they use a small part, as reflectance of 0 to 10,000 does."""
    bright: dict[str, float] = {}  # 99 of 100 values of each image are darker, as a share of white
    for path in paths:
        with suppress(*UNREADABLE):
            pixels = decode(path, bands, max_pixels, smallest=1)
            if pixels.dtype == np.uint16 and pixels.shape[-1] == 3 and pixels.any():
                bright[path] = float(np.percentile(pixels, 99)) / 65535
    if bright and (usual := float(np.median(list(bright.values())))) < DARK:
        # Of a file of 12 bits, say, decoding gives 16; with this white it gives what is stored.
        largest = max(int(decode(path, bands, max_pixels, white=65535).max()) for path in bright)
        warn_user(
            f"images of more than 8 bits are nearly black as they are stored: in {len(bright)} of them, spread over "
            f"the folder, the largest value is {largest}, and 99 of 100 are below {usual:.0%} of white, which is the "
            "largest that their bits hold; --white 10000, or embed(..., white=10000), says which stored value is white"
        )


def _collate(items: list[Tensor | str]) -> tuple[Tensor, list[str]]:
    pixels = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(pixels) if pixels else torch.empty(0), [item if isinstance(item, str) else "" for item in items]


class _Rows:
    """The rows in a folder, of which those that embed.json counts are safely on the disk.

    A file and not a memory map: there a full disk would kill the process.

    Args:
        folder: of the files; made where it is missing.
        about: what embed.json says, without how far it has come.

    Raises:
        ValueError: the folder holds features of others.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.dtype = np.dtype(about["dtype"])
        self.path = folder / PARTIAL
        found = read_about(folder)
        if found is None and (folder / FEATURES).exists():
            raise ValueError(f"--output: {folder} holds a {FEATURES} of something else; give another folder")
        if found is not None:
            _check_same(folder, found, about)
        self.progress: dict[str, Any] = (found or {"progress": {"seen": 0, "rows": 0, "unreadable": {}}})["progress"]
        self.complete = found is not None and (folder / FEATURES).exists()

    @property
    def seen(self) -> int:
        """Images that are done."""
        return int(self.progress["seen"])

    def __enter__(self) -> Self:
        if self.complete:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._write_header(self.about["images"])
        end = self.file.tell() + self.progress["rows"] * self.about["values"] * self.dtype.itemsize
        if os.fstat(self.file.fileno()).st_size < end:
            raise ValueError(f"{self.path} lacks rows that {ABOUT} counts; remove both to start anew")
        self.file.truncate(end)  # what was written and not counted
        self.file.seek(end)
        self._save()
        self.saved = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.complete:
            try:
                self._save()
            finally:
                self.file.close()

    def append(self, features: Tensor, seen: int, unreadable: dict[str, str]) -> None:
        """Add rows (n, F) of the next `seen` images, those of unreadable ones left out.

        Raises:
            ValueError: a feature is not finite in the file's dtype.
        """
        with np.errstate(over="ignore"):
            values = features.numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            cure = "; --dtype float32 has room for large ones" if features.isfinite().all() else ""
            raise ValueError(f"encoder: {self.about['encoder']} gives features that are no finite {self.dtype}{cure}")
        self.file.write(values.tobytes())
        self.progress["seen"] += seen
        self.progress["rows"] += len(values)
        self.progress["unreadable"] |= unreadable
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self._save()
            self.saved = time.monotonic()

    def finish(self, images: ImageFiles) -> None:
        """Write the other files, and give the rows their name."""
        unreadable = self.progress["unreadable"]
        kept = [
            (file, label) for file, label in zip(images.files, images.labels, strict=True) if file not in unreadable
        ]
        if not kept:
            raise ArchiveError(f"{images.folder}: none of {len(images.files)} images can be read")
        labels = np.array([images.classes[label] if label >= 0 else "" for _, label in kept])
        write_whole(self.folder / LABELS, lambda file: np.save(file, labels))
        rows = [file not in unreadable for file in images.files]
        write_whole(self.folder / STAMPS, lambda file: np.save(file, images.stamps[rows]))
        write_whole(self.folder / FILES, lambda file: file.writelines(os.fsencode(f"{name}\n") for name, _ in kept))
        self._write_header(len(kept))  # as long as the first: NumPy leaves room for the count
        self._save()
        self.path.replace(self.folder / FEATURES)
        self.complete = True
        self.file.close()

    def _write_header(self, N: int) -> None:
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (N, self.about["values"])}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.flush()

    def _save(self) -> None:
        """Bring the rows to the disk, then count them."""
        self.file.flush()
        os.fsync(self.file.fileno())
        text = json.dumps(self.about | {"progress": self.progress}, indent=1) + "\n"
        write_whole(self.folder / ABOUT, lambda file: file.write(text.encode()))


def _check_same(folder: Path, found: dict[str, Any], about: dict[str, Any]) -> None:
    """ValueError where the rows in a folder are of other images, or made otherwise."""
    if found.get("archive_sha256") != about["archive_sha256"] and found.get("folder") != about["folder"]:
        raise ValueError(
            f"--output: {folder} holds features of {found.get('folder')}, not of {about['folder']}; give another folder"
        )
    name = next((name for name in IDENTITY if found.get(name) != about[name]), None)
    if name == "archive_sha256":
        raise ValueError(
            f"{about['folder']} is not as it was when {folder} was begun, with {found['images']} images, now "
            f"{about['images']}: files were added, removed or written; give another --output, or remove {folder}"
        )
    if name is not None:
        raise ValueError(
            f"--output: {folder} holds features of {name} {found.get(name)}, not {about[name]}; give another folder"
        )
