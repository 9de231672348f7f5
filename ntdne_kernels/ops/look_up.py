"""What is known of a batch before its neighbours are summed: unit rows, labels, bank rows, and the stored scores.

Shapes: B queries, N bank rows, n images, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, SHORTEST, UNLABELLED, accumulator_dtype
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.layout import ClassOrder, class_ranges
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Archive, Batch


class Queries(NamedTuple):
    """A batch in which the images were looked up."""

    batch: Batch
    """Unit features, 0 for those without a direction; labels; and the bank rows that are theirs."""
    norms: Tensor | None
    """(B,) lengths of the features before they were normalised, 0 for those without a direction; None for unit rows."""
    indicator: Tensor | None
    """(B,) log scores that decide on pruning in place of the current ones where they are not NaN."""
    counted: Tensor | None
    """(B,) which features have a direction; None: all."""
    log_chance: Tensor | None
    """(B,) as `log_chance`, where the loss needs it."""


def look_up(batch: Batch, archive: Archive | None, spec: LossSpec | None) -> Queries:
    """The batch as the sums take it.

    With an archive `batch.own` is an image, −1 for features of none, to which `batch.labels` belong (None: they are
    unlabelled), and features are of any length; they become unit rows in the dtype of sums. What else is looked
    up is what the loss of `spec` needs.
    """
    if archive is None or spec is None:
        return Queries(batch, None, None, None, None)
    n = len(archive.position)
    known = (batch.own >= 0) & (batch.own < n)
    image = batch.own.clamp(0, n - 1)
    labels = torch.where(known, archive.labels[image], UNLABELLED if batch.labels is None else batch.labels)
    units, norms = normalise(batch.features, accumulator_dtype(batch.bank.dtype))
    if units.device.type == "cuda" and not torch.compiler.is_compiling():  # on a CPU they raised before
        skipped_counter(units.device).add_((norms == 0).sum())
    assert isinstance(batch.layout, ClassOrder)
    chance = log_chance(labels, batch.layout, n) if spec.needs_chance else None
    stored = indicator_of(spec.indicator, archive.scores[image], batch.own, chance)
    rows = torch.where(known, archive.position[image], NOT_IN_BANK)
    return Queries(batch._replace(features=units, labels=labels, own=rows), norms, stored, norms != 0, chance)


def normalise(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows (B, D) and lengths (B,) of the features, in `dtype`; both 0 where there is no direction.

    A direction has what `torch.nn.functional.normalize` can divide: a finite length of at least SHORTEST.
    """
    features = features.to(dtype)
    lengths = torch.linalg.vector_norm(features.detach(), dim=1, keepdim=True)
    directed = (lengths >= SHORTEST) & (lengths < torch.inf)
    features = torch.where(directed, features, 0)  # before the norm, whose gradient at NaN is NaN times 0
    norms = torch.linalg.vector_norm(features, dim=1)
    return features / torch.where(directed, norms.unsqueeze(1), 1), norms


def indicator_of(indicator: str, stored: Tensor, index: Tensor, chance: Tensor | None) -> Tensor | None:
    """The log scores (B,) that decide on pruning in place of the current ones, NaN for features of no image; or None.

    They are the scores `stored` (B,) of images; an image that was never scored is kept. With "auto" an image is pruned
    whose score is at most `chance` (B,), `log_chance` of its label.
    """
    if indicator == "current":
        return None
    if chance is not None and indicator == "auto":
        stored = torch.where(stored <= chance, -torch.inf, torch.inf)
    return torch.where(index >= 0, stored.nan_to_num(nan=torch.inf, neginf=-torch.inf), torch.nan)


def log_chance(labels: Tensor, layout: ClassOrder, n: int) -> Tensor:
    """(B,) float64: log of the share of n − 1 other images that carry each of the labels (B,) of images."""
    begin, end = class_ranges(labels, layout.classes, layout.offsets).unbind(1)
    return torch.log((end - begin - 1).double() / max(n - 1, 1))  # half precision ends at 65,504 images
