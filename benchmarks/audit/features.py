"""How well the methods find wrong labels in features that no label had a part in: those of a pretrained network, say.

Labels are made wrong by known noise, from several seeds. Runs that a table has already are not made again, so that a
command that was killed goes on where it was.

Shapes: N images, D features, C classes.
"""

import csv
import os
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.audit.evidence import measures
from benchmarks.audit.methods import METHODS
from ntdne_kernels.experiments import noise

NOISES = [("uniform", 0.1), ("uniform", 0.3), ("uniform", 0.5), ("label-dependent", 0.1), ("label-dependent", 0.3)]
CONFUSIONS = Path(__file__).parent.parent / "digits_confusions.yaml"
Row = dict[str, Any]


class Features(NamedTuple):
    """Features (N, D), their right labels (N,) and the names of the C classes."""

    name: str
    rows: Tensor
    labels: Tensor
    classes: list[str]


def read_features(features: Path | None, labels: Path | None, classes: Path | None) -> Features:
    """From .npy files and a list of names, one a line; without them the pixels of scikit-learn's digits."""
    if features is None or labels is None or classes is None:
        digits = load_digits()
        names = [str(name) for name in digits.target_names]
        return Features("digits", torch.tensor(digits.data).float(), torch.tensor(digits.target), names)
    names = classes.read_text().split()
    rows = torch.from_numpy(np.load(features)).float()
    return Features(noise.dataset_of(names) or features.stem, rows, torch.from_numpy(np.load(labels)).long(), names)


def transition(classes: list[str], kind: str, rate: float) -> Tensor:
    """The matrix (C, C) of a noise: the authors' map where there is one for the classes, else that of the digits."""
    if kind == "uniform":
        return noise.uniform(len(classes), rate)
    if noise.dataset_of(classes):
        return noise.authors_map(classes, rate)
    targets = {str(name): str(target) for name, target in yaml.safe_load(CONFUSIONS.read_text()).items()}
    return noise.one_target(noise.targets_by_name(classes, targets), rate)


def audit_features(archive: Features, seeds: int, path: Path) -> None:
    """Add the rows that `path` lacks of this archive: of each seed, noise, method and metric.

    The methods take turns, so that what slows the machine down slows all of them.
    """
    rows = read_rows(path) if path.exists() else []
    done = {(row["dataset"], row["method"], row["seed"], row["noise"], row["rate"]) for row in rows}
    for seed, (kind, rate), method in product(range(seeds), NOISES, METHODS):
        run = {"dataset": archive.name, "noise": kind, "rate": str(rate), "seed": str(seed), "method": method}
        if (archive.name, method, str(seed), kind, str(rate)) in done:
            continue
        noisy = noise.corrupt(archive.labels, transition(archive.classes, kind, rate), seed)
        begun = cpu_seconds()
        verdict = METHODS[method](archive.rows, noisy.labels)
        seconds = cpu_seconds() - begun
        for suspects, metric, value in [*measures(verdict, noisy.flipped), ("", "seconds", seconds)]:
            rows.append(run | {"suspects": suspects, "metric": metric, "value": value})
        write_rows(rows, path)
        print(*run.values(), f"{seconds:.1f} s", flush=True)


def cpu_seconds() -> float:
    """Of this process and of those it started: other work on the machine does not count."""
    return sum(os.times()[:4])


def read_rows(path: Path) -> list[Row]:
    """The rows of a .csv."""
    with path.open() as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[Row], path: Path) -> None:
    """Replace a .csv in one step."""
    written = path.with_suffix(".new")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    written.replace(path)
