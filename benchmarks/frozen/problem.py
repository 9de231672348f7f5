"""The problem that all runs of one noise, rate and seed share: features by split, and given labels.

Shapes: N images of the archive, F features that come in, P principal components, n images of a part.
"""

import zlib
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.audit import audit_labels
from ntdne_kernels.experiments import noise
from ntdne_kernels.experiments.splits import Split, split

COMPONENTS = 256  # P, or F where that is less


class Archive(NamedTuple):
    """Features (N, F) float32 of all images, their right labels (N,) int64, and the classes' names."""

    features: Tensor
    labels: Tensor
    classes: list[str]
    checksum: str


class Source(NamedTuple):
    """The files of an archive: features (N, F) .npy, and right labels (N,) .npy, names or numbers of classes."""

    features: Path
    labels: Path


class Column(NamedTuple):
    """A kind of noise, "uniform" or "label-dependent", at a rate."""

    noise: str
    rate: float


class Problem(NamedTuple):
    """Rows (n, P) of training, validation and test images, their right labels (n,), and those given to two parts."""

    train: Tensor
    validation: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    train_given: Tensor
    validation_given: Tensor


@cache
def read(source: Source) -> Archive:
    """The archive of these files.

    Raises:
        ValueError: They do not belong together or are not as `Source` says.
        OSError: A file cannot be read.
    """
    features, labels = np.load(source.features), np.load(source.labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.dtype.kind not in "iuU":
        raise ValueError(
            f"features, labels: expected (N, F) numbers and (N,) names or whole numbers, got {features.shape} and "
            f"{labels.shape} of {labels.dtype}"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"features: expected finite numbers, got others in row {np.argwhere(~np.isfinite(features))[0, 0]}"
        )
    names, classes = np.unique(labels, return_inverse=True)
    checksum = f"{zlib.crc32(classes.astype(np.int64).tobytes(), zlib.crc32(features.tobytes())):08x}"
    return Archive(
        torch.from_numpy(features).float(), torch.from_numpy(classes).long(), [str(name) for name in names], checksum
    )


@lru_cache(maxsize=1)
def projected(source: Source, seed: int) -> tuple[Split, Tensor]:
    """The split, and the rows (N, P) of all images on the principal components of the training rows.

    They are centred and divided by one number, with which the training rows' values have a mean square of 1.
    """
    archive = read(source)
    parts = split(archive.labels, "seeded", seed)
    train = archive.features[parts.train]
    mean = train.mean(dim=0)
    covariance = torch.cov(train.T)
    _, axes = torch.linalg.eigh(covariance)  # ascending
    rows = (archive.features - mean) @ axes[:, -COMPONENTS:]
    return parts, rows / rows[parts.train].square().mean().sqrt()


def make_problem(source: Source, column: Column, seed: int) -> Problem:
    """Split by the seed (70/10/20 of each class), and make labels wrong of training and validation images.

    Raises:
        ValueError: The classes are not those of an archive that has a map of label-dependent noise.
    """
    archive = read(source)
    parts, rows = projected(source, seed)
    if column.noise == "uniform":
        matrix = noise.uniform(int(archive.labels.max()) + 1, column.rate)
    else:
        matrix = noise.authors_map(archive.classes, column.rate)
    labels = archive.labels
    return Problem(
        train=rows[parts.train],
        validation=rows[parts.validation],
        test=rows[parts.test],
        train_labels=labels[parts.train],
        test_labels=labels[parts.test],
        train_given=noise.corrupt(labels[parts.train], matrix, seed).labels,
        validation_given=noise.corrupt(labels[parts.validation], matrix, seed).labels,
    )


def audited(problem: Problem, treatment: str) -> tuple[Tensor, Tensor]:
    """Rows (n, P) to train on and their labels (n,), after an audit of the training images by both.

    Suspects are "left out", or "corrected": they get the class that the audit suggests.
    """
    audit = audit_labels(problem.train, problem.train_given)
    if treatment == "corrected":
        return problem.train, torch.tensor(audit.classes)[audit.corrected()]
    kept = ~audit.suspects()
    return problem.train[kept], problem.train_given[kept]
