"""An archive's images and given labels, without pictures or features: what decisions are about.

Shapes: N images.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntdne_kernels.experiments.archive import user_cache
from ntdne_kernels.experiments.auditing.inputs import images_folder
from ntdne_kernels.experiments.embedded import check_images
from ntdne_kernels.experiments.features import COLUMNS, as_utf8, features_file, read_features
from ntdne_kernels.experiments.reviewing.decisions import Decisions, OtherArchiveError, read_decisions
from ntdne_kernels.experiments.settings import SMALLEST_IMAGE
from ntdne_kernels.experiments.sources import Decoding, check_names, find_source

AS_USUAL = Decoding(SMALLEST_IMAGE)  # any size will do: nothing is looked at


@dataclass(frozen=True)
class LabelledImages:
    """What the audit of an archive knows of its images, but for their features.

    Attributes:
        name: of the archive.
        labels: (N,) integers, −1 for unlabelled, or a list of names, None for unlabelled.
        paths: N file names, or None.
        folder: what these are relative to; None where there are no files.
        classes: names of the class folders; none where the labels are in a file.
        label_file: that file; None for class folders.
        label_names: names that its column of labels may have.
        decoding: how the audit read the files of class folders: it leaves out those that cannot be read so.
    """

    name: str
    labels: Any
    paths: list[str] | None
    folder: Path | None
    classes: frozenset[str] = frozenset()
    label_file: Path | None = None
    label_names: tuple[str, ...] = ()
    decoding: Decoding = AS_USUAL

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def of_integers(self) -> bool:
        """Whether labels are integers and not names."""
        return isinstance(self.labels, np.ndarray)


def read_labelled(
    data: str,
    labels: Path | None,
    paths: Path | None,
    images: Path | None,
    columns: dict[str, str | None],
    cache: Path | None = None,
    decoding: Decoding = AS_USUAL,
) -> LabelledImages:
    """The images and labels of what `ntdne audit` takes; arguments as `auditing.read_source` has them.

    Args:
        data: a folder of class folders, or a word as "digits"; or features.
        labels: of features: the file of the labels.
        paths: of features: the file of the names of the images' files.
        images: of features: the folder that file names are relative to.
        columns: names of columns of "features", "label" and "path", or None for the usual ones.
        cache: where libraries unpack their archives; None: in the user's cache folder.
        decoding: of class folders, see `LabelledImages`.

    Raises:
        ValueError: there is no such archive, a file is not what its name says, or images have changed since
            `ntdne embed` made features of them.
        OSError: a file cannot be read.
    """
    file = features_file(data)
    if file is None:
        if any([labels, paths, images]):
            raise ValueError("--labels, --paths and --images are for features; the labels of images are their folders")
        datasets = (cache or user_cache()).expanduser() / "datasets"
        found = find_source(data, decoding, datasets, download=False, classes=None, nested=True)
        check_names(found.name, found.classes)
        classes = list(map(as_utf8, found.classes))
        return LabelledImages(
            found.name,
            [classes[label] for label in found.labels],
            found.files if any(found.files) else None,
            None if found.folder == Path() else found.folder,
            frozenset(classes),
            decoding=decoding,
        )
    read = read_features(Path(data).expanduser(), labels, paths, columns)
    check_images([file, read.label_file], images)
    folder = images_folder(Path(data).expanduser()) if images is None else images
    given = columns.get("label")
    return LabelledImages(
        read.name,
        read.labels,
        read.paths,
        None if read.paths is None else folder,
        label_file=read.label_file,
        label_names=(given,) if given else COLUMNS["label"],
    )


def decisions_on(
    archive: LabelledImages, files: Sequence[Path], on_conflict: str = "error"
) -> tuple[LabelledImages, Decisions]:
    """Decisions on an archive, and the archive without the files that its audit could not read.

    Args:
        archive: of N images.
        files: as `read_decisions` takes them.
        on_conflict: likewise.

    Raises:
        ValueError, OSError: as `read_decisions`; or in an archive of integers a class is none.
    """
    try:
        decisions = read_decisions(files, archive.paths, archive.labels, on_conflict)
    except OtherArchiveError:
        # An audit of class folders leaves out what cannot be read; which that is takes decoding all of them.
        kept = _readable(archive)
        if len(kept) == len(archive):
            raise
        archive = kept
        decisions = read_decisions(files, archive.paths, archive.labels, on_conflict)
    wrong = sorted(name for name in set(decisions.decided) - {""} if archive.of_integers and not _is_integer(name))
    if wrong:
        raise ValueError(f"decided: expected integers from 0, as the labels of {archive.name} are, got {wrong[0]!r}")
    return archive, decisions


def _is_integer(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _readable(archive: LabelledImages) -> LabelledImages:
    """The images of class folders that can be decoded; other archives as they are."""
    folder, paths = archive.folder, archive.paths
    if archive.label_file is not None or folder is None or paths is None:
        return archive
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: isinstance(archive.decoding.read(str(folder / path)), str), paths)
        kept = [image for image, unreadable in enumerate(found) if not unreadable]
    return replace(archive, labels=[archive.labels[i] for i in kept], paths=[paths[i] for i in kept])
