"""What an audit finds beside wrong labels, as tables: copies, outliers, suggestions for unlabelled images, classes.

Labels count as people have decided, so that what they settled does not come up again.

Shapes: N images, C classes.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.audit import LabelAudit, agreement_at, cut_class, find_alike_classes, find_outliers
from ntdne_kernels.audit.agreement import SURE
from ntdne_kernels.audit.class_structure import SAMPLE_SIZE, SMALLEST_CLASS
from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.experiments.auditing.inputs import Source

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("copies", "outliers", "unlabelled", "classes")
EXAMPLES = 5  # images of each half of a class


def find_all(audit: LabelAudit, bank: MemoryBank, source: Source, *, trusted: bool) -> "dict[str, pd.DataFrame]":
    """The tables by their names, `NAMES`.

    Args:
        audit: of the bank.
        bank: of the features.
        source: what was audited.
        trusted: the features tell classes apart. If they do not, classes are not compared.
    """
    return {
        "copies": copies(audit, bank, source),
        "outliers": outliers(audit, source),
        "unlabelled": unlabelled(audit, source),
        "classes": classes(audit, bank, trusted=trusted),
    }


def copies(audit: LabelAudit, bank: MemoryBank, source: Source) -> "pd.DataFrame":
    """Images in groups of exact and near copies; groups with several labels first, then those in several splits.

    group           the first image of the group
    image, path     the image
    given_label     its label; missing where it has none
    split           the split that it is in; only where there are splits
    similarity      to the group's first image
    exact           whether it is an exact copy of an earlier image
    several_labels  whether images of the group carry different labels, as decided
    several_splits  whether images of the group are in different splits
    """
    images = (audit.copy_group >= 0).nonzero()[:, 0]
    groups = audit.copy_group[images]
    frame = _named(audit, source, images)
    frame.insert(0, "group", groups.numpy())
    if source.splits is not None:
        frame["split"] = [source.splits[image] or None for image in images.tolist()]
    frame["similarity"] = _similarity(bank, images, groups).numpy()
    frame["exact"] = (audit.duplicate_of[images] >= 0).numpy()
    frame["label"] = _names(audit, audit.decided[images])
    for several, column in (("several_labels", "label"), ("several_splits", "split")):
        frame[several] = frame.groupby("group")[column].transform("nunique") > 1 if column in frame else False
    order = ["several_labels", "several_splits", "group", "image"]
    return frame.drop(columns="label").sort_values(order, ascending=[False, False, True, True], ignore_index=True)


def outliers(audit: LabelAudit, source: Source) -> "pd.DataFrame":
    """Images that are like no other, the strangest first: `z` and `expected` as `find_outliers` has them."""
    found = find_outliers(audit.log_density)
    images = found.outlying.nonzero()[:, 0]
    frame = _named(audit, source, images)
    frame["z"], frame["expected"] = found.z[images].numpy(), found.expected[images].numpy()
    return frame.sort_values("z", ascending=False, kind="stable", ignore_index=True)


def unlabelled(audit: LabelAudit, source: Source) -> "pd.DataFrame":
    """Images without a label, the surest suggestion first.

    image, path      the image
    predicted_label  the class with the largest share, and
    suggested_share  this share
    second_label     the class with the second largest share; missing where there is one class
    second_share     this share
    agreement        how often the labelled images with such a share carry the class suggested for them
    sure             whether that is nearly as often as it is for the labelled images with the largest shares
    """
    images = ((audit.labels == UNLABELLED) & ~audit.checked).nonzero()[:, 0]
    images = images[audit.suggested_share[images].argsort(descending=True, stable=True)]
    frame = _named(audit, source, images).drop(columns="given_label")
    share = audit.suggested_share[images].double()
    top, shares = audit.top_classes[images], audit.top_shares[images]
    missing = top.new_full((len(images),), UNLABELLED)
    several = top.size(1) > 1
    frame["predicted_label"] = _names(audit, audit.suggested[images])
    frame["suggested_share"] = share.numpy()
    frame["second_label"] = _names(audit, top[:, 1] if several else missing)
    frame["second_share"] = (shares[:, 1] if several else share * torch.nan).numpy()
    agreement, surest = torch.full_like(share, torch.nan), torch.inf
    known = _known(audit)
    if known.any():
        at = torch.cat([share, share.new_ones(1)])
        found = agreement_at(audit.suggested_share[known], (audit.suggested == audit.decided)[known], at)
        agreement, surest = found[:-1], float(found[-1])
    frame["agreement"], frame["sure"] = agreement.numpy(), (agreement >= SURE * surest).numpy()
    return frame


def classes(audit: LabelAudit, bank: MemoryBank, *, trusted: bool) -> "pd.DataFrame":
    """Classes to look at: pairs that are perhaps one, and those that are perhaps two.

    finding           "merge" or "split"
    class             the class
    other_class       to merge: the other one
    images            to merge: images of the class; to split: of its larger half, of up to 1,000 that are looked at
    other_images      the same of the other class, or of the smaller half
    distance          to merge: total variation of their suggestions; to split: the mixing of the halves
    examples          to split: images nearest to the middle of the larger half, and
    other_examples    of the smaller one
    """
    rows: list[dict[str, Any]] = []
    sizes = torch.bincount(audit.decided[audit.decided >= 0], minlength=len(audit.classes))
    if trusted:
        known = _known(audit)
        for one, other, distance in find_alike_classes(audit.decided[known], audit.suggested[known]):
            sized = {"images": int(sizes[one]), "other_images": int(sizes[other])}
            rows.append({"finding": "merge", "class": one, "other_class": other, **sized, "distance": distance})
    order = audit.decided.argsort(stable=True)
    for code, images in enumerate(order[len(order) - int(sizes.sum()) :].split(sizes.tolist())):
        if len(images) >= SMALLEST_CLASS:
            rows += _split(bank, code, images)
    import pandas as pd

    columns = ["finding", "class", "other_class", "images", "other_images", "distance", "examples", "other_examples"]
    frame = pd.DataFrame(rows, columns=columns)
    for column in ("class", "other_class"):
        frame[column] = [None if code != code else str(audit.classes[int(code)]) for code in frame[column]]
    return frame


def _split(bank: MemoryBank, code: int, images: Tensor) -> list[dict[str, Any]]:
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SAMPLE_SIZE]
    images = images[drawn.sort().values]
    rows = bank.rows(images.to(bank.device)).float()
    halves = cut_class(rows)
    if not halves.apart:
        return []
    row: dict[str, Any] = {"finding": "split", "class": code, "distance": halves.mixing}
    for prefix, half in (("", ~halves.second), ("other_", halves.second)):
        members = rows[half]
        middle = (members @ members.mean(dim=0)).topk(min(EXAMPLES, len(members))).indices
        row[f"{prefix}images"] = len(members)
        row[f"{prefix}examples"] = " ".join(map(str, images[half.cpu()][middle.cpu()].tolist()))
    return [row]


def _known(audit: LabelAudit) -> Tensor:
    """(N,) bool: images whose label was judged, and that nobody has excluded."""
    return audit.judged & (audit.decided != UNLABELLED)


def _named(audit: LabelAudit, source: Source, images: Tensor) -> "pd.DataFrame":
    """Images with their files and labels."""
    import pandas as pd

    frame = pd.DataFrame({"image": images.numpy()})
    if source.paths is not None:
        frame["path"] = pd.Series([source.paths[image] for image in images.tolist()], dtype=object)
    frame["given_label"] = _names(audit, audit.labels[images])
    return frame


def _names(audit: LabelAudit, codes: Tensor) -> "pd.Categorical":
    import pandas as pd

    return pd.Categorical.from_codes(codes.numpy(), list(audit.classes))


def _similarity(bank: MemoryBank, images: Tensor, others: Tensor) -> Tensor:
    """(n,) cosine similarities of images with others."""
    block = rows_per_block(bank.storage.size(1))
    pairs = zip(images.to(bank.device).split(block), others.to(bank.device).split(block), strict=True)
    found = [(bank.rows(some).float() * bank.rows(other).float()).sum(dim=1) for some, other in pairs]
    return torch.cat(found).clamp(max=1).cpu() if found else torch.empty(0)
