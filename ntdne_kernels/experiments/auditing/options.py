"""The options of an audit."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class AuditOptions:
    """How labels are judged, what is written, and where that is computed.

    Attributes:
        sigma: temperature of the neighbourhood; None: that of the source, or "auto" where it has none.
        method: how suspects are chosen, see `LabelAudit.suspects`.
        top: classes kept of each image's neighbours, as in `audit_labels`.
        force: treat the features as if they could carry a noise rate (`LabelAudit.doubt`).
        format: of the table: "csv" or "parquet".
        fix: write the list in which suspects have the suggested label.
        worst: images of each class on the page.
        neighbours: images shown beside each image on the page and in the review.
        review: labels in the review, see `images_to_review`; 0: no review is written.
        device: where the audit is computed.
        dtype: of the bank of features.
        scratch: folder on a disk for a copy of features that are larger than memory.
        decisions: files of what people decided on the labels, as `read_decisions` takes them.
        conflicts: what counts where these differ, its `on_conflict`.
    """

    sigma: float | None = None
    method: str | float = "rate"
    top: int = 10
    force: bool = False
    format: str = "csv"
    fix: bool = False
    worst: int = 8
    neighbours: int = 5
    review: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    scratch: Path | None = None
    decisions: tuple[Path, ...] = ()
    conflicts: str = "error"
