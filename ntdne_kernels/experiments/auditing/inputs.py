"""What is audited, from files: features or images, their labels, and where the pictures are.

Nothing is unpickled, and no file is written to.

Shapes: N images, D features.
"""

import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ntdne_kernels.audit import free_memory
from ntdne_kernels.experiments.images import MAX_PIXELS, as_picture, decode
from ntdne_kernels.labels import read_labels

if TYPE_CHECKING:
    from ntdne_kernels.experiments.archive import Archive

# What encodes images is imported where it is needed: torchvision and Lightning take seconds.

MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK", ".parquet": b"PAR1"}  # how these files begin
COLUMNS = {"features": ("features",), "label": ("label", "labels"), "path": ("path", "paths")}
PICTURE = 192  # pixels a side: twice what the page shows
LOOKED_FOR = 100  # files of pictures, to see whether their folder is right
BROKEN = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)  # what NumPy says of a broken file


@dataclass(frozen=True)
class Source:
    """What is audited."""

    name: str
    features: Any
    """(N, D) array or tensor, of any length but 0."""
    labels: Any
    """(N,) integers, −1 for unlabelled, or a list of names, None for unlabelled."""
    paths: list[str] | None
    """N file names, as they are shown."""
    picture: Callable[[int], Image.Image] | None
    """Decodes the picture of an image, upright and RGB; an exception where it cannot."""
    sigma: float = 0.1
    """The temperature that the features were trained with, as far as is known."""
    unreadable: list[str] = field(default_factory=list)
    """Files of a folder that are no images and were left out."""


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
        labels, paths: .npy, .npz, .parquet, .csv or .txt; None: they are in the file of the features.
        images: the folder that file names are relative to.
        columns: names of the columns of "features", "label" and "path", or None for the usual ones.
        max_pixels: of a picture that is still shown; None: as `images.decode`.

    Raises:
        ValueError: a file is not what its name says or lacks a column, or there are not as many labels as images.
        OSError: a file cannot be read.
    """
    if path.suffix not in MAGIC:
        raise ValueError(f"{path}: expected features as {', '.join(MAGIC)}, got {path.suffix or 'no suffix'}")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images: expected a folder, got {images}")
    wanted = {kind: (name,) if name else COLUMNS[kind] for kind, name in columns.items()}
    alone = path.suffix == ".npy"
    if labels is None and alone:
        raise ValueError(f"{path} holds features alone; --labels names the file of their labels")
    features = _features(path, wanted["features"])

    def of_each(kind: str, file: Path) -> list[Any]:
        values = _plain(file, kind, _column(file, kind, wanted[kind]))
        if len(values) != len(features):
            raise ValueError(
                f"{file}: expected a {kind} for each of the {len(features)} images of {path}, got {len(values)}"
            )
        return values

    found = _labels(labels or path, of_each("label", labels or path))
    if paths is None and (alone or not (columns["path"] or _has_column(path, wanted["path"]))):
        if images is not None:
            raise ValueError("--images needs the names of the images' files: --paths, or a column path")
        return Source(path.stem, features, found, None, None)
    names = ["" if name is None else str(name) for name in of_each("path", paths or path)]
    if images is not None and not any((images / name).is_file() for name in names[:LOOKED_FOR]):
        raise ValueError(f"--images: expected the folder that the files are in, but {images / names[0]} is not there")
    picture = partial(_open_picture, names, images or Path(), max_pixels or MAX_PIXELS)
    return Source(path.stem, features, found, names, picture)


def _open_picture(names: list[str], folder: Path, max_pixels: int, image: int) -> Image.Image:
    file = folder / names[image]
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"no file {file}")
    return Image.fromarray(as_picture(decode(file, max_pixels=max_pixels, smallest=PICTURE)))


def encode_folder(
    data: str, run: Path, *, cache: Path | None, download: bool, device: str, max_pixels: int | None = None
) -> Source:
    """The images of a folder of class folders, through the encoder of a trained run; their labels are the folders.

    Args:
        data: as `open_archive` takes it.
        run: folder of a run of `ntdne train`, or a checkpoint in it.
        max_pixels: of a file that is still read; None: that of the run.

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
        nested=bool(settings.classes),  # the run's archive was, as its classes were named
    )
    if archive.notes:
        print(archive.notes)
    if len(archive.files) == 0:
        raise ValueError(f"{data} has no image that can be read")
    found, expected = archive.images.shape[-1], len(normalisation.mean)
    if found != expected or normalisation.floats != (archive.images.dtype.kind == "f"):
        kind = "floats" if normalisation.floats else "integers"
        raise ValueError(
            f"--checkpoint: the run was trained on {expected} bands of {kind}, but {data} has {found} bands of "
            f"{archive.images.dtype}"
        )
    classes = list(map(readable, archive.classes))
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


def readable(name: str) -> str:
    """A name, which may be any bytes, as text that can be written as UTF-8: other names stay other text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _archive_picture(
    archive: "Archive", folder: Path, bands: Sequence[int], max_pixels: int, image: int
) -> Image.Image:
    """The file of an image; where it is in no folder of the user's, the image as it was resized."""
    file = folder / archive.files[image]
    pixels = decode(file, bands, max_pixels, smallest=PICTURE) if file.is_file() else archive.images[image]
    return Image.fromarray(as_picture(np.array(pixels)))


# Files with columns


def _column(path: Path, kind: str, names: Sequence[str]) -> Any:
    """The column of a file that has one of the names; of .npy and .txt all there is.

    An array, a list of texts, or pyarrow's column.
    """
    _check_begin(path)
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except BROKEN as error:
            raise _broken(path, error) from None
    if path.suffix == ".txt":
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # a file's name is any bytes
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    known = _names(path)
    name = next((name for name in names if name in known), None)
    if name is None:
        raise ValueError(
            f"{path} has no column {' or '.join(names)}; it has {', '.join(known) or 'none'}; "
            f"--{kind}-column names another"
        )
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                _check_fits(path, arrays.zip.getinfo(f"{name}.npy").file_size)
                return arrays[name]
        except BROKEN as error:
            raise _broken(path, error) from None
    if path.suffix == ".csv":
        return _csv(path, usecols=[name])[name].tolist()
    file = _parquet(path)
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    parts = [group.column(place) for group in groups for place in range(group.num_columns)]
    # A column of lists has its values in features.list.element.
    _check_fits(
        path, sum(part.total_uncompressed_size for part in parts if f"{part.path_in_schema}.".startswith(f"{name}."))
    )
    return file.read(columns=[name])[name]


def _has_column(path: Path, names: Iterable[str]) -> bool:
    return not set(names).isdisjoint(_names(path))


def _names(path: Path) -> list[str]:
    """The columns of a .csv or .parquet, the arrays of a .npz."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return list(arrays.files)
        except BROKEN as error:
            raise _broken(path, error) from None
    if path.suffix == ".csv":
        return [str(name) for name in _csv(path, nrows=0).columns]
    return list(_parquet(path).schema_arrow.names)


def _check_begin(path: Path) -> None:
    """ValueError unless the file's name ends as one that can be read, and the file begins as its name says."""
    known = (*MAGIC, ".csv", ".txt")
    if path.suffix not in known:
        raise ValueError(f"{path}: expected a file {', '.join(known)}, got {path.suffix or 'no suffix'}")
    with path.open("rb") as file:
        begin = file.read(max(map(len, MAGIC.values())))
    if not begin:
        raise ValueError(f"{path} is empty")
    kind = next((suffix for suffix, magic in MAGIC.items() if begin.startswith(magic)), None)
    if kind != (path.suffix if path.suffix in MAGIC else None):
        looks = f"it begins like a {kind} file" if kind else "it begins like something else"
        raise ValueError(f"{path} is no {path.suffix} file: {looks}")


def _check_fits(path: Path, size: int) -> None:
    if size > (free := free_memory()):
        raise ValueError(
            f"{path} takes {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; save its features as .npy, "
            "which is read part by part, and give --scratch"
        )


def _csv(path: Path, **options: Any) -> Any:
    import pandas as pd

    # Everything is text, as a class may be called NA or 007; and a blank line is a row, with no label.
    text = {"dtype": object, "keep_default_na": False, "skip_blank_lines": False, "encoding_errors": "surrogateescape"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows longer than the header
            return pd.read_csv(path, index_col=False, **text, **options)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise _broken(path, error) from None


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'ntdne_kernels[audit]'") from None
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> ValueError:
    reason = str(error) or type(error).__name__
    if "bject" in reason:  # NumPy's two errors: an array of Python objects, mapped and loaded
        reason = "it holds Python objects, which are not loaded; save numbers, or names as array.astype(str)"
    return ValueError(f"{path} cannot be read: {reason}")


def _features(path: Path, names: Sequence[str]) -> NDArray[Any]:
    """(N, D) of any float type."""
    column = _column(path, "features", names)
    features = column if isinstance(column, np.ndarray) else _matrix(path, column)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{path}: expected features of shape (images, values), got {features.shape}")
    if features.dtype.kind != "f" or features.dtype.itemsize > 8:
        raise ValueError(f"{path}: expected features as float16, float32 or float64, got {features.dtype}")
    return features


def _matrix(path: Path, column: Any) -> NDArray[Any]:
    """(N, D) from a Parquet column of lists of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{path}: expected features as lists of numbers, got {kind}")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if len(lengths) == 0:
        raise ValueError(f"{path} has no rows")
    wrong = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
    if len(wrong):
        raise ValueError(
            f"{path}: expected lists of features of one length, got {lengths[wrong[0]]} values in row {wrong[0]} and "
            f"{lengths[0]} in row 0"
        )
    values: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return values.reshape(len(lengths), -1)


def _plain(path: Path, kind: str, values: Any) -> list[Any]:
    """A column as a list of Python's own values."""
    array = isinstance(values, np.ndarray)
    if array:
        if values.ndim != 1:
            raise ValueError(f"{path}: expected a list of {kind}s, got an array of shape {values.shape}")
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8", "surrogateescape")
    return values if isinstance(values, list) else list(values.tolist() if array else values.to_pylist())


def _labels(path: Path, values: list[Any]) -> "list[str | None] | NDArray[np.integer[Any]]":
    """Labels as `audit_labels` takes them: integers, or names with None where there is none."""
    try:
        labels = read_labels(values, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None
    if isinstance(labels, torch.Tensor):
        return labels.numpy()
    return [None if label is None else readable(label) for label in labels]
