"""The file of results: a row for each evaluated epoch of a run, appended at once."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.markdown import print_head, print_row

IDENTITY = ["dataset", "encoder", "split", "noise", "rate", "seed", "epochs", "batch_size", "method", "lr"]
RATES = ["knn", "knn_given", "map20_total", "map20_hits", "map20_min", "flip_auroc", "nmi", "acc"]
COLUMNS = [*IDENTITY, "epoch", "loss", "pruned", *RATES, "seconds", "device", "torch"]
"""What identifies a run; epochs trained so far, the last one's mean loss, the share of pruned images; metrics."""
Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add a line by a single write, so that the lines of several processes stay whole."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def read(path: Path) -> list[Row]:
    """The rows of a file, which is made where there is none. Of a run that was begun twice, the later rows count.

    Raises:
        ValueError: The file has other columns.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(COLUMNS) + "\n")
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        if found.fieldnames != COLUMNS:
            raise ValueError(f"output: expected a file that this command has written, but {path} has other columns")
        return list({(*key(row), row["epoch"]): row for row in found}.values())


def key(row: Row) -> tuple[str, ...]:
    """What tells runs apart."""
    return tuple(str(row[name]) for name in IDENTITY)


def table(results: Iterable[Row]) -> None:
    """Print the metrics of the last epochs in %, as Markdown."""
    print_head(["method", "lr", "epochs", *RATES])
    for row in results:
        if row["epoch"] == row["epochs"]:
            percent = [f"{100 * float(row[name]):.1f}" if row[name] else "" for name in RATES]
            print_row([row["method"], row["lr"], row["epochs"], *percent])
