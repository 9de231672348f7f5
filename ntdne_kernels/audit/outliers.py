"""Images that are like no other: how far their density lies below that of an archive without such.

    z_i = (median − log_density_i)/s      s: the standard deviation of the lower half, from its quantiles
    an image stands out where  N·Φ(−z_i) < 1/2     fewer than half an image would lie so low (Chauvenet's criterion)

Shapes: N images.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CRITERION = 0.5  # images expected
SMALLEST_ARCHIVE = 20  # images, below which quantiles say nothing
QUANTILES = {0.25: 0.6745, 0.05: 1.6449, 0.01: 2.3263}  # with the standard deviations that they lie below the median


class Outliers(NamedTuple):
    """How unlike all others each image is."""

    z: Tensor
    """(N,) float64: standard deviations below the median of log_density; 0 in archives of fewer than 20 images."""
    expected: Tensor
    """(N,) float64: how many images of such an archive would lie as low or lower, were densities normal below it."""
    outlying: Tensor
    """(N,) bool: fewer than half an image is expected."""


def find_outliers(log_density: Tensor) -> Outliers:
    """Which images stand out, by the density of images around them.

    Classes are not looked at: an image in the wrong one is a suspect, and is like others. The largest of three
    estimates of s is taken, from the lower quartile, twentieth and hundredth, so that a long tail is not called
    outliers; more outliers than a hundredth of the archive hide each other. Two equal images that are like nothing else
    have each other: they are copies.

    Example:
        >>> density = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> find_outliers(density).outlying.nonzero().squeeze(1)
        tensor([], dtype=torch.int64)
        >>> density[7] = -6
        >>> found = find_outliers(density)
        >>> found.outlying.nonzero().squeeze(1)
        tensor([7])

    Args:
        log_density: (N,) as in `LabelAudit`.
    """
    density = log_density.double()
    if len(density) < SMALLEST_ARCHIVE:
        return Outliers(torch.zeros_like(density), torch.full_like(density, len(density)), density > torch.inf)
    ordered = density.sort().values  # torch.quantile refuses more than 16 million values
    median = ordered[len(ordered) // 2]
    spread = max(float(median - ordered[int(part * len(ordered))]) / sd for part, sd in QUANTILES.items())
    z = (median - density) / max(spread, torch.finfo(torch.float32).eps)
    expected = len(density) * torch.special.erfc(z / math.sqrt(2)) / 2
    return Outliers(z, expected, expected < CRITERION)
