"""The file of results: a row for each finished run, appended at once."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd


class Run(NamedTuple):
    """A loss with a learning rate, under a noise."""

    noise: str
    rate: float
    seed: int
    method: str
    lr: float


IDENTITY = ["archive", "epochs", *Run._fields]
METRICS = ["knn", "knn_given", "held_out", "map20_hits", "nmi", "acc"]
NUMBERS = [*METRICS, "loss", "pruned", "seconds"]
COLUMNS = [*IDENTITY, *NUMBERS, "torch", "failure"]
"""What identifies a run; what `benchmarks.frozen.training` found; "" or why there is nothing."""


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row; a new file gets a head first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row], columns=COLUMNS).to_csv(path, mode="a", header=not path.exists(), index=False)


def read(path: Path) -> pd.DataFrame:
    """The rows of a file; none where there is no file.

    Raises:
        ValueError: The file has other columns.
    """
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in NUMBERS}, dtype={"archive": str})
    if list(rows.columns) != COLUMNS:
        raise ValueError(f"output: expected a file that this command has written, but {path} has other columns")
    return rows


def read_own(path: Path, archive: str, epochs: int) -> pd.DataFrame:
    """The rows of a file that holds one archive, by its checksum, and trainings of so many epochs.

    Raises:
        ValueError: The file holds others, or has other columns.
    """
    rows = read(path)
    if len(rows[(rows.archive != archive) | (rows.epochs != epochs)]):
        raise ValueError(
            f"output: expected a file of archive {archive} and {epochs} epochs, but {path} has rows of "
            f"{rows.archive[0]} and {rows.epochs[0]}"
        )
    return rows
