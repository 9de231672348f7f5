"""Decisions of people on labels: decisions.csv read, checked against its archive, and merged from several people.

A file is UTF-8 with a header and a row for each decision; further columns are passed over:

    image    name of the image's file, or its row from 0 where names are missing or not unique, see `image_names`
    given    the label that it had, empty for unlabelled
    verdict  keep, relabel, unsure (cannot tell) or exclude
    decided  the class, of keep the given one; empty for unsure and exclude. A name in another form of Unicode is the
             archive's class; in other letters, large or small, it is refused
    when     UTC, as 2026-01-31T12:34:56.789Z; empty counts as before all others
    archive  see `archive_id`; empty, as in a list written by hand, is checked by image and given alone

Shapes: N images of the archive, n decisions.
"""

import csv
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED, check_choice
from ntdne_kernels.experiments.features import as_utf8
from ntdne_kernels.labels import encode_labels, unicode_forms

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = KEEP, RELABEL, UNSURE, EXCLUDE = ("keep", "relabel", "unsure", "exclude")
COLUMNS = ("image", "given", "verdict", "decided", "when", "archive")
ON_CONFLICT = ("error", "latest", "skip")
MAX_NAMED = 3  # wrong rows in a message


class ConflictError(ValueError):
    """People decided differently on the same images.

    Attributes:
        conflicts: the name of each of these images, with what each file says of it.
    """

    def __init__(self, conflicts: dict[str, dict[str, str]]) -> None:
        self.conflicts = conflicts
        image, said = next(iter(conflicts.items()))
        each = ", ".join(f"{verdict} in {file}" for file, verdict in said.items())
        super().__init__(f"{len(conflicts)} images have conflicting decisions, as {image}: {each}")


class OtherArchiveError(ValueError):
    """Decisions are of another archive."""


@dataclass(frozen=True)
class Decisions:
    """What people decided on n of an archive's N images, one decision for each, in the order of the archive.

    Example:
        >>> decisions = Decisions(torch.tensor([1, 2]), torch.tensor([1, 3]), ["oak", ""], ["", ""])
        >>> decisions.counts()
        {'keep': 0, 'relabel': 1, 'unsure': 0, 'exclude': 1}
        >>> labels, classes = decisions.apply(["ash", "ash", "elm"])
        >>> labels, classes
        (tensor([ 0,  2, -1]), ('ash', 'elm', 'oak'))

    Attributes:
        images: (n,) int64 positions in the archive, ascending.
        verdicts: (n,) int64 positions in VERDICTS.
        decided: n names of classes; "" where nothing was decided (unsure, exclude).
        when: n times as in the file; "" where it says none.
    """

    images: Tensor
    verdicts: Tensor
    decided: list[str]
    when: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def having(self, *verdicts: str) -> Tensor:
        """(m,) positions in the archive of the images with one of these verdicts."""
        codes = torch.tensor([VERDICTS.index(verdict) for verdict in verdicts], dtype=torch.int64)
        return self.images[torch.isin(self.verdicts, codes)]

    def counts(self) -> dict[str, int]:
        """How many decisions there are of each verdict."""
        return dict(zip(VERDICTS, torch.bincount(self.verdicts, minlength=len(VERDICTS)).tolist(), strict=True))

    def apply(self, labels: Any, *, drop_unsure: bool = False) -> tuple[Tensor, tuple[Any, ...]]:
        """The labels with the decisions: what `MemoryBank.relabel` and an audit take.

        Args:
            labels: (N,) of the archive, as `encode_labels` takes them.
            drop_unsure: images of which people cannot tell become unlabelled too.

        Returns:
            The codes (N,) int64, −1 for unlabelled and excluded images, and the classes by code: those of the labels
            as `encode_labels` orders them, so that their codes stay, and after them new ones by name.

        Raises:
            TypeError, ValueError: as `encode_labels`.
        """
        codes, classes = encode_labels(labels)
        code_of = {str(name): code for code, name in enumerate(classes)}
        for name in sorted(set(self.decided) - {""} - set(code_of)):
            code_of[name] = len(code_of)
        new = tuple(code_of)[len(classes) :]
        kept = torch.tensor([name != "" for name in self.decided], dtype=torch.bool)
        codes = codes.clone()
        codes[self.images[kept]] = torch.tensor([code_of[name] for name in self.decided if name], dtype=torch.int64)
        codes[self.having(EXCLUDE, *([UNSURE] if drop_unsure else []))] = UNLABELLED
        return codes, classes + new

    def add_to(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """A table of the archive's N images, as `interchange.to_frame` makes it, with what was decided.

            verdict          categorical; missing where nothing was decided
            corrected_label  the decided class, the given one where there is none, missing where excluded; categorical
            decided_at       the time; missing where it is not known

        Args:
            frame: has a column given_label, and a row for each image in order.

        Raises:
            ImportError: pandas is missing.
        """
        import pandas as pd

        given = frame["given_label"].astype(object)
        codes, classes = self.apply([None if pd.isna(label) else label for label in given])
        verdicts = torch.full((len(frame),), -1, dtype=torch.int64)
        verdicts[self.images] = self.verdicts
        when = pd.Series(pd.NaT, index=frame.index, dtype="datetime64[ms, UTC]")
        when.iloc[self.images.tolist()] = pd.to_datetime(pd.Series(self.when), utc=True, format="ISO8601").to_numpy()
        return frame.assign(
            verdict=pd.Categorical.from_codes(verdicts.numpy(), list(VERDICTS)),
            corrected_label=pd.Categorical.from_codes(codes.numpy(), list(classes)),
            decided_at=when,
        )


def archive_id(paths: Sequence[str] | None, labels: Any) -> str:
    """16 hex digits that differ wherever the images' names, their order or their given labels do.

    Example:
        >>> archive_id(["1.png", "2.png"], ["ash", None])
        '1aaa675193af34c0'

    Args:
        paths: N file names, or None.
        labels: (N,) given labels, as `encode_labels` takes them.

    Raises:
        TypeError, ValueError: as `encode_labels`.
    """
    given = label_names(labels)
    names = image_names(paths, len(given))
    found = hashlib.sha256()
    for name, label in zip(names, given, strict=True):
        found.update(f"{name}\0{label}\0".encode())
    return found.hexdigest()[:16]


def image_names(paths: Sequence[str] | None, N: int) -> list[str]:
    """How decisions name the N images: by their files, or by their rows where these are missing or not unique.

    Example:
        >>> image_names(["1.png", "2.png"], 2), image_names(["1.png", "1.png"], 2), image_names(None, 2)
        (['1.png', '2.png'], ['0', '1'], ['0', '1'])
    """
    if paths is not None:
        names = list(map(as_utf8, paths))
        if all(names) and len(set(names)) == N:
            return names
    return list(map(str, range(N)))


def label_names(labels: Any) -> list[str]:
    """The name (N,) of each image's label, "" for unlabelled; argument and errors as `encode_labels`."""
    codes, classes = encode_labels(labels)
    names = [*map(str, classes), ""]  # the last one for −1
    return [names[code] for code in codes.tolist()]


def read_decisions(
    files: str | Path | Sequence[str | Path], paths: Sequence[str] | None, labels: Any, on_conflict: str = "error"
) -> Decisions:
    """The decisions in files of one or more people, of the archive with these names and labels.

    Of several rows of one file for an image the one with the latest `when` counts, of equal ones the last.

    Args:
        files: decisions.csv, one for each person.
        paths: names of the archive's N files, or None.
        labels: (N,) labels of the archive, as `encode_labels` takes them.
        on_conflict: where two files decide differently on an image: "error"; "latest" decision counts (of equal times
            that of the last file); or "skip" the image.

    Raises:
        ConflictError: a ValueError, for "error": files decide differently.
        OtherArchiveError: a ValueError: a file is of another archive; the message names the first rows.
        ValueError: a file holds no decisions, or wrong ones; or a new class differs from another in letter case alone.
        OSError: a file cannot be read.
    """
    check_choice("on_conflict", on_conflict, ON_CONFLICT)
    sources = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    given, identity = label_names(labels), archive_id(paths, labels)
    names = image_names(paths, len(given))
    position = {name: image for image, name in enumerate(names)}
    forms = {form: same[0] for form, same in unicode_forms(given).items()}
    said = [_of_one_file(file, _rows(file, forms), position, given, identity) for file in sources]
    _check_case(sources, said, given)
    chosen, conflicts = _merged(said, on_conflict)
    if conflicts:
        raise ConflictError(
            {
                names[image]: {
                    str(file): f"{rows[image].verdict} {rows[image].decided}".strip()
                    for file, rows in zip(sources, said, strict=True)
                    if image in rows
                }
                for image in conflicts
            }
        )
    images = sorted(chosen)
    return Decisions(
        torch.tensor(images, dtype=torch.int64),
        torch.tensor([VERDICTS.index(chosen[image].verdict) for image in images], dtype=torch.int64),
        [chosen[image].decided for image in images],
        [chosen[image].when for image in images],
    )


class _Row(NamedTuple):
    line: int
    image: str
    given: str
    verdict: str
    decided: str
    when: str
    archive: str

    @property
    def time(self) -> datetime:
        if not self.when:
            return datetime.min.replace(tzinfo=UTC)
        time = datetime.fromisoformat(self.when)
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    @property
    def fault(self) -> str:
        """What is wrong with the row by itself; "" for nothing."""
        try:
            _ = self.time
        except ValueError:
            return f"when: expected a time as 2026-01-31T12:34:56.789Z, got {self.when!r}"
        if self.verdict not in VERDICTS:
            return f"verdict: expected one of {', '.join(VERDICTS)}, got {self.verdict!r}"
        expected = {KEEP: self.given, RELABEL: self.decided, UNSURE: "", EXCLUDE: ""}[self.verdict]
        if self.decided != expected:
            return f"decided: expected {expected!r} for {self.verdict}, got {self.decided!r}"
        if self.verdict in (KEEP, RELABEL) and not self.decided:
            return f"decided: expected a class for {self.verdict}, got none"
        if self.verdict == RELABEL and self.decided == self.given:
            return f"decided: expected another class than the given one for relabel, got {self.decided!r}"
        return ""


def _rows(file: Path, forms: dict[str, str]) -> list[_Row]:
    """The rows of a file, with the archive's names of its classes, by their Unicode form NFC, and NFC of others."""

    def known(name: str) -> str:
        form = unicodedata.normalize("NFC", name)
        return forms.get(form, form)

    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{file} holds no decisions: expected columns {','.join(COLUMNS)}, got no {missing[0]}"
                )
            rows = []
            for row in reader:
                if None in row.values() or None in row:
                    raise ValueError(
                        f"{file}: expected {len(reader.fieldnames or ())} values in line {reader.line_num}"
                    )
                values = {name: row[name] if name == "image" else row[name].strip() for name in COLUMNS}
                values |= {name: known(values[name]) for name in ("given", "decided")}
                if not any(values.values()):  # what a spreadsheet leaves of a row whose cells were emptied
                    continue
                rows.append(_Row(reader.line_num, **values))
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _of_one_file(
    file: Path, rows: list[_Row], position: dict[str, int], given: list[str], identity: str
) -> dict[int, _Row]:
    """The row that counts of each image, by its position; ValueError where rows are wrong or of another archive."""
    faults = [f"line {row.line}: {row.fault}" for row in rows if row.fault]
    if faults:
        raise ValueError(f"{file}: {_first(faults)}")
    strange = []
    for row in rows:
        if row.image not in position:
            strange.append(f"line {row.line}: there is no image {row.image}")
        elif row.given != (label := given[position[row.image]]):
            strange.append(f"line {row.line}: {row.image} has the label {label!r} and not {row.given!r}")
    others = {row.archive for row in rows} - {"", identity}
    if strange or others:
        reason = _first(strange) or f"its archive is {min(others)}, and this one, by its names and labels, {identity}"
        raise OtherArchiveError(f"{file} is of another archive: {reason}")
    found: dict[int, _Row] = {}
    for row in sorted(rows, key=lambda row: row.time):  # stable, so that of equal times the last row counts
        found[position[row.image]] = row
    return found


def _check_case(files: Sequence[Path], said: list[dict[int, _Row]], given: list[str]) -> None:
    """ValueError where a new class differs in letter case alone from one of the archive or another new one."""
    classes = set(given)
    known = {name.casefold(): name for name in sorted(classes)}
    for file, rows in zip(files, said, strict=True):
        for row in rows.values():
            name = known.setdefault(row.decided.casefold(), row.decided)
            if row.decided not in classes and row.decided != name:
                raise ValueError(
                    f"{file}: line {row.line}: decided: {row.decided!r} differs from the class {name!r} in letter case "
                    "alone; write one of them everywhere"
                )


def _merged(said: list[dict[int, _Row]], on_conflict: str) -> tuple[dict[int, _Row], list[int]]:
    """One row for each image, and the images of which that cannot be said."""
    by_image: dict[int, list[_Row]] = {}
    for each in said:
        for image, row in each.items():
            by_image.setdefault(image, []).append(row)
    split = sorted(image for image, rows in by_image.items() if len({(row.verdict, row.decided) for row in rows}) > 1)
    latest = {image: sorted(rows, key=lambda row: row.time)[-1] for image, rows in by_image.items()}
    if on_conflict == "skip":
        return {image: row for image, row in latest.items() if image not in set(split)}, []
    return latest, split if on_conflict == "error" else []


def _first(faults: Iterable[str]) -> str:
    faults = list(faults)
    more = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    return "; ".join(faults[:MAX_NAMED]) + more
