"""What is audited: features or images, their labels, and where the pictures are.

Nothing is unpickled, and no file is written to.

Shapes: N images, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ntdne_kernels.experiments.auditing.columns import MAGIC, has_column, read_matrix, read_values
from ntdne_kernels.experiments.images import MAX_PIXELS, as_picture, decode
from ntdne_kernels.labels import read_labels

if TYPE_CHECKING:
    from ntdne_kernels.experiments.archive import Archive

# What encodes images is imported where it is needed: torchvision and Lightning take seconds.

COLUMNS = {"features": ("features",), "label": ("label", "labels"), "path": ("path", "paths")}
PICTURE_SIZE = 192  # pixels a side: twice what the page shows
CHECKED_FILES = 100  # names that are tried to see whether the folder of pictures is right


@dataclass(frozen=True)
class Source:
    """What is audited.

    Attributes:
        name: of the archive, as the page shows it.
        features: (N, D) array or tensor, of any length but 0.
        labels: (N,) integers, −1 for unlabelled, or a list of names, None for unlabelled.
        paths: N file names, as they are shown.
        picture: decodes the picture of an image, upright and RGB; raises where it cannot.
        sigma: the temperature that the features were trained with; None: not known.
        unreadable: files of a folder that are no images and were left out.
    """

    name: str
    features: Any
    labels: Any
    paths: list[str] | None
    picture: Callable[[int], Image.Image] | None
    sigma: float | None = None
    unreadable: list[str] = field(default_factory=list)


def read_features(
    path: Path,
    labels: Path | None,
    paths: Path | None,
    images: Path | None,
    columns: dict[str, str | None],
    max_pixels: int | None = None,
) -> Source:
    """Features from a file, as the command's help describes it.

    Args:
        path: .npy, which is mapped into memory; .npz or .parquet, which are read.
        labels: .npy, .npz, .parquet, .csv or .txt; None: they are in the file of the features.
        paths: names of the images' files, as labels.
        images: the folder that file names are relative to.
        columns: names of the columns of "features", "label" and "path", or None for the usual ones.
        max_pixels: pictures of more pixels are not shown; None: as `images.decode`.

    Raises:
        ValueError: a file is not what its name says or lacks a column, or there are not as many labels as images.
        OSError: a file cannot be read.
    """
    if path.suffix not in MAGIC:
        raise ValueError(f"{path}: expected features as {', '.join(MAGIC)}, got {path.suffix or 'no suffix'}")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images: expected a folder, got {images}")
    wanted = {content: (name,) if name else COLUMNS[content] for content, name in columns.items()}
    only_features = path.suffix == ".npy"
    if labels is None and only_features:
        raise ValueError(f"{path} holds features alone; --labels names the file of their labels")
    features = read_matrix(path, wanted["features"])

    def of_each_image(content: str, file: Path) -> list[Any]:
        values = read_values(file, content, wanted[content])
        if len(values) != len(features):
            raise ValueError(
                f"{file}: expected a {content} for each of the {len(features)} images of {path}, got {len(values)}"
            )
        return values

    found = _labels(labels or path, of_each_image("label", labels or path))
    if paths is None and (only_features or not (columns["path"] or has_column(path, wanted["path"]))):
        if images is not None:
            raise ValueError("--images needs the names of the images' files: --paths, or a column path")
        return Source(path.stem, features, found, None, None)
    names = ["" if name is None else str(name) for name in of_each_image("path", paths or path)]
    if images is not None and not any((images / name).is_file() for name in names[:CHECKED_FILES]):
        raise ValueError(f"--images: expected the folder that the files are in, but {images / names[0]} is not there")
    picture = partial(_open_picture, names, images or Path(), max_pixels or MAX_PIXELS)
    return Source(path.stem, features, found, names, picture)


def _open_picture(names: list[str], folder: Path, max_pixels: int, image: int) -> Image.Image:
    file = folder / names[image]
    if not file.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"no file {file}")
    return Image.fromarray(as_picture(decode(file, max_pixels=max_pixels, smallest=PICTURE_SIZE)))


def _labels(path: Path, values: list[Any]) -> "list[str | None] | NDArray[np.integer[Any]]":
    """Labels as `audit_labels` takes them: integers, or names with None where there is none."""
    try:
        labels = read_labels(values, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None
    if isinstance(labels, torch.Tensor):
        return labels.numpy()
    return [None if label is None else as_utf8(label) for label in labels]


def as_utf8(name: str) -> str:
    """A name, which may be any bytes, as text that UTF-8 can write; different names stay different."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def encode_folder(
    data: str, run: Path, *, cache: Path | None, download: bool, device: str, max_pixels: int | None = None
) -> Source:
    """The images of a folder of class folders, through the encoder of a trained run; their labels are the folders.

    Args:
        data: as `open_archive` takes it.
        run: folder of a run of `ntdne train`, or a checkpoint in it.
        cache: folder of decoded images, as `open_archive` takes it.
        download: let a library fetch its archive.
        device: where the encoder runs.
        max_pixels: files of more pixels count as unreadable; None: as in the run.

    Raises:
        ValueError: there is no such archive or run, one of them is broken, or the run was trained on other bands.
    """
    from ntdne_kernels.experiments.archive import open_archive
    from ntdne_kernels.experiments.results import embed
    from ntdne_kernels.experiments.run import trained
    from ntdne_kernels.experiments.samples import ImageDataset, transform
    from ntdne_kernels.experiments.training import CHECKPOINT

    if run.is_file() and run.name != CHECKPOINT:
        raise ValueError(f"--checkpoint: expected the {CHECKPOINT} of a run of ntdne train, or its folder, got {run}")
    settings, _, encoder, _, normalisation = trained(run.parent if run.is_file() else run)
    max_pixels = max_pixels or settings.max_pixels
    archive = open_archive(
        data,
        settings.image_size,
        cache=cache,
        skip_unreadable=True,
        download=download,
        bands=settings.bands,
        max_pixels=max_pixels,
        smallest_class=0,
        nested=bool(settings.classes),  # naming classes had the run's archive opened that way
    )
    if archive.notes:
        print(archive.notes)
    if len(archive.files) == 0:
        raise ValueError(f"{data} has no image that can be read")
    found, expected = archive.images.shape[-1], len(normalisation.mean)
    if found != expected or normalisation.floats != (archive.images.dtype.kind == "f"):
        numbers = "floats" if normalisation.floats else "integers"
        raise ValueError(
            f"--checkpoint: the run was trained on {expected} bands of {numbers}, but {data} has {found} bands of "
            f"{archive.images.dtype}"
        )
    classes = list(map(as_utf8, archive.classes))
    every = torch.arange(len(archive.files))
    images = ImageDataset(archive, every, archive.labels, transform(False, normalisation))
    return Source(
        archive.name,
        embed(encoder, images, settings.batch_size, device),
        [classes[label] for label in archive.labels.tolist()],
        archive.files if any(archive.files) else None,
        partial(_archive_picture, archive, Path(data).expanduser(), settings.bands, max_pixels),
        settings.loss_options.get("sigma", 0.1),
        archive.skipped,
    )


def _archive_picture(
    archive: "Archive", folder: Path, bands: Sequence[int], max_pixels: int, image: int
) -> Image.Image:
    """The picture of a file; where there is no such file in the folder, the resized image of the archive."""
    file = folder / archive.files[image]
    pixels = decode(file, bands, max_pixels, smallest=PICTURE_SIZE) if file.is_file() else archive.images[image]
    return Image.fromarray(as_picture(np.array(pixels)))
