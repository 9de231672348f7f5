"""Fixtures of the reviewing tests: an archive of six images in three classes, and files of decisions on it."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from ntdne_kernels.experiments.reviewing import archive_id

PATHS = ["ash/1.png", "ash/2.png", "elm/1.png", "elm/2.png", "oak/1.png", "oak/2.png"]
LABELS = ["ash", "ash", "elm", "elm", "oak", "oak"]
COLUMNS = ("image", "given", "verdict", "decided", "when", "archive")


@pytest.fixture
def archive() -> tuple[list[str], list[str]]:
    """Names and labels, as `read_decisions` takes them."""
    return list(PATHS), list(LABELS)


@pytest.fixture
def decide(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (image, given, verdict, decided[, when]) as decisions.csv of this archive, or of another."""

    def write(*rows: tuple[str, ...], name: str = "decisions.csv", archive: str | None = None) -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for image, given, verdict, decided, *when in rows:
                identity = archive_id(PATHS, LABELS) if archive is None else archive
                writer.writerow([image, given, verdict, decided, when[0] if when else "", identity])
        return path

    return write
