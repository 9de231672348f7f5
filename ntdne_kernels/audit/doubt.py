"""Whether the features can carry a noise rate, by the labels of nearest neighbours alone.

Good features bring images of one class together. Then only wrong labels keep nearest neighbours from having the same
label. Wrong labels fall on images at random, so they do this to the same extent everywhere in a class.

Shapes: N images, n of them sampled, K nearest neighbours of each, C classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.audit.confident_learning import Confusions, sum_by_class
from ntdne_kernels.audit.nearest import nearest_neighbours
from ntdne_kernels.bank import MemoryBank

SAMPLE_SIZE = 4096
MAX_NEIGHBOURS = 10
MIN_NEIGHBOURS = 4  # three that agree, and one to compare them with
# Limits for `Evidence`, chosen with `python -m benchmarks.audit calibrate`
MIN_SIGNIFICANCE, MIN_AGREEMENT = 3.0, 0.6
MAX_ABOVE, MAX_BELOW, MAX_UNEVEN = 0.03, 0.12, 0.07


class Evidence(NamedTuple):
    """What the labels of nearest neighbours say of the features, for which no right label is needed."""

    agreement: float
    """How much more often than by chance two nearest neighbours of an image carry one label, divided by how much more
    often they would by the confusions that the audit estimates. 0: by chance; 1: as estimated; above 1: too many
    confusions were estimated.
    """
    significance: float
    """The same excess over chance, in standard errors of chance."""
    rate: float
    """How often a nearest neighbour does not carry the label suggested for the image."""
    rate_at_best: float
    """How often it does not where three others carry it.

    With good features both are the noise rate, whichever the three are. Features that confuse classes do so in some
    places more than in others, and three that agree are found where they do it least.
    """


def sample_neighbours(bank: MemoryBank, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A sample (n,) of the labelled images, and the labels (n, K) of their nearest neighbours.

    K = 0 where classes are so small that most neighbours are of other classes whatever the features.

    Args:
        bank: of N images.
        labels: (N,) codes from 0 to C − 1, −1 for unlabelled.
    """
    labelled = (labels != UNLABELLED).nonzero().squeeze(1)
    drawn = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0), device="cpu")[:SAMPLE_SIZE]
    sample = labelled[drawn.sort().values]
    if len(sample) == 0:
        return sample, sample.new_empty((0, 0))
    typical_size = int(torch.bincount(labels[labelled])[labels[sample]].median())
    if typical_size <= MIN_NEIGHBOURS:
        return sample, sample.new_empty((len(sample), 0))
    neighbours, _ = nearest_neighbours(bank, sample, min(max(typical_size // 4, MIN_NEIGHBOURS), MAX_NEIGHBOURS))
    return sample, labels[neighbours]


def weigh_evidence(labels: Tensor, suggested: Tensor, neighbour_labels: Tensor, confusions: Confusions) -> Evidence:
    """Whether nearest neighbours agree as they would if only wrong labels kept them from it.

    NaN where that cannot be told: a single class, or classes that are too small.

    Args:
        labels: (N,) codes of all labels, −1 for unlabelled.
        suggested: (n,) the class suggested for each sampled image.
        neighbour_labels: (n, K) labels of their nearest neighbours, −1 for unlabelled.
        confusions: estimated for the archive.
    """
    sizes = torch.bincount(labels[labels != UNLABELLED]).double()
    if neighbour_labels.numel() == 0 or len(sizes) < 2:
        return Evidence(*4 * [math.nan])
    chance = (sizes / sizes.sum()).square().sum()
    _, true, images = confusions
    # Decisions bring classes that no given label is of.
    C = max(len(sizes), int(true.max()) + 1, int(suggested.max()) + 1)
    # Two images of one true class carry one label as often as the squares of its transition probabilities add up to.
    estimated = (images.square() / sum_by_class(images, true, C)[true]).sum() / images.sum()
    excess = _pair_agreement(neighbour_labels) - chance
    standard_error = (chance * (1 - chance) / len(neighbour_labels)).sqrt()
    return Evidence(
        agreement=float(excess / (estimated - chance)),
        significance=float(excess / standard_error),
        rate=_disagreement(neighbour_labels, suggested, C, agreeing=0),
        rate_at_best=_disagreement(neighbour_labels, suggested, C, agreeing=3),
    )


def _pair_agreement(neighbour_labels: Tensor) -> Tensor:
    """How often two labelled neighbours of an image carry one label."""
    K = neighbour_labels.size(1)
    labelled = neighbour_labels != UNLABELLED
    # Each neighbour without a label gets one of its own, which pairs with no other.
    unlike = UNLABELLED - 1 - torch.arange(K, device="cpu")
    in_order = torch.where(labelled, neighbour_labels, unlike).sort(dim=1).values
    pairs = torch.stack([(in_order[:, lag:] == in_order[:, :-lag]).sum() for lag in range(1, K)]).sum()
    voters = labelled.sum(dim=1)
    return pairs.double() / (voters * (voters - 1) / 2).sum()


def _disagreement(neighbour_labels: Tensor, suggested: Tensor, C: int, agreeing: int) -> float:
    """How often a neighbour does not carry the suggested label where `agreeing` others do, averaged over the images.

    All ways to choose the others among an image's labelled neighbours count.
    """
    voters = (neighbour_labels != UNLABELLED).sum(dim=1)
    matches = (neighbour_labels == suggested.unsqueeze(1)).sum(dim=1).double()
    images = sum_by_class(torch.ones_like(matches), suggested, C)
    choices = torch.ones_like(matches)
    for i in range(agreeing):
        choices = choices * (matches - i)
    asked = sum_by_class(choices * (voters - agreeing).clamp(min=0), suggested, C)
    agreed = sum_by_class(choices * (matches - agreeing), suggested, C)
    weight = images[asked > 0]
    return float(1 - (weight * (agreed / asked)[asked > 0]).sum() / weight.sum())


def doubt_of(evidence: Evidence, noise_rate: float, n: int) -> str:
    """Why the features cannot carry the noise rate, by evidence from n sampled images; "" where they can."""
    agreement, significance, rate, at_best = evidence
    if math.isnan(significance):
        return f"most images have fewer than {MIN_NEIGHBOURS} others of their label, too few to judge the features by"
    if significance < MIN_SIGNIFICANCE:
        return "the nearest neighbours of an image agree on a label no more than any images would"
    error = math.sqrt(at_best * (1 - at_best) / n)
    if agreement < MIN_AGREEMENT or at_best - noise_rate > MAX_BELOW + error:
        return "the nearest neighbours of an image are of more classes than wrong labels would make them seem"
    if noise_rate - at_best > MAX_ABOVE + error or rate - at_best > MAX_UNEVEN + error:
        return "neighbours contradict labels in some places only, as features that confuse classes make them"
    return ""
