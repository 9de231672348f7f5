"""Archives: images of one size in one file, or features of images, and their classes.

Shapes: N images of H × W pixels (H = W = image_size) in B bands, or N rows of F features; C classes.
Order: classes sorted by folder name, the files of a class sorted by name.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.experiments.columns import column_names, has_column, has_names, read_values
from ntdne_kernels.experiments.embedded import check_images
from ntdne_kernels.experiments.features import COLUMNS, as_utf8, read_features
from ntdne_kernels.experiments.image_cache import decoded_images
from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.sources import ArchiveError, Decoding, find_source, left_out_notes
from ntdne_kernels.experiments.splits import SMALLEST_CLASS
from ntdne_kernels.labels import encode_labels


@dataclass(frozen=True)
class Archive:
    """Images in order, decoded to one size, or their features.

    Attributes:
        images: (N, H, W, B), mapped read-only from the cache file: uint8 where all files have 8 bits, uint16 in full
            range where they have up to 16, else float32; see `images.decode`. Pictures have B = 3, RGB. Or features
            (N, F) of any float dtype, mapped where their file allows it.
        labels: (N,) int64 class of each image, 0..C−1; −1 for those without one.
        classes: C names.
        files: N file names relative to the archive's folder; "" for made images; none for features without names.
        name: what reports call the archive.
        skipped: unreadable files that were left out.
        left_out: how many files of the folder are no images, by their suffix.
    """

    images: Any
    labels: Tensor
    classes: list[str]
    files: list[str]
    name: str
    skipped: list[str]
    left_out: dict[str, int]

    @property
    def of_features(self) -> bool:
        """Whether it holds features instead of images."""
        return bool(self.images.ndim == 2)

    @property
    def notes(self) -> str:
        """What was left out, in one line; "" where nothing was."""
        if unlabelled := int((self.labels < 0).sum()):
            return f"{self.name}: {unlabelled} of {len(self.labels)} images have no label of these and are left out"
        return left_out_notes(self.name, self.left_out)


def open_archive(  # noqa: PLR0913 (independent settings, all but two with defaults)
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

    A class has the images in its folder and in folders below. Hidden and technical folders are skipped. Each folder is
    visited once: links to a folder that holds them, or into the archive, are not followed.

    Args:
        source: a folder of class folders; "eurosat" (torchvision) or "resisc45" (torchgeo); "digits" (scikit-learn's
            1,797 scans of 8×8 pixels); "made:N" or "made:NxC", N noisy gratings in C = 10 classes. A folder that is
            called like one of these words is reached as "./digits".
        image_size: pixels.
        cache: folder of decoded images; ntdne_kernels in the user's cache folder by default.
        skip_unreadable: leave out files that are no images instead of raising.
        download: let torchvision or torchgeo fetch an archive that is not in cache/datasets, where they unpack it.
        classes: the names of the classes to keep; all by default.
        bands: of each file, counted from 1; all by default. See `images.decode`.
        max_pixels: files of more pixels count as unreadable.
        smallest_class: images that each class must have, by default as many as a split needs.
        nested: take the folders for the classes also where they look like the parts of a set ("train", "val") with the
            classes below. Naming `classes` does the same.

    Raises:
        ArchiveError: there is no such archive, a class in it has too few images to split, a file cannot be read, the
            files differ in their bands, there is another level of folders above the classes, or the cache cannot be
            written.
    """
    if image_size < 1:
        raise ArchiveError(f"image_size: expected 1 or more pixels, got {image_size}")
    cache = (cache or user_cache()).expanduser()
    decoding = Decoding(image_size, tuple(bands), max_pixels)
    found = find_source(source, decoding, cache / "datasets", download=download, classes=classes, nested=nested)
    if bands and found.folder == Path():
        raise ArchiveError(f"bands: {found.name} is made of grey or RGB images; bands are chosen of files")
    _check_class_sizes(found.name, found.classes, found.labels, smallest_class)
    path, reasons = decoded_images(found, decoding, cache)
    if reasons and not skip_unreadable:
        file, reason = next(iter(reasons.items()))
        others = f", and {len(reasons) - 1} more files" if len(reasons) > 1 else ""
        raise ArchiveError(
            f"{found.folder / file} cannot be read: {reason}{others}; --skip-unreadable leaves such files out"
        )
    kept = [i for i, file in enumerate(found.files) if file not in reasons]
    labels = [found.labels[i] for i in kept]
    _check_class_sizes(found.name, found.classes, labels, smallest_class, "readable " if reasons else "")
    return Archive(
        np.load(path, mmap_mode="r"),
        torch.tensor(labels),
        list(map(as_utf8, found.classes)),
        [found.files[i] for i in kept],
        as_utf8(found.name),
        list(reasons),
        found.left_out,
    )


def open_features(
    data: Path, labels: Path | None, columns: dict[str, str | None], classes: Sequence[str] | None = None
) -> Archive:
    """Features in a file as an archive. Classes are integers or names, in ascending order; see `read_features`.

    Args:
        data: of the features, as `read_features` takes it; and so the next two.
        labels: the file of the labels.
        columns: names of columns.
        classes: the classes to keep; all by default. Rows of others count as unlabelled.

    Raises:
        ArchiveError: there is no such class, fewer than 2 are left, or one of them has too few rows to split.
        ValueError, OSError: as `read_features`; or the labels are those of class folders that have changed since, see
            `check_images`.
    """
    read = read_features(data, labels, None, columns)
    check_images([read.label_file])
    archive = Archive(read.features, torch.empty(0), [], read.paths or [], read.name, [], {})
    return _with_labels(archive, read.labels, str(data), classes)


def relabelled(archive: Archive, labels: Path, column: str | None, classes: Sequence[str] | None = None) -> Archive:
    """The images of an archive with the labels of a list, as `ntdne relabel` writes it; those not in it have none.

    Classes are integers or names, in ascending order.

    Args:
        archive: of N images.
        labels: .csv, .parquet, .json or .jsonl with a label beside the path of each image, as the archive has it; or
            beside the number `image` of its row; or, as .npy and .txt too, labels alone, one for each of the N images
            in order.
        column: the name of that of the labels; None: a usual one, see `COLUMNS`.
        classes: the classes to keep; all by default. Images of others count as unlabelled.

    Raises:
        ArchiveError: the list names other images, or one twice; or as `open_features`.
        ValueError, OSError: as `read_values`.
    """
    values = list(read_values(labels, "label", (column,) if column else COLUMNS["label"]))
    by_image: list[Any] = [None] * len(archive.files)
    if has_column(labels, COLUMNS["path"]):
        position = {name: image for image, name in enumerate(archive.files)}
        names = list(map(str, read_values(labels, "path", COLUMNS["path"])))
    elif has_column(labels, ("image",)):
        position = {str(image): image for image in range(len(archive.files))}
        names = list(map(str, read_values(labels, "image", ("image",))))
    else:
        if has_names(labels) and len(columns := column_names(labels)) > 1:
            raise ArchiveError(
                f"{labels}: expected a column {' or '.join(COLUMNS['path'])}, or image, that says whose labels these "
                f"are, or labels alone, one for each image in order; got columns {', '.join(columns)}"
            )
        position = {str(image): image for image in range(len(archive.files))}
        names = list(position)
        if len(values) != len(names):
            raise ArchiveError(f"{labels}: expected a label for each of the {len(names)} images, got {len(values)}")
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ArchiveError(f"{labels}: expected images of {archive.name}, got {as_utf8(unknown[0])}")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ArchiveError(f"{labels}: expected each image once, got {as_utf8(twice[0])} more often")
    for name, value in zip(names, values, strict=True):
        by_image[position[name]] = as_utf8(value) if isinstance(value, str) else value
    return _with_labels(archive, by_image, str(labels), classes)


def _with_labels(archive: Archive, labels: Any, where: str, classes: Sequence[str] | None) -> Archive:
    """The archive with these labels (N,), as `encode_labels` takes them, of the classes to keep; None: all."""
    codes, found = encode_labels(labels)
    names = list(map(str, found))
    if classes is not None:
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise ArchiveError(f"{where} has no class {unknown[0]}; its classes are {', '.join(names)}")
        kept = torch.tensor([name in classes for name in names] + [False])  # the last one for −1
        codes = torch.where(kept, kept.cumsum(0) - 1, -1)[codes]
        names = [name for name in names if name in classes]
    _check_class_sizes(archive.name, names, codes[codes >= 0], SMALLEST_CLASS, cure="; --classes names those to keep")
    return replace(archive, labels=codes, classes=names)


def user_cache() -> Path:
    """Where decoded images and libraries' archives are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ntdne_kernels"


def _check_class_sizes(
    archive: str, classes: list[str], labels: Sequence[int] | Tensor, smallest: int, readable: str = "", cure: str = ""
) -> None:
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < smallest:
            raise ArchiveError(
                f"class {name} of {archive} has {count or 'no'} {readable}image{'' if count == 1 else 's'}; "
                f"a 70/10/20 split needs at least {SMALLEST_CLASS}{cure}"
            )
