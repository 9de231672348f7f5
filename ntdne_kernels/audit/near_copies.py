"""Near copies: pairs of images that are far nearer to each other than either is to the images around it.

An image saved again, cropped or made brighter is seldom as similar to the first one as two forests are to each other,
so no single similarity tells copies. What tells them is the distance set against that to the K-th neighbour:

    i and j are near copies where  d_ij ≤ ρ · min(d_K(i), d_K(j)),   d² = 2 − 2·f_i·f_j

(local scaling: Zelnik-Manor and Perona, NIPS 2004). Where images lie evenly in m dimensions, (d_1/d_K)^m is the least
of K − 1 uniform numbers, hence P(d_1/d_K ≤ ρ) ≈ (K − 1)·ρ^m (as in Facco et al., Scientific Reports 2017). m follows
from the lower quartile of log(d_K/d_1), which copies do not reach until they are most of the archive, and ρ from how
many false ones an archive may have.

Few images need be looked at: s ≤ σ·log Σ_j exp(s_ij/σ), the sum that the audit has, bounds an image's largest
similarity.

Shapes: N images, n of them distinct, P pairs, K neighbours.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK
from ntdne_kernels.audit.nearest import nearest_neighbours
from ntdne_kernels.bank import MemoryBank

NEIGHBOURS = 10  # K: larger groups of near copies hide their own distance
SAMPLE_SIZE = 512  # images whose neighbours say how distances lie
FALSE_ALARMS = 0.1  # images of an archive without copies that may be named
LARGEST_RATIO = 0.75  # ρ at most: in very many dimensions a distance slightly below the others is rare, but no copy
SMALLEST_SQUARE = 1e-6  # of a distance: below, the rounding of float32
SLACK = 1e-4  # of a similarity, for the rounding of the sums


class NearCopies(NamedTuple):
    """Pairs of near copies, the most similar first; exact copies beyond the first are in none."""

    first: Tensor
    """(P,) images."""
    second: Tensor
    """(P,) images; each larger than the first."""
    similarity: Tensor
    """(P,) of the two, cosine."""


NO_IMAGE = torch.empty(0, dtype=torch.int64, device="cpu")
NO_PAIRS = NearCopies(NO_IMAGE, NO_IMAGE, torch.empty(0, device="cpu"))


@torch.no_grad()
def find_near_copies(bank: MemoryBank, duplicate_of: Tensor, log_density: Tensor, sigma: float) -> NearCopies:
    """The near copies among the distinct images of a bank.

    None in archives of fewer than 4·K images, and none in groups of more than K, whose images hide each other.

    Example:
        >>> from ntdne_kernels.audit import audit_bank, feature_bank
        >>> features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        >>> features[7] = features[3] + 0.01
        >>> bank = feature_bank(features, torch.arange(200) % 2)
        >>> audit = audit_bank(bank)
        >>> found = find_near_copies(bank, audit.duplicate_of, audit.log_density, audit.sigma)
        >>> found.first.tolist(), found.second.tolist()
        ([3], [7])

    Args:
        bank: of N images, kept by one process.
        duplicate_of: (N,) as in `LabelAudit`.
        log_density: (N,) as in `LabelAudit`.
        sigma: temperature of these densities.
    """
    distinct = (duplicate_of == NOT_IN_BANK).nonzero().squeeze(1)
    if len(distinct) < 4 * NEIGHBOURS:
        return NO_PAIRS
    drawn = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0), device="cpu")[:SAMPLE_SIZE]
    _, similarity = nearest_neighbours(bank, distinct[drawn.sort().values], NEIGHBOURS, among=distinct)
    distance = _distance(similarity)
    ratio, farthest = largest_ratio(distance, len(distinct)), float(distance[:, -1].max())
    # Both images of a pair need a similarity of at least this, which the sums rule out for most.
    smallest = 1 - (ratio * farthest) ** 2 / 2
    bound = sigma * (log_density.double() + math.log(max(len(bank) - 1, 1)))
    candidates = distinct[bound[distinct] >= smallest - SLACK]
    for among in (candidates, distinct):  # among fewer images the K-th neighbour can only be farther
        if len(candidates) < 2:
            return NO_PAIRS
        neighbours, similarity = nearest_neighbours(bank, candidates, NEIGHBOURS, among=among)
        distance = _distance(similarity)
        enough = distance.size(1) == NEIGHBOURS
        scale = distance[:, -1].clamp(max=farthest) if enough else torch.full((len(candidates),), farthest)
        near = distance <= ratio * scale.unsqueeze(1)
        kept = near[:, 0]
        candidates, neighbours, similarity, scale, near = (
            each[kept] for each in (candidates, neighbours, similarity, scale, near)
        )
    limits = torch.zeros(len(bank), dtype=scale.dtype, device="cpu").index_put_((candidates,), ratio * scale)
    near &= _distance(similarity) <= limits[neighbours]
    image, other, similarity = candidates[near.nonzero()[:, 0]], neighbours[near], similarity[near]
    both = torch.stack([torch.minimum(image, other), torch.maximum(image, other)])
    pairs, which = torch.unique(both, dim=1, return_inverse=True)
    similarity = similarity.new_empty(pairs.size(1)).index_put_((which,), similarity)
    order = similarity.argsort(descending=True, stable=True)
    return NearCopies(pairs[0, order], pairs[1, order], similarity[order])


def largest_ratio(distance: Tensor, n: int) -> float:
    """ρ: how near, as a share of the distance to the K-th neighbour, near copies must be.

    Example:
        >>> points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> distance = torch.cdist(points, points).topk(11, largest=False).values[:, 1:]
        >>> round(largest_ratio(distance, 2000), 3)  # m = 3 but for the faces: (0.1/(9·2000))^(1/3) = 0.018
        0.016

    Args:
        distance: (n, K) of a sample to its nearest neighbours, the nearest first.
        n: images of which at most `FALSE_ALARMS` may be named by chance.
    """
    others = distance.size(1) - 1
    quartile = float((distance[:, -1].log() - distance[:, 0].log()).quantile(0.25))
    if quartile <= 0:  # distances that are all alike
        return LARGEST_RATIO
    dimensions = -math.log1p(-(0.25 ** (1 / others))) / quartile
    return min(LARGEST_RATIO, math.exp(math.log(FALSE_ALARMS / (others * n)) / dimensions))


def group_copies(duplicate_of: Tensor, pairs: NearCopies) -> Tensor:
    """(N,) the first image of each image's group of exact and near copies; −1 where it is alone.

    In a group all are exact or near copies of one of them, or exact copies of these, so that a chain of images, each
    alike to the next, is cut where it drifts. Whoever has the most near copies makes the first group.

    Example:
        >>> chain = NearCopies(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]), torch.ones(4))
        >>> group_copies(torch.tensor([-1, -1, -1, -1, -1, -1, 5]), chain)
        tensor([0, 0, 0, 3, 3, 5, 5])
    """
    near: dict[int, list[int]] = {}
    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    group_of: dict[int, int] = {}
    for centre in sorted(near, key=lambda image: (-len(near[image]), image)):
        members = [image for image in (centre, *near[centre]) if image not in group_of]
        if centre in members and len(members) > 1:
            group_of |= dict.fromkeys(members, min(members))
    groups = torch.full_like(duplicate_of, NOT_IN_BANK)
    if group_of:
        groups[torch.tensor(list(group_of))] = torch.tensor(list(group_of.values()))
    exact = duplicate_of != NOT_IN_BANK
    firsts = duplicate_of[exact]
    groups[firsts] = torch.where(groups[firsts] == NOT_IN_BANK, firsts, groups[firsts])
    groups[exact] = groups[firsts]
    return groups


def _distance(similarity: Tensor) -> Tensor:
    return (2 - 2 * similarity).clamp(min=SMALLEST_SQUARE).sqrt()
