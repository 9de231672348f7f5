"""Decisions and an audit's scores as files that FiftyOne, Label Studio and CVAT import, and as cleanlab's table.

Shapes: N images.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntdne_kernels.experiments.features import as_utf8
from ntdne_kernels.experiments.reviewing.decisions import Decisions, label_names
from ntdne_kernels.experiments.reviewing.labelled import LabelledImages
from ntdne_kernels.interchange import to_cvat, to_fiftyone, to_label_studio

if TYPE_CHECKING:
    import pandas as pd

TOOLS: Mapping[str, Callable[["pd.DataFrame"], dict[str, str]]] = {
    "fiftyone": to_fiftyone,
    "label-studio": to_label_studio,
    "cvat": to_cvat,
}
TABLE = "cleanlab"


def exports(archive: LabelledImages, decisions: Decisions, kinds: Sequence[str], scores: Path | None) -> dict[str, str]:
    """The texts of the files by their names, as "cvat/labels.json".

    Args:
        archive: of N images.
        decisions: on it.
        kinds: names of TOOLS, or TABLE.
        scores: the table of `ntdne audit`, .csv or .parquet; None: there are no scores.

    Raises:
        ValueError: images have no names, which tools need, or the table is of other images or none of an audit.
        OSError: the table cannot be read.
    """
    if not kinds:
        return {}
    if archive.paths is None and set(kinds) != {TABLE}:
        raise ValueError(f"--export: {archive.name} has no names of its images' files; --paths gives them")
    frame = decisions.add_to(_frame(archive, scores))
    files = {f"{TABLE}.csv": frame.to_csv(index=False)} if TABLE in kinds else {}
    for kind in (kind for kind in TOOLS if kind in kinds):
        files |= {f"{kind}/{name}": text for name, text in TOOLS[kind](frame).items()}
    return files


def _frame(archive: LabelledImages, scores: Path | None) -> "pd.DataFrame":
    """A row for each image: its name, its label, and the scores."""
    import pandas as pd

    given = label_names(archive.labels)
    columns = {} if archive.paths is None else {"path": archive.paths}
    frame = pd.DataFrame(columns | {"given_label": [label or None for label in given]}, dtype=object)
    if scores is None:
        return frame
    found = _read_scores(scores)
    names = frame["path"].map(as_utf8).tolist() if "path" in frame else []
    same = found["given_label"].fillna("").tolist() == given
    if not same or ("path" in found and found["path"].map(as_utf8).tolist() != names):
        raise ValueError(f"--scores: {scores} is of other images or labels than {archive.name}")
    return found.drop(columns=["image", "path"], errors="ignore").assign(**frame)[
        [*frame.columns, *(name for name in found.columns if name not in ("image", *frame.columns))]
    ]


def _read_scores(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            found = pd.read_parquet(path)
        else:
            text = dict.fromkeys(("path", "given_label", "predicted_label"), str)
            found = pd.read_csv(
                path, keep_default_na=False, na_values=[""], dtype=text, encoding_errors="surrogateescape"
            )
    except ValueError as error:
        raise ValueError(f"--scores: {path} cannot be read: {error}") from None
    if "given_label" not in found or "label_score" not in found:
        raise ValueError(f"--scores: expected the table of ntdne audit, as audit.csv, got {path}")
    labels = found["given_label"].astype(object)
    return found.assign(given_label=labels.where(labels.isna(), labels.map(str)))
