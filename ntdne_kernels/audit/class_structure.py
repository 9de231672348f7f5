"""Classes that the features would rather merge, and classes that fall into two groups.

Two names of one class: what the others suggest for images of the one is what they suggest for images of the other. The
distance of two classes is the total variation of their suggestions, ½·Σ_c |P(c suggested | a) − P(c suggested | b)|.

Two classes under one name: cut in two by 2-means, neighbours hardly ever lie across the cut. The mixing is how often
one of an image's k nearest in its class lies across, over how often it would by chance; it is compared with the mixing
of one normal cloud of the same size and covariance, since in few dimensions any cut has few neighbours across.

Shapes: N images, C classes, n images of one class, D features, k neighbours.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

# Limits, found by trial on AID's features, with classes divided at random and pairs put under one name; they name
# nothing of it as it is. No other archive was tried.
LARGEST_DISTANCE = 0.3
LARGEST_MIXING, LARGEST_OF_ONE = 0.15, 0.4  # by chance; of that of one cloud
SMALLEST_CLASS = 30  # images of a class that anything is said of
NEIGHBOURS = 10
SAMPLE_SIZE = 1000  # images of a class
STARTS, STEPS = 4, 20  # of 2-means


class AlikeClasses(NamedTuple):
    """Two classes that the other images cannot tell apart."""

    one: int
    """Code of a class."""
    other: int
    """Code of the other one."""
    distance: float
    """Total variation of their suggestions. 0: the same suggestions for both."""


class Halves(NamedTuple):
    """A class cut in two."""

    second: Tensor
    """(n,) bool: images of the second half, the smaller one."""
    mixing: float
    """Neighbours across the cut, in [0, 1] or so. 1: as many as by chance; 0: none."""
    expected: float
    """The same of one normal cloud."""

    @property
    def apart(self) -> bool:
        """Whether the halves are groups of their own."""
        return self.mixing < min(LARGEST_MIXING, LARGEST_OF_ONE * self.expected)


def find_alike_classes(labels: Tensor, suggested: Tensor) -> list[AlikeClasses]:
    """Pairs of classes of at least 30 images whose suggestions hardly differ, the most alike first.

    Features that tell no classes apart make all alike: see `LabelAudit.doubt`.

    Example:
        >>> labels = torch.arange(300) % 3
        >>> suggested = torch.where(labels == 2, 2, torch.arange(300) // 3 % 2)  # 0 and 1 are thrown like a coin
        >>> find_alike_classes(labels, suggested)
        [AlikeClasses(one=0, other=1, distance=0.0)]

    Args:
        labels: (n,) codes of labels, none of them −1.
        suggested: (n,) codes of the classes suggested for these images by the others.
    """
    pairs, counts = torch.unique(torch.stack([labels, suggested]), dim=1, return_counts=True)
    suggestions: dict[int, Counter[int]] = {}
    for (label, other), count in zip(pairs.t().tolist(), counts.tolist(), strict=True):
        suggestions.setdefault(label, Counter())[other] = count
    images = {label: found.total() for label, found in suggestions.items()}
    found = []
    # Of two classes that are alike at least one is suggested for the other.
    for one, other in {(min(pair), max(pair)) for pair in pairs.t().tolist() if pair[0] != pair[1]}:
        if min(images.get(one, 0), images.get(other, 0)) >= SMALLEST_CLASS:
            ones, others = suggestions[one], suggestions[other]
            apart = sum(abs(ones[c] / images[one] - others[c] / images[other]) for c in ones.keys() | others.keys())
            if apart / 2 <= LARGEST_DISTANCE:
                found.append(AlikeClasses(one, other, apart / 2))
    return sorted(found, key=lambda pair: pair[2])


@torch.no_grad()
def cut_class(rows: Tensor) -> Halves:
    """A class cut in two by 2-means, and how much the halves mix.

    Example:
        >>> rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> cut_class(rows).apart
        False
        >>> rows[:100, 0] += 9
        >>> halves = cut_class(rows)
        >>> halves.apart, int(halves.second[:100].sum()) in (0, 100)
        (True, True)

    Args:
        rows: (n, D) features of the class.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected 2 or more, got {len(rows)}")
    generator = torch.Generator().manual_seed(0)
    rows = rows - rows.mean(dim=0)
    # All that follows needs the products alone; 2-means on 1,280 features took seven times as long.
    products = rows @ rows.t()
    second = _two_means(products, generator)
    mixing = _mixing(products, second)
    if mixing >= LARGEST_MIXING:  # the comparison would take as long again
        return Halves(second, mixing, 1.0)
    weights = torch.randn(len(rows), len(rows), generator=generator, device="cpu").to(rows) / len(rows) ** 0.5
    cloud = weights @ products @ weights.t()  # of normal rows with the covariance of these
    return Halves(second, mixing, _mixing(cloud, _two_means(cloud, generator)))


def _two_means(products: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) bool: the smaller of the two groups with the least squared distances, of a few starts.

    Args:
        products: (n, n) of the rows.
        generator: draws the rows that the starts begin with.
    """
    n = len(products)
    best, largest = torch.zeros(n, dtype=torch.bool, device=products.device), -1.0
    for _ in range(STARTS):
        one, other = torch.randperm(n, generator=generator, device="cpu")[:2].to(products.device)
        along = products[other] - products[one]  # (n,) of each row with the difference of the centres
        middle = (products[other, other] - products[one, one]) / 2
        for _ in range(STEPS):
            second = along > middle
            share = float(second.double().mean())
            if share in (0, 1):
                break
            with_centres = torch.stack([(~second).to(products) / (n - n * share), second.to(products) / (n * share)])
            to_one, to_other = with_centres @ products
            squares = (with_centres * torch.stack([to_one, to_other])).sum(dim=1)
            along, middle = to_other - to_one, (squares[1] - squares[0]) / 2
        if share in (0, 1):
            continue
        between = share * (1 - share) * float((with_centres[1] - with_centres[0]) @ along)
        if between > largest:
            best, largest = second if share <= 0.5 else ~second, between
    return best


def _mixing(products: Tensor, second: Tensor) -> float:
    """How often neighbours lie across the cut, over how often by chance; of the half that mixes more."""
    share = float(second.double().mean())
    if share == 0:
        return 1.0
    nearness = (2 * products - products.diagonal()).fill_diagonal_(-torch.inf)  # |i|² − d², the same order
    nearest = nearness.topk(min(NEIGHBOURS, len(products) - 1)).indices
    across = (second[nearest] != second.unsqueeze(1)).double().mean(dim=1)
    return max(float(across[second].mean()) / (1 - share), float(across[~second].mean()) / share)
