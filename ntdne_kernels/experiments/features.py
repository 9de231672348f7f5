"""Features of images, with their labels and file names, out of every kind of file: for train, reproduce and audit.

Nothing is unpickled, and no file is written to.

Shapes: N images, F features.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ntdne_kernels.experiments.columns import (
    SUFFIXES,
    column_name,
    column_names,
    has_column,
    has_names,
    read_matrix,
    read_names,
    read_values,
)
from ntdne_kernels.experiments.embedded import FEATURES, FILES, LABELS, check_finished
from ntdne_kernels.labels import read_labels

COLUMNS = {  # ours; cleanlab's; FiftyOne's, in its JSON and its CSV
    "features": ("features", "embeddings"),
    "label": ("label", "labels", "given_label", "ground_truth", "ground_truth.label"),
    "path": ("path", "paths", "filepath", "filename", "file_name", "file"),
    "split": ("split", "subset"),
}
# Columns that say of which image a row is, in small letters and without "_": by its file's name; by an id or a name; by
# its number or a name, as `ntdne relabel` writes; by the number that pandas writes beside each row.
NAMED = (
    *(name.replace("_", "") for name in COLUMNS["path"]),
    *("imagepath", "imagepaths", "imagefilepath", "imagefilename", "imagefile", "imagename"),
    *("imgpath", "imgpaths", "imgfile", "imgname"),
)
IDS = ("img", "imageid", "imgid")
IMAGE = ("image",)
INDEX = ("", "unnamed: 0", "index", "indexlevel0")
WHOLE = re.compile(r"\s*(\d+)(\.0*)?\s*", re.ASCII)
FOLDERS = (FEATURES, "samples.json")  # what is read of a folder: of `ntdne embed`, and of a FiftyOneDataset
BESIDE = {"label": LABELS, "path": FILES}  # found by themselves beside features without them


@dataclass(frozen=True)
class Features:
    """Features of N images.

    Attributes:
        name: of the archive.
        features: (N, F) of float16, float32 or float64; mapped into memory where the file is .npy or .pt.
        labels: (N,) integers, −1 for unlabelled, or a list of names, None for unlabelled.
        paths: N file names, or None.
        label_file: where the labels were read.
        splits: the split that each image is in, as "train"; "" for none. None: no file has such a column.
    """

    name: str
    features: NDArray[Any]
    labels: "list[str | None] | NDArray[np.integer[Any]]"
    paths: list[str] | None
    label_file: Path
    splits: list[str] | None = None


def features_file(data: str) -> Path | None:
    """The file of features that `data` names, itself or in its folder; None where it names an archive of images.

    Raises:
        ValueError: the folder is that of an `ntdne embed` that has not come to an end.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        check_finished(path)
        return next((path / name for name in FOLDERS if (path / name).is_file()), None)
    return path if path.suffix in SUFFIXES else None


def read_features(
    data: Path, labels: Path | None, paths: Path | None = None, columns: dict[str, str | None] | None = None
) -> Features:
    """Features from a file, with the labels and file names in it, given beside it, or found beside it.

    Args:
        data: .npy or .pt, which are mapped into memory; .npz, .parquet or FiftyOne's samples.json, which are read; or
            a folder, see `FOLDERS`. A .pt file holds a tensor, or a dictionary with the columns.
        labels: .npy, .npz, .parquet, .csv, .txt, .pt, .jsonl or samples.json, in the order of the features; None: a
            column of the features' file, or, where that has no columns, labels.npy beside it.
        paths: names of the images' files, as labels; None: a column, or files.txt beside it, or a column of the
            labels, or none.
        columns: names of the columns of "features", "label" and "path", or None for the usual ones, see `COLUMNS`.

    Raises:
        ValueError: a file is not what its name says or lacks a column, there are not as many labels as images, or the
            file of the labels says that they are of other images.
        OSError: a file cannot be read.
    """
    path = features_file(str(data)) or data
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected features as {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    given = columns or {}
    wanted = {content: (name,) if (name := given.get(content)) else usual for content, usual in COLUMNS.items()}
    features = read_matrix(path, wanted["features"])

    def holding(content: str, file: Path | None) -> Path | None:
        """The file with the values of each image: the one given, that of the features, or one beside it."""
        return file or (path if given.get(content) else _found(path, content, wanted[content]))

    def of_each_image(content: str, file: Path) -> Any:
        values = read_values(file, content, wanted[content])
        if len(values) != len(features):
            raise ValueError(
                f"{file}: expected a {content} for each of the {len(features)} images of {path}, got {len(values)}"
            )
        return values

    labels = holding("label", labels)
    if labels is None:
        if has_names(path):
            read_values(path, "label", wanted["label"])  # says which columns there are
        raise ValueError(f"{path} holds features alone; --labels names the file of their labels")
    values = of_each_image("label", labels)
    paths = holding("path", paths)
    if paths is None and _names_images(labels):
        paths = labels
    files = [file for file in (path, labels, paths) if file is not None]
    split = next((file for file in files if has_column(file, COLUMNS["split"])), None)
    texts = {
        content: None if file is None else ["" if each is None else str(each) for each in of_each_image(content, file)]
        for content, file in (("path", paths), ("split", split))
    }
    if labels != path:
        _check_order(labels, path, (_found(path, "path", wanted["path"]), paths), wanted["path"])
    return Features(
        data.resolve().name if data.is_dir() else path.stem,
        features,
        _labels(labels, values),
        texts["path"],
        labels,
        texts["split"],
    )


def _found(features: Path, content: str, names: Sequence[str]) -> Path | None:
    """Where values of each image are if no file is given: with the features, or beside those that have no names."""
    if has_column(features, names):
        return features
    beside = features.with_name(BESIDE[content])
    return beside if beside.is_file() and not has_names(features) else None


def _check_order(labels: Path, features: Path, paths: Iterable[Path | None], names: Sequence[str]) -> None:
    """ValueError where a file of labels says of which images they are, and not in the order of the features.

    Numbers of rows count only where no names say that the order is right: a table that was shuffled before the features
    were made has them in another order.

    Args:
        labels: maybe with columns of names or numbers of images, see `NAMED`, `IDS`, `IMAGE` and `INDEX`.
        features: of their file; it may have a column of `IMAGE` or `INDEX` too.
        paths: files of names of the images' files in the order of the features; the labels' own is no evidence of it.
        names: the column of those has one of these.
    """
    columns = column_names(labels) if has_names(labels) else []
    there = [
        list(map(str, read_values(file, "path", names))) for file in dict.fromkeys(paths) if file and file != labels
    ]
    in_order = False
    for kind in (NAMED, IDS, IMAGE, INDEX):
        for column in _of_kind(columns, kind):
            found = read_names(labels, column)
            if found is None:
                continue
            expected = [each for each in there if len(each) == len(found)]
            own = _own_names(features, kind)
            whole = kind != NAMED and all(map(WHOLE.fullmatch, found))
            if kind == IMAGE and own:
                found, expected = _plain(found), own
            elif whole:  # they may be names, as 12 of 12.png, but another order of such may be that of ids
                found = _plain(found)
                in_order = in_order or any(_displaced(found, each) == [] for each in (*expected, *own))
                expected = [] if in_order or kind == IDS else _row_numbers(found)
            elif kind == INDEX:
                continue
            for each in expected:
                rows = _displaced(found, each)
                if rows:
                    raise ValueError(
                        f"{labels}, column {column or 'without a name'}: expected the images in the order of the "
                        f"features, got {found[rows[0]]} in row {rows[0]}, where the features are those of "
                        f"{each[rows[0]]}" + ("; leave the column out if it says something else" if whole else "")
                    )
                in_order = in_order or (rows is not None and not whole)


def _of_kind(columns: Iterable[str], kind: Sequence[str]) -> list[str]:
    return [column for column in columns if column.casefold().replace("_", "") in kind]


def _own_names(features: Path, kind: Sequence[str]) -> list[list[str]]:
    """Numbers or names of the images out of the features' own file."""
    columns = _of_kind(column_names(features), kind) if kind in (IMAGE, INDEX) and has_names(features) else []
    return [_plain(names) for column in columns if (names := read_names(features, column)) is not None]


def _plain(names: list[str]) -> list[str]:
    """Whole numbers, as 00012 or 12.0, without zeros around them; others as they are."""
    return [str(int(whole[1])) if (whole := WHOLE.fullmatch(name)) else name for name in names]


def _row_numbers(found: list[str]) -> list[list[str]]:
    """The numbers of the rows, from 0 or 1, if those found are the same in any order; else none.

    From 1 they may be in the order of texts, 1, 10, 2, which is that of files by their names, as features are.
    """
    numbers = sorted(map(int, found))
    ids = numbers[0] == 1 and found == sorted(found)
    return [list(map(str, numbers))] if not ids and numbers in (list(range(n, n + len(found))) for n in (0, 1)) else []


def _displaced(found: list[str], there: list[str]) -> list[int] | None:
    """The rows whose names are those of others there; None where no name is one there, or they cannot be told apart.

    Names are compared by as many of their last parts as any two have in common, with their suffixes or, where none is
    the same so, without. Names that stand more than once are compared where all of them are there, as often.
    """
    ours, theirs = (
        [unicodedata.normalize("NFC", name.replace("\\", "/").strip()).casefold().split("/") for name in names]
        for names in (found, there)
    )
    for with_suffix in (True, False):
        if not with_suffix:
            ours, theirs = ([[*parts[:-1], Path(parts[-1]).stem] for parts in names] for names in (ours, theirs))
        for depth in range(max(map(len, theirs)), 0, -1):
            own_keys, keys = ([tuple(parts[-depth:]) for parts in names] for names in (ours, theirs))
            row_of = {key: row for row, key in enumerate(keys)}
            if row_of.keys().isdisjoint(own_keys):
                continue
            if len(row_of) == len(keys) and len(set(own_keys)) == len(own_keys):
                return [row for row, key in enumerate(own_keys) if row_of.get(key, row) != row]
            if Counter(own_keys) == Counter(keys):
                return [row for row, key in enumerate(own_keys) if key != keys[row]]
    return None


def _names_images(labels: Path) -> bool:
    """Whether a file of labels has another name for each image, as a path, and not that of a folder of all, say."""
    if not has_column(labels, COLUMNS["path"]):
        return False
    names = read_names(labels, column_name(labels, "path", COLUMNS["path"]))
    return names is not None and len(set(names)) == len(names)


def archive_name(data: Path) -> str:
    """What results of an archive are called: a folder's name, or a file's; of features.npy elsewhere its folder's."""
    elsewhere = data.name in FOLDERS and data.resolve().parent != Path.cwd()
    return data.resolve().parent.name if elsewhere else data.resolve().name if data.is_dir() else data.stem


def as_utf8(name: str) -> str:
    """A name, which may be any bytes, as text that UTF-8 can write; different names stay different."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _labels(path: Path, values: Any) -> "list[str | None] | NDArray[np.integer[Any]]":
    """Labels as `encode_labels` takes them: integers, or names with None where there is none."""
    try:
        labels = read_labels(values, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None
    if isinstance(labels, torch.Tensor):
        return labels.numpy()
    return [None if label is None else as_utf8(label) for label in labels]
