"""Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): which classes are mistaken for which, from their shares.

Shapes: N images, C classes, m of them with their shares, P pairs of classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED

ROUNDING = 1e-6  # of shares and scores


class Confusions(NamedTuple):
    """How many images are thought to carry the label `given` and to be of the class `true`."""

    given: Tensor
    """(P,) codes of classes, for the P pairs that have images."""
    true: Tensor
    """(P,)"""
    images: Tensor
    """(P,) float64: how many. Those of one `given` add up to the judged images with that label."""


def find_confident_classes(
    labels: Tensor, score: Tensor, judged: Tensor, top_classes: Tensor, top_shares: Tensor
) -> Tensor:
    """(N,) the class that each judged image is confidently of, −1 for none; see `LabelAudit.confident_classes`.

    Args:
        labels: (N,) codes of the labels.
        score: (N,) the share of each image's own label, NaN where not judged.
        judged: (N,) bool, which images have a score that means something; at least one.
        top_classes: (N, m) the classes with the largest shares, the largest first.
        top_shares: (N, m) their shares.
    """
    C = int(max(labels.max(), top_classes.max())) + 1
    sizes = torch.bincount(labels[judged], minlength=C).double()
    means = torch.where(sizes > 0, sum_by_class(score[judged].double(), labels[judged], C) / sizes, torch.inf)
    # Less the rounding, so that images of a class with equal scores all count.
    above = top_shares >= means[top_classes] - ROUNDING
    first = above.to(torch.uint8).argmax(dim=1, keepdim=True)
    confident = top_classes.gather(1, first).squeeze(1)
    confident = torch.where(top_classes[:, 0] == labels, labels, confident)
    return torch.where(above.any(dim=1) & judged, confident, UNLABELLED)


def confident_joint(labels: Tensor, confident_classes: Tensor, sizes: Tensor) -> Confusions:
    """The confident joint, calibrated to the number of images with each label.

    Args:
        labels: (N,) codes of the labels.
        confident_classes: (N,) the class that each image is confidently of, −1 for none.
        sizes: (C,) float64, judged images with each label.
    """
    confident, C = confident_classes != UNLABELLED, len(sizes)
    pairs = labels[confident] * C + confident_classes[confident]
    # As in cleanlab, each class counts at least one right label, so that no class is wrong altogether.
    diagonal = (sizes > 0).nonzero().squeeze(1) * (C + 1)
    pairs, count = torch.unique(torch.cat([pairs, diagonal]), return_counts=True)
    count = count.double()
    given, true = pairs // max(C, 1), pairs % max(C, 1)
    on_diagonal = given == true
    count[on_diagonal] = (count[on_diagonal] - 1).clamp(min=1)
    return Confusions(given, true, count * (sizes / sum_by_class(count, given, C))[given])


def sum_by_class(values: Tensor, classes: Tensor, C: int) -> Tensor:
    """(C,) float64: the sum of the values (n,) of each class."""
    return torch.zeros(C, dtype=torch.float64, device="cpu").index_add_(0, classes, values)
