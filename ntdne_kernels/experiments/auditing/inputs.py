"""What is audited: features or images, their labels, and where the pictures are.

Nothing is unpickled, and no file is written to.

Shapes: N images, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ntdne_kernels.experiments.arguments import WORDS, class_folders
from ntdne_kernels.experiments.embedded import check_images, read_about
from ntdne_kernels.experiments.features import as_utf8, features_file, read_features
from ntdne_kernels.experiments.images import MAX_PIXELS, as_picture, decode

if TYPE_CHECKING:
    from ntdne_kernels.experiments.archive import Archive

# What encodes images is imported where it is needed: torchvision and Lightning take seconds.

PICTURE_SIZE = 192  # pixels a side: twice what the page shows
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of folders
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
        splits: the split of each image, as "train", or ""; None: there are none.
        origin: the archive, see `origin_of`; "" where that is not known.
    """

    name: str
    features: Any
    labels: Any
    paths: list[str] | None
    picture: Callable[[int], Image.Image] | None
    sigma: float | None = None
    unreadable: list[str] = field(default_factory=list)
    splits: list[str] | None = None
    origin: str = ""


def read_source(
    data: Path,
    labels: Path | None,
    paths: Path | None,
    images: Path | None,
    columns: dict[str, str | None],
    max_pixels: int | None = None,
) -> Source:
    """Features from a file, and the pictures of their images.

    Args:
        data: of the features, as `read_features` takes it; and so labels, paths and columns.
        labels: the file of the labels.
        paths: the file of the names of the images' files.
        images: the folder that file names are relative to; None: see `images_folder`.
        columns: names of columns.
        max_pixels: pictures of more pixels are not shown; None: as `images.decode`.

    Raises:
        ValueError: a file is not what its name says or lacks a column, there are not as many labels as images, or
            images have changed since `ntdne embed` made features of them.
        OSError: a file cannot be read.
    """
    if images is not None and not images.is_dir():
        raise ValueError(f"--images: expected a folder, got {images}")
    read = read_features(data, labels, paths, columns)
    check_images([features_file(str(data)) or data, read.label_file], images)
    splits = read.splits or _split_folders(read.paths)
    if read.paths is None:
        if images is not None:
            raise ValueError("--images needs the names of the images' files: --paths, or a column path")
        return Source(read.name, read.features, read.labels, None, None, splits=splits)
    if images is not None and not any((images / name).is_file() for name in read.paths[:CHECKED_FILES]):
        found = images / read.paths[0]
        raise ValueError(f"--images: expected the folder that the files are in, but {found} is not there")
    folder = images or images_folder(data)
    picture = partial(_open_picture, read.paths, folder, max_pixels or MAX_PIXELS)
    return Source(read.name, read.features, read.labels, read.paths, picture, splits=splits)


def _split_folders(paths: list[str] | None) -> list[str] | None:
    """The split whose folder each file is in, "" for none; None where no file is in one."""
    found = [next((part for part in Path(name).parts[:-1] if part.lower() in SPLITS), "") for name in paths or []]
    return found if any(found) else None


def images_folder(data: Path) -> Path:
    """What the names of images are relative to: the folder in embed.json, that of FiftyOne's export, or this one."""
    folder = data if data.is_dir() else data.parent
    about = read_about(folder)
    if about is not None:
        return Path(about["folder"])
    return folder if (folder / "samples.json").is_file() else Path()


def archive_folder(data: str) -> Path | None:
    """The folder of the images that an archive's name or features stand for, nothing for a file of features alone."""
    folders = class_folders(data)
    if folders is not None:
        return folders
    named = images_folder(Path(data).expanduser())
    return named if named != Path() else None


def origin_of(data: str) -> str:
    """The archive that `data` names, by which outputs tell it from others: its images' folder, a file, or a word."""
    folder = archive_folder(data)
    path = Path(data).expanduser()
    if folder is not None:
        return str(folder.resolve())
    return str(path.resolve()) if data not in WORDS and path.exists() else data


def _open_picture(names: list[str], folder: Path, max_pixels: int, image: int) -> Image.Image:
    file = folder / names[image]
    if not file.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"no file {file}")
    return Image.fromarray(as_picture(decode(file, max_pixels=max_pixels, smallest=PICTURE_SIZE)))


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
    from ntdne_kernels.experiments.encoders import HEADS
    from ntdne_kernels.experiments.results import embed
    from ntdne_kernels.experiments.run import trained
    from ntdne_kernels.experiments.samples import ImageDataset, transform
    from ntdne_kernels.experiments.sources import check_names

    settings, _, encoder, _, normalisation = trained(run_folder(run))
    if settings.encoder in HEADS:
        raise ValueError(f"--checkpoint: the run in {run} was trained on features, but {data} holds images")
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
    check_names(archive.name, archive.classes)
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
        _split_folders(archive.files),
    )


def encode_features(source: Source, run: Path, device: str) -> Source:
    """The source with its features through the head of a trained run, and with the sigma of its loss.

    Args:
        source: features that the head can take.
        run: folder of a run of `ntdne train` on features, or a checkpoint in it.
        device: where the head runs.

    Raises:
        ValueError: there is no such run, it is broken, or was trained on images or on features of another length.
    """
    from ntdne_kernels.experiments.archive import Archive
    from ntdne_kernels.experiments.encoders import HEADS
    from ntdne_kernels.experiments.results import embed
    from ntdne_kernels.experiments.run import trained
    from ntdne_kernels.experiments.samples import FeatureDataset

    settings, _, encoder, _, normalisation = trained(run_folder(run))
    N, values = source.features.shape
    if settings.encoder not in HEADS or len(normalisation.mean) != values:
        trained_on = f"features of {len(normalisation.mean)} values" if settings.encoder in HEADS else "images"
        raise ValueError(
            f"--checkpoint: the run in {run} was trained on {trained_on}, but {source.name} has features of {values}"
        )
    unlabelled = torch.full((N,), -1)
    rows = FeatureDataset(
        Archive(source.features, unlabelled, [], [], source.name, [], {}), torch.arange(N), unlabelled, normalisation
    )
    features = embed(encoder, rows, settings.batch_size, device)
    return replace(source, features=features, sigma=settings.loss_options.get("sigma", 0.1))


def run_folder(run: Path) -> Path:
    """The folder of a run that is given by its folder or its checkpoint."""
    from ntdne_kernels.experiments.training import CHECKPOINT

    if run.is_file() and run.name != CHECKPOINT:
        raise ValueError(f"--checkpoint: expected the {CHECKPOINT} of a run of ntdne train, or its folder, got {run}")
    return run.parent if run.is_file() else run


def _archive_picture(
    archive: "Archive", folder: Path, bands: Sequence[int], max_pixels: int, image: int
) -> Image.Image:
    """The picture of a file; where there is no such file in the folder, the resized image of the archive."""
    file = folder / archive.files[image]
    pixels = decode(file, bands, max_pixels, smallest=PICTURE_SIZE) if file.is_file() else archive.images[image]
    return Image.fromarray(as_picture(np.array(pixels)))
