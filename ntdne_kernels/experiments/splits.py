"""Splits of an archive into images for training, validation and testing."""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALLEST_CLASS = 3  # images a class needs so that a 70/10/20 split has some of it for training and for testing


class Split(NamedTuple):
    """Images of each part: int64 positions in the archive, class by class, in shuffled order within a class."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(labels: Tensor, how: str, seed: int) -> Split:
    """70/10/20 percent of each class for training, validation and testing.

    Args:
        labels: (N,) class of each image, in the archive's order; −1 for none, which is in no part.
        how: "seeded" shuffles each class by the seed. "authors" repeats the split of the paper's code: Python's
            generator, seeded with 42 for each class, shuffles it; `seed` is not used.
        seed: 0 or more.

    Raises:
        ValueError: another `how`, or a class has fewer than 3 images.

    Example:
        >>> import torch
        >>> parts = split(torch.arange(2).repeat_interleave(10), "seeded", seed=0)
        >>> [len(part) for part in parts]
        [14, 2, 4]
    """
    if how not in ("seeded", "authors"):
        raise ValueError(f"how: expected 'seeded' or 'authors', got {how!r}")
    generator = np.random.default_rng(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for c in labels[labels >= 0].unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        n = len(members)
        if n < SMALLEST_CLASS:
            raise ValueError(f"labels: expected at least {SMALLEST_CLASS} images in each class, got {n} in class {c}")
        order = list(range(n))
        if how == "authors":
            random.Random(42).shuffle(order)
        else:
            generator.shuffle(order)
        shuffled = members[order]
        cuts = int(0.7 * n), int(0.8 * n)  # rounded as in the authors' code: int(0.7 * 700) is 489
        for part, piece in zip(parts, shuffled.tensor_split(cuts), strict=True):
            part.append(piece)
    return Split(*map(torch.cat, parts))


def stride(n: int, most: int) -> int:
    """The smallest s so that every s-th of n is at most `most`. Of a part of a split that is a share of each class.

    Example:
        >>> stride(10, 4), stride(10, 10)
        (3, 1)
    """
    return max(1, math.ceil(n / most))


def at_most(images: Tensor, most: int) -> Tensor:
    """The images (n,), or every s-th where they are more than `most`; see `stride`."""
    return images[:: stride(len(images), most)]
