"""How often suggestions are right, by their share: measured on labelled images, each predicted without its own label.

A labelled image's share and suggestion come from the other images alone, as those of an unlabelled one do. So at any
share, suggestions for unlabelled images agree with the labels they would have been given as often as those for labelled
images do: wherever labels are missing at random.

Shapes: n labelled images, u unlabelled ones, b bins.
"""

import torch
from torch import Tensor

IMAGES_PER_BIN, MOST_BINS = 50, 100
SURE = 0.95  # of the agreement of the surest


def agreement_at(share: Tensor, agrees: Tensor, at: Tensor) -> Tensor:
    """(u,) float64: how often suggestions with such a share agree with the labels; it never falls with the share.

    Isotonic regression of the agreement on the share, over bins of equally many images:
    max over a ≤ i of the min over b ≥ i of the mean of bins a to b (Barlow and others, 1972).

    Example:
        >>> share = torch.linspace(0, 1, 1000)
        >>> agrees = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < share
        >>> agreement_at(share, agrees, torch.tensor([0.5, 0.9])).round(decimals=1).tolist()
        [0.5, 0.9]

    Args:
        share: (n,) of the suggested class, of labelled images; at least one.
        agrees: (n,) bool: the suggested class is the label.
        at: (u,) shares to look up.
    """
    share, order = share.double().sort(stable=True)
    bins = max(min(len(share) // IMAGES_PER_BIN, MOST_BINS), 1)
    parts = agrees.double()[order].tensor_split(bins)
    sums = torch.stack([part.sum() for part in parts]).cumsum(0)
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64, device="cpu").cumsum(0)
    before = torch.nn.functional.pad(torch.stack([sums, counts]), (1, 0))[:, :-1].unsqueeze(2)  # by a
    total, images = torch.stack([sums, counts]).unsqueeze(1) - before  # (a, b)
    means = torch.where(images > 0, total / images, torch.inf)
    smallest = means.flip(1).cummin(dim=1).values.flip(1)  # min over b ≥ i
    isotonic = torch.where(images > 0, smallest, -torch.inf).amax(dim=0)
    starts = torch.stack([part[0] for part in share.tensor_split(bins)])
    return isotonic[(torch.searchsorted(starts, at.double(), right=True) - 1).clamp(min=0)]
