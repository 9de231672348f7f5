"""Finished runs, read from the files that `results.evaluate` writes.

Shapes: N training images, M test images, D features.
"""

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.results import FIGURES, RESULTS
from ntdne_kernels.experiments.settings import RATELESS

NOISES = {
    "none": "labels are used as they are, and metrics are by them",
    "uniform": "a wrong label is any other class, each as likely",
    "label-dependent": "a wrong label is one of a few classes that resemble the true one",
    "matrix": "wrong labels by a given matrix of probabilities",
}
TABLE_SETTINGS = ("loss", "loss_options", "noise", "rate", "seed")  # shown by the row and column of a table
MIN_SWEEP = 3  # values of k

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """A finished run: what its results.json holds, and where it lies.

    `rate` is 0 where the noise has none. `distinction` names the settings in which this run differs from others of the
    same dataset, noise, rate, loss and variant, as "epochs=3".
    """

    folder: Path
    dataset: str
    loss: str
    variant: str
    noise: str
    rate: float
    seed: int
    epochs: int
    settings: dict[str, Any]
    classes: list[str]
    counts: dict[str, int]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    distinction: str = ""

    @property
    def cell(self) -> tuple[str, str, float]:
        """The row of the tables: dataset, noise and rate."""
        return self.dataset, self.noise, self.rate

    @property
    def name(self) -> str:
        """The column of the tables: loss, variant and distinction."""
        return f"{self.loss} {', '.join(filter(None, [self.variant, self.distinction]))}".strip()

    @property
    def options(self) -> dict[str, Any]:
        """Options of the loss."""
        options: dict[str, Any] = self.settings.get("loss_options", {})
        return options

    @property
    def k(self) -> float | str | None:
        """The threshold k of a run whose variant is plain or names k alone; None for other runs."""
        match = re.fullmatch("k=([^,]+)", self.variant)
        if not match and (self.variant or "k" not in self.options):
            return None
        k = match[1] if match else as_text(self.options["k"])
        return float(k) if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", k) else k

    def array(self, name: str) -> NDArray[Any] | None:
        """An array of figures.npz, None where it is not there; ValueError where the file is broken."""
        path = self.folder / FIGURES
        if not path.exists():
            return None
        try:
            with np.load(path) as arrays:
                return np.asarray(arrays[name]) if name in arrays else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None


def read_runs(root: Path) -> list[Run]:
    """All finished runs in a folder, at any depth, ordered as in the tables: rows, the paper's columns, others, seeds.

    Raises:
        ValueError: there is none, one is broken, or two are the same run.
    """
    paths = sorted(root.rglob(RESULTS))
    if not paths:
        raise ValueError(f"runs: no {RESULTS} in {root} or its folders, so no run has finished there")
    runs = _with_distinctions(_with_archives_apart([_read(path) for path in paths]))
    for same in grouped(runs, lambda run: (run.cell, run.name, run.seed)).values():
        if len(same) > 1:
            raise ValueError(f"runs: {same[0].folder} and {same[1].folder} hold the same run; report on one of them")
    noises = list(NOISES)
    return sorted(runs, key=lambda run: (run.dataset, noises.index(run.noise), run.rate, column_key(run), run.seed))


def column_key(run: Run) -> tuple[Any, ...]:
    """Sorts runs as the columns of tables: the paper's losses, then their variants, then others."""
    known = METHODS.index(run.loss) if run.loss in METHODS else len(METHODS)
    return run.variant != "" or run.loss not in METHODS, known, run.name


def grouped(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    """The runs by key, in their order."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def columns(runs: Iterable[Run]) -> list[Run]:
    """The first run of each name, in the order of the tables."""
    return sorted((same[0] for same in grouped(runs, lambda run: run.name).values()), key=column_key)


def row_labels(cell: tuple[str, str, float]) -> list[str]:
    """Dataset, noise and rate of a row as text; "" for the rate where the noise has none."""
    dataset, noise, rate = cell
    return [dataset, noise, "" if noise in RATELESS else f"{rate:g}"]


def without_sweeps(runs: Iterable[Run]) -> list[Run]:
    """The runs but those of a sweep: of a loss with three or more numeric k in a cell beside the plain loss."""
    runs = list(runs)
    swept = set()
    for same in grouped(runs, lambda run: (run.cell, run.loss)).values():
        names = {run.name for run in same if run.variant and isinstance(run.k, float)}
        if len(names) >= MIN_SWEEP and any(not run.variant for run in same):
            swept |= {(same[0].cell, name) for name in names}
    return [run for run in runs if (run.cell, run.name) not in swept]


def flat_settings(run: Run) -> dict[str, str]:
    """The settings that rows and columns of tables do not show, as text; the loss's options one by one."""
    settings = {name: value for name, value in run.settings.items() if name not in TABLE_SETTINGS}
    return {name: as_text(value) for name, value in (settings | loss_settings(run.options)).items()}


def loss_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a loss under names that no other setting has."""
    return {f"loss {name}": value for name, value in options.items()}


def as_text(value: Any) -> str:
    """A setting as a report shows it.

    Example:
        >>> as_text({"k": None, "sigma": 0.1})
        'k=none, sigma=0.1'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = ", ".join(f"{name}={as_text(each)}" for name, each in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(as_text, value)) or "all"  # no classes or bands named: all
    return "none" if value in (None, "") else str(value)


def differing(settings: list[dict[str, str]]) -> list[str]:
    """Names of the settings that are not the same in all, in their order."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name) for each in settings}) > 1]


def _with_archives_apart(runs: list[Run]) -> list[Run]:
    """The runs, with where their images are in the name of an archive that shares its name with another."""

    def place(run: Run) -> str:
        return str(run.settings.get("data", ""))

    def apart(same: list[Run]) -> list[Run]:
        if len(set(map(place, same))) == 1:
            return same
        return [dataclasses.replace(run, dataset=f"{run.dataset} ({place(run)})") for run in same]

    return [run for same in grouped(runs, lambda run: run.dataset).values() for run in apart(same)]


def _with_distinctions(runs: list[Run]) -> list[Run]:
    """The runs, with a `distinction` where tables would otherwise take runs of other settings for seeds of one run."""
    names_of: dict[tuple[str, str], dict[str, None]] = {}
    for (_, loss, variant), same in grouped(runs, lambda run: (run.cell, run.loss, run.variant)).items():
        names_of.setdefault((loss, variant), {}).update(dict.fromkeys(differing([flat_settings(run) for run in same])))

    def distinct(run: Run) -> Run:
        settings = flat_settings(run)
        names = [f"{name}={settings.get(name, 'default')}" for name in names_of[run.loss, run.variant]]
        return dataclasses.replace(run, distinction=", ".join(names))

    return [distinct(run) for run in runs]


NUMBER = (int, float)
CONTENT: dict[str, Any] = {  # of results.json
    "dataset": str,
    "loss": str,
    "variant": str,
    "noise": str,
    "rate": NUMBER,
    "seed": int,
    "epochs": int,
    "settings": dict,
    "classes": list,
    "counts": dict,
    "metrics": dict,
    "history": list,
}


def _read(path: Path) -> Run:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected the results of a run, got {type(found).__name__}")
    for name, kind in CONTENT.items():
        if not isinstance(found.get(name), kind):
            expected = "number" if kind is NUMBER else kind.__name__
            raise ValueError(f"{path}: expected {name} of type {expected}, got {found.get(name)!r}")
    _check_values(path, found)
    optional = {name: found[name] for name in ("seconds", "versions") if name in found}
    rate = 0.0 if found["noise"] in RATELESS else float(found["rate"])
    return Run(path.parent, **({name: found[name] for name in CONTENT} | {"rate": rate} | optional))


def _check_values(path: Path, found: dict[str, Any]) -> None:
    if found["noise"] not in NOISES:
        raise ValueError(f"{path}: expected noise to be one of {', '.join(NOISES)}, got {found['noise']!r}")
    for part in ("counts", "metrics"):
        for name, value in found[part].items():
            if not isinstance(value, NUMBER):
                raise ValueError(f"{path}: expected a number as {name} in {part}, got {value!r}")
    for name in ("train", "validation", "test", "flipped"):
        if name not in found["counts"]:
            raise ValueError(f"{path}: expected {name} in counts, got {', '.join(found['counts']) or 'nothing'}")
    if not all(isinstance(row, dict) and "epoch" in row for row in found["history"]):
        raise ValueError(f"{path}: expected an epoch in each row of history")
    if 0 < len(found["history"]) < found["epochs"]:
        raise ValueError(
            f"{path}: the run is trained for {len(found['history'])} of its {found['epochs']} epochs, and would be "
            "averaged with finished ones; finish it with ntdne train, or move its folder away"
        )
