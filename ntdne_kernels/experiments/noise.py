"""Label noise: transition matrices, and drawing wrong labels from them.

Shapes: N images, C classes. A transition matrix P (C, C) is row-stochastic: P[y, z] is the probability that an image of
class y is given the label z (section III-A of the paper), so 1 − P[y, y] is the share of wrong labels in class y.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from ntdne_kernels.arguments import check_choice, check_number
from ntdne_kernels.labels import as_index, as_labels


class NoisyLabels(NamedTuple):
    """Labels after noise: labels (N,) int64, flipped (N,) bool, and the matrix (C, C) float64 they come from."""

    labels: Tensor
    flipped: Tensor
    matrix: Tensor


def uniform(C: int, rate: float) -> Tensor:
    """Transition matrix (C, C) of uniform noise: every wrong label has probability η/(C − 1).

    Args:
        C: number of classes.
        rate: noise rate η from 0 to 1.

    Raises:
        TypeError, ValueError: the rate is no number from 0 to 1, or there is no second class to flip to.

    Example:
        >>> uniform(3, rate=0.5)
        tensor([[0.5000, 0.2500, 0.2500],
                [0.2500, 0.5000, 0.2500],
                [0.2500, 0.2500, 0.5000]], dtype=torch.float64)
    """
    _check_rate(rate)
    if C < 2 and rate > 0:
        raise ValueError(f"C: uniform noise needs two classes or more, got {C}")
    return torch.full((C, C), rate / max(C - 1, 1), dtype=torch.float64).fill_diagonal_(1 - rate)


def one_target(targets: Sequence[int] | Tensor, rate: float) -> Tensor:
    """Transition matrix (C, C) of the paper's label-dependent noise: class c flips to targets[c] with probability η.

    Args:
        targets: C classes from 0 to C − 1; a class whose target is itself keeps its labels.
        rate: noise rate η from 0 to 1.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_rate(rate)
    targets = as_index(targets, "targets")
    C = len(targets)
    _check_classes("targets", targets, C)
    matrix = (1 - rate) * torch.eye(C, dtype=torch.float64)
    matrix[torch.arange(C), targets] += rate
    return matrix


def targets_by_name(classes: Sequence[str], targets: Mapping[str, str]) -> list[int]:
    """The targets of `one_target` from class names; classes that `targets` leaves out keep their labels.

    Raises:
        ValueError: `targets` names something that is no class.

    Example:
        >>> targets_by_name(["lake", "pond", "river"], {"lake": "pond"})
        [1, 1, 2]
    """
    unknown = sorted({*targets.keys(), *targets.values()} - set(classes))
    if unknown:
        raise ValueError(f"targets: expected names of classes, got {_listed(unknown)}")
    return [classes.index(targets.get(name, name)) for name in classes]


def authors_map(classes: Sequence[str], rate: float) -> Tensor:
    """Transition matrix (C, C) of the authors' label-dependent noise for AID or NWPU-RESISC45: (1 − η) I + η W/5.

    W, in label_dependent.yaml, spreads the wrong labels of a class over two to five similar classes, where the paper's
    text speaks of one.

    Args:
        classes: all class names of one of the two archives, in any order; case, spaces, underscores and hyphens do not
            count.
        rate: noise rate η from 0 to 1.

    Raises:
        TypeError, ValueError: the rate is no number from 0 to 1, or the classes are not those of an archive with a map.
    """
    _check_rate(rate)
    dataset = dataset_of(classes)
    if dataset is None:
        raise ValueError(_difference(classes))
    fifths = {_key(source): {_key(target): n for target, n in row.items()} for source, row in _maps()[dataset].items()}
    keys = [_key(name) for name in classes]
    W = torch.tensor([[fifths[source].get(target, 0) for target in keys] for source in keys], dtype=torch.float64)
    # Multinomial draws depend on the last bit of the matrix. The authors wrote AID's diagonal as decimals and computed
    # the other archive's as 1 − η; at η = 0.7 these differ, and only their own numbers give their labels.
    kept = round(1 - rate, 12) if dataset == "AID" else 1 - rate
    return kept * torch.eye(len(classes), dtype=torch.float64) + rate * W / 5


def dataset_of(classes: Sequence[str]) -> str | None:
    """The archive whose class names these are, "AID" or "NWPU-RESISC45", spelt as `authors_map` allows; else None."""
    keys = sorted(map(_key, classes))
    return next((name for name, fifths in _maps().items() if sorted(map(_key, fifths)) == keys), None)


def read_matrix(path: str | Path, C: int) -> Tensor:
    """The transition matrix (C, C) in a .npy file, or in a .csv file of numbers without headings; see `check_matrix`.

    Raises:
        ValueError: the file is of another kind, does not hold numbers, or they are no transition matrix.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            matrix = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
        elif path.suffix == ".csv":
            matrix = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
        else:
            raise ValueError("expected a .npy or .csv file")
        return check_matrix(matrix, C)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_matrix(matrix: Tensor | NDArray[np.generic], C: int) -> Tensor:
    """The matrix as float64 (C, C). Rows within 1e-6 of a sum of 1, those of a float32 matrix say, are scaled to it.

    Raises:
        ValueError: another shape, an entry that is no probability, or rows that do not sum to 1. Where the columns do,
            the message says so: cleanlab's noise_matrix, for one, has the true class in the column.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float64, device="cpu")
    if matrix.shape != (C, C):
        raise ValueError(f"matrix: expected shape {(C, C)}, a row and column for each class, got {tuple(matrix.shape)}")
    wrong = ~(matrix.isfinite() & (matrix >= 0))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"matrix: expected probabilities, got {matrix[row, column]} in row {row}, column {column}")
    sums, ones = matrix.sum(1, keepdim=True), torch.ones(C, 1, dtype=torch.float64)
    if not torch.allclose(sums, ones, rtol=0, atol=1e-6):
        if torch.allclose(matrix.sum(0), ones[:, 0], rtol=0, atol=1e-6):
            raise ValueError(
                "matrix: expected rows that sum to 1 (row: true class, column: given label), got columns that sum to 1 "
                "(cleanlab's convention); transpose it"
            )
        row = int((sums - 1).abs().argmax())
        raise ValueError(f"matrix: expected rows that sum to 1, got {float(sums[row]):.6g} in row {row}")
    # Scaling changes the last bits of a row, on which draws depend, so rows that sum to 1 already stay as they are.
    return torch.where((sums - 1).abs() > 1e-12, matrix / sums, matrix)


def corrupt(labels: Tensor, matrix: Tensor | NDArray[np.generic], seed: int, draw: str = "multinomial") -> NoisyLabels:
    """Give each image a label drawn from its class's row of the matrix.

    Args:
        labels: (N,) true class of each image, 0 to C − 1.
        matrix: (C, C) transition matrix.
        seed: of NumPy's RandomState.
        draw: "multinomial" draws each label on its own, in the order given. With images in class order and seed 42 the
            labels are the authors'. "exact" gives each class of n images n·P[y, z] labels z, rounded by the largest
            remainder, so that only the choice of images is random.

    Returns:
        The labels, which of them are wrong, and the matrix; on the CPU.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> noisy = corrupt(torch.arange(2).repeat_interleave(10), uniform(2, rate=0.3), seed=0, draw="exact")
        >>> int(noisy.flipped.sum())
        6
    """
    check_choice("draw", draw, ("multinomial", "exact"))
    matrix = check_matrix(matrix, len(matrix))
    labels = as_labels(labels).to("cpu", torch.int64)
    _check_classes("labels", labels, len(matrix))
    random = np.random.RandomState(seed)
    drawing = _multinomial if draw == "multinomial" else _exact
    given = torch.from_numpy(drawing(labels.numpy(), matrix.numpy(), random))
    return NoisyLabels(given, given != labels, matrix)


def _multinomial(
    labels: NDArray[np.int64], matrix: NDArray[np.float64], random: np.random.RandomState
) -> NDArray[np.int64]:
    given = np.empty_like(labels)
    # One call for a stretch of images of one class draws the same random numbers as a call for each image.
    for start, end in pairwise([*np.flatnonzero(np.diff(labels, prepend=-1)), len(labels)]):
        given[start:end] = random.multinomial(1, matrix[labels[start]], size=end - start).argmax(1)
    return given


def _exact(labels: NDArray[np.int64], matrix: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.int64]:
    given = np.empty_like(labels)
    for c in range(len(matrix)):
        images = np.flatnonzero(labels == c)
        given[random.permutation(images)] = np.repeat(np.arange(len(matrix)), _apportion(len(images), matrix[c], c))
    return given


def _apportion(n: int, shares: NDArray[np.float64], first: int) -> NDArray[np.int64]:
    """Whole numbers near n·shares with sum n, by the largest remainder.

    Equal remainders are rounded up from class `first` on, cyclically: otherwise uniform noise would favour the first
    classes in every row.
    """
    counts = np.floor(n * shares).astype(np.int64)
    remainders = np.round(n * shares - counts, 9)
    rank_among_equal = (np.arange(len(shares)) - first) % len(shares)
    counts[np.lexsort((rank_among_equal, -remainders))[: n - counts.sum()]] += 1
    return counts


@cache
def _maps() -> dict[str, dict[str, dict[str, int]]]:
    """The authors' maps: by archive, class and wrong label, fifths of η."""
    text = files(__package__).joinpath("label_dependent.yaml").read_text(encoding="utf-8")
    maps: dict[str, dict[str, dict[str, int]]] = yaml.safe_load(text)
    return maps


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _difference(classes: Sequence[str]) -> str:
    """How the classes differ from those of the archive with a map that has the most of them."""
    given = {_key(name): name for name in classes}
    maps = {dataset: {_key(name): name for name in fifths} for dataset, fifths in _maps().items()}
    nearest = max(maps, key=lambda dataset: len(given.keys() & maps[dataset].keys()))
    known = maps[nearest]
    return (
        f"classes: expected all classes of {' or '.join(maps)}, which the authors' maps are for; against the "
        f"{len(known)} of {nearest}, the {len(classes)} given "
        f"lack {_listed([name for key, name in known.items() if key not in given])}, "
        f"and unknown are {_listed([name for key, name in given.items() if key not in known])}; for other classes give "
        "a noise_file of lines 'true class: wrong class'"
    )


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(map(repr, names[:limit])) or "none") + more


def _check_rate(rate: float) -> None:
    check_number("rate", rate, 0, 1, lower_included=True, upper_included=True)


def _check_classes(name: str, labels: Tensor, C: int) -> None:
    wrong = (labels < 0) | (labels >= C)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected classes from 0 to {C - 1}, got {int(labels[position])} at position {position}"
        )
