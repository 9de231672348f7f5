"""What training needs of an archive that people have decided on: its new labels, in one folder.

{output}/labels.csv    (path or image, label); of class folders without the images that have no label any more
{output}/NAME          the file that the labels were read from, by its name, with the cells changed; or labels.npy
{output}/images/CLASS/ links to the images
{output}/fiftyone/ ... what `exports.py` makes
{output}/relabel.json  of what, and what was written, so that a later run replaces that and nothing else

Shapes: N images.
"""

import csv
import io
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntdne_kernels.experiments.columns import read_values
from ntdne_kernels.experiments.features import as_utf8
from ntdne_kernels.experiments.files import check_folder, check_source, locked, write_whole
from ntdne_kernels.experiments.reviewing.cells import SUFFIXES, write_changed
from ntdne_kernels.experiments.reviewing.decisions import Decisions, label_names
from ntdne_kernels.experiments.reviewing.labelled import LabelledImages
from ntdne_kernels.experiments.reviewing.tree import check_class_names, make_tree, tree_names

LIST, ARRAY, TREE, RECORD = "labels.csv", "labels.npy", "images", "relabel.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class Relabelled:
    """The labels (N,) of an archive before and after.

    Attributes:
        given: names, "" for unlabelled.
        labels: names, None for images that are unlabelled, excluded or dropped.
        written: the files and folders.
        renamed: links that could not keep their images' names.
    """

    given: list[str]
    labels: list[str | None]
    written: list[Path]
    renamed: int

    @property
    def changes(self) -> Counter[tuple[str, str | None]]:
        """How many images went from which label to which, None for left out."""
        pairs = zip(self.given, self.labels, strict=True)
        return Counter((old, new) for old, new in pairs if old != (new or ""))


def check_output(output: Path, inputs: Sequence[Path], archive: Path | None) -> None:
    """Check before anything is read what would otherwise fail after it.

    Args:
        output: the folder to be written.
        inputs: files that are read.
        archive: the folder of the images, if it is known.

    Raises:
        ValueError: the folder lies in the archive, holds an input or anything that no earlier run wrote, or cannot be
            written to.
    """
    check_folder(output, archive)
    for each in inputs:
        if each.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--output: {each} in {output} is read from, and would be replaced; give another folder")
    strange = sorted(_files_in(output) - _recorded(output))
    if strange:
        raise ValueError(
            f"--output: expected a new folder or one of an earlier relabel, but {output} holds {strange[0]}"
            + (f" and {len(strange) - 1} more files" if len(strange) > 1 else "")
        )


def relabel(
    archive: LabelledImages,
    decisions: Decisions,
    output: Path,
    *,
    links: str | None = None,
    drop_unsure: bool = False,
    exports: Mapping[str, str] | None = None,
    origin: str,
) -> Relabelled:
    """Write an archive's labels with the decisions on them; what is read stays as it is.

    Args:
        archive: of N images.
        decisions: on it.
        output: the folder, see `check_output`; it is complete or as it was before.
        links: make a tree of "symbolic" or "hard" links or "copies"; None: make none.
        drop_unsure: images of which people could not tell lose their label too.
        exports: texts of further files by their names.
        origin: what the archive was read from, see `origin_of`.

    Raises:
        ValueError: a folder or a column cannot have a class's name, an image's file is missing, links cannot be made,
            the folder is of another origin, or another process writes there.
        OSError: a file cannot be read or written.
    """
    given = label_names(archive.labels)
    codes, classes = decisions.apply(archive.labels, drop_unsure=drop_unsure)
    labels = [str(classes[code]) if code >= 0 else None for code in codes.tolist()]
    names = _tree_names(archive, given, labels) if links else []
    place = output.resolve()
    partial, old = (place.with_name(f".{place.name}.{state}") for state in ("partial", "old"))
    with locked(output):
        check_source(output / RECORD, origin)
        _clear(place, partial, old)  # of an earlier run that was killed
        try:
            partial.mkdir()
            written = _write_labels(archive, given, labels, partial)
            if links:
                _write_tree(archive, names, partial / TREE, place / TREE, links)
                written.append(partial / TREE)
            for name, text in (exports or {}).items():
                written.append(partial / name)
                written[-1].parent.mkdir(exist_ok=True)
                _write_text(text, written[-1])
            record = {"version": RECORD_VERSION, "source": origin, "written": sorted(_files_in(partial))}
            _write_text(json.dumps(record, indent=1), partial / RECORD)
            if place.exists():
                place.rename(old)
            partial.rename(place)
        finally:
            _clear(place, partial, old)
    renamed = sum(name is not None and Path(name).name != Path(path).name for name, path in _with_paths(names, archive))
    return Relabelled(given, labels, [output / each.relative_to(partial) for each in written], renamed)


def _clear(output: Path, partial: Path, old: Path) -> None:
    """Put back what a run moved away and did not replace, and remove what else it left."""
    if old.exists() and not output.exists():
        old.rename(output)
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)


def _with_paths(names: Sequence[str | None], archive: LabelledImages) -> "zip[tuple[str | None, str]]":
    return zip(names, archive.paths or [], strict=bool(names))


def _files_in(folder: Path) -> set[str]:
    """The files and links in a folder, relative to it, without the record."""
    found = {os.path.relpath(os.path.join(at, file), folder) for at, _, files in os.walk(folder) for file in files}
    return found - {RECORD}


def _recorded(folder: Path) -> set[str]:
    """The files that an earlier run wrote into a folder."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return set(record["written"]) if record["version"] == RECORD_VERSION else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_text(text: str, path: Path) -> None:
    content = text.encode("utf-8", "surrogateescape")  # a file's name may be any bytes
    write_whole(path, lambda file: file.write(content))


# Labels


def _write_labels(
    archive: LabelledImages, given: Sequence[str], labels: Sequence[str | None], folder: Path
) -> list[Path]:
    """The list, and the labels in the kind of file that they were read from."""
    source = archive.label_file
    copy = folder / (source.name if source is not None and source.suffix in SUFFIXES else ARRAY)
    written = [copy] if source is not None else []
    if source is not None and source.suffix in SUFFIXES:
        changes = {i: new for i, (old, new) in enumerate(zip(given, labels, strict=True)) if old != (new or "")}
        write_changed(source, archive.label_names, changes, copy)
        _check_copy(copy, archive, labels)
    elif source is not None:
        write_whole(copy, lambda file: np.save(file, _label_array(archive, labels), allow_pickle=False))
    if copy.name != LIST:  # else that file is such a list
        _write_list(archive, labels, folder / LIST)
        written.insert(0, folder / LIST)
    return written


def _check_copy(copy: Path, archive: LabelledImages, labels: Sequence[str | None]) -> None:
    """ValueError unless the copy of a table says what it should, as ours and other programs read it."""
    found = label_names(read_values(copy, "label", archive.label_names))
    pairs = enumerate(zip(labels, found, strict=False))
    wrong = [i for i, (label, said) in pairs if _nfc(as_utf8(said)) != _nfc(label or "")]
    if wrong or len(found) != len(labels):
        row = wrong[0] if wrong else min(len(found), len(labels))
        expected = (labels[row] if row < len(labels) else None) or "no label"
        raise ValueError(f"{archive.label_file}: row {row} would not be read back as {expected!r}; nothing was written")


def _nfc(name: str) -> str:
    """A class's name in one form of Unicode: of several in a file, which are one class, a copy may have one left."""
    return unicodedata.normalize("NFC", name)


def _label_array(
    archive: LabelledImages, labels: Sequence[str | None]
) -> "np.ndarray[tuple[int], np.dtype[np.generic]]":
    if not archive.of_integers:
        return np.array([label or "" for label in labels])
    values = np.array([-1 if label is None else int(label) for label in labels])
    kept = archive.labels.dtype
    fits = len(values) == 0 or np.iinfo(kept).min <= values.min() <= values.max() <= np.iinfo(kept).max
    return values.astype(kept) if fits else values


def _write_list(archive: LabelledImages, labels: Sequence[str | None], path: Path) -> None:
    """The list (path or image, label), as `ntdne audit --fix` writes it.

    Rows of features keep their places, so images without a label stay in it; class folders need no such rows.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image" if archive.paths is None else "path", "label"])
    names = range(len(labels)) if archive.paths is None else archive.paths
    of_folders = archive.label_file is None
    writer.writerows(row for row in zip(names, labels, strict=True) if not (of_folders and row[1] is None))
    _write_text(text.getvalue(), path)


# Links


def _tree_names(archive: LabelledImages, given: Sequence[str], labels: Sequence[str | None]) -> list[str | None]:
    """The names of the links; ValueError where there are no files, or a class's name suits no folder."""
    if archive.paths is None or archive.folder is None:
        raise ValueError(f"--links: {archive.name} has no files to link to; for features name them: --paths")
    check_class_names({label for label in labels if label is not None}, archive.classes)
    return tree_names(archive.paths, given, labels)


def _write_tree(archive: LabelledImages, names: Sequence[str | None], tree: Path, final: Path, kind: str) -> None:
    """Symbolic links are relative where the tree and the images' folder lie in one folder, which can then be moved."""
    folder = (archive.folder or Path()).resolve()
    together = final.is_relative_to(folder.parent) and folder.parent != Path(folder.anchor)
    files = [folder / path for path in archive.paths or []]
    make_tree(files, names, tree, final if together else None, kind)
