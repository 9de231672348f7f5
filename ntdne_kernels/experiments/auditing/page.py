"""What the page of an audit shows: its images, their neighbours, and tables of classes and confusions.

Shapes: N images, C classes, K neighbours.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from torch import Tensor

import ntdne_kernels
from ntdne_kernels.audit import LabelAudit, nearest_neighbours
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.experiments.auditing.inputs import Source
from ntdne_kernels.experiments.auditing.pictures import BY_CLASS, quality_histogram, thumbnails, transition_map
from ntdne_kernels.experiments.page import render

if TYPE_CHECKING:
    import pandas as pd

MAX_CLASSES = 50  # with images of their own
MAX_LISTED = 24  # images of a section
MAX_CONFUSIONS = 15
MAX_COPIES = 8  # pictures of a group of copies

METHODS = {
    "rate": "those of the lowest quality, as many as the estimated noise rate says. A label that is the suggested one "
    "is none",
    "otsu": "the lower of the two groups that the qualities fall into. A label that is the suggested one is none",
    "auto": "those that are rarer among the image's neighbours than in the whole archive",
}


def audit_page(
    audit: LabelAudit,
    bank: MemoryBank,
    source: Source,
    tables: "dict[str, pd.DataFrame]",
    *,
    method: str | float | None,
    worst: int,
    neighbours: int,
) -> str:
    """The HTML of an audit's page, which needs no other file.

    Args:
        audit: what is shown.
        bank: of the features, where neighbours are looked up.
        source: what was audited.
        tables: of `find_all`.
        method: how suspects are chosen, see `LabelAudit.suspects`; None: the page names no suspects and no rate.
        worst: images shown of each class.
        neighbours: K, shown beside each.
    """
    suspects = torch.zeros_like(audit.judged) if method is None else audit.suspects(method)
    classes = _classes(audit, suspects)
    shown_classes = classes[:MAX_CLASSES]
    worst_of = {each["code"]: _worst_of(audit, each["code"], worst) for each in shown_classes}
    lonely = ((audit.labels >= 0) & ~audit.judged).nonzero()[:, 0]
    unlabelled = torch.tensor(tables["unlabelled"]["image"].to_numpy())
    sparse = torch.tensor(tables["outliers"]["image"].to_numpy())[:MAX_LISTED]
    copies, alike = _groups_of_copies(tables["copies"])
    merged, split = _classes_found(tables["classes"])
    listed = [*worst_of.values(), lonely[:MAX_LISTED], unlabelled[:MAX_LISTED], sparse]
    with_neighbours = torch.cat(listed).unique()
    others = [each["image"] for group in (*copies, *alike) for each in group["images"]]
    others += [image for each in split for half in each["halves"] for image in half["examples"]]
    items = _Items(audit, bank, source, suspects, with_neighbours, neighbours, others)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a name may hold a $
        histogram = quality_histogram(audit, suspects, method or "rate") if bool(audit.judged.any()) else ""
        heat_map = "" if method is None else transition_map(audit)
    for each in shown_classes:
        each["items"] = items.of(worst_of[each["code"]])
    content = {
        "source": source,
        "audit": audit,
        "N": len(audit),
        "judged": int(audit.judged.sum()),
        "judging": method is not None,
        "suspects": int(suspects.sum()),
        "method": method,
        "meaning": METHODS.get(str(method), f"those whose score p is {method} or less"),
        "by_class": method in BY_CLASS,
        "by_score": isinstance(method, float),
        "copies_in_all": int((audit.duplicate_of >= 0).sum()),
        "conflicting": int(audit.conflicting.sum()),
        "histogram": histogram,
        "heat_map": heat_map,
        "confusions": [] if method is None else _confusions(audit),
        "classes": classes,
        "shown_classes": shown_classes,
        "copies": [items.group(group) for group in copies],
        "alike": [items.group(group) for group in alike],
        "groups_in_all": int(tables["copies"]["group"].nunique()),
        "in_several_splits": int(tables["copies"].loc[tables["copies"]["several_splits"], "group"].nunique()),
        "lonely": items.of(lonely[:MAX_LISTED]),
        "lonely_in_all": len(lonely),
        "unlabelled": items.of(unlabelled[:MAX_LISTED]),
        "unlabelled_in_all": len(unlabelled),
        "sure": _sure(tables["unlabelled"]),
        "sparse": items.of(sparse),
        "sparse_in_all": len(tables["outliers"]),
        "merged": merged,
        "split": [each | {"halves": [items.half(half) for half in each["halves"]]} for each in split],
        "pictures": bool(items.thumbnails),
        "max_listed": MAX_LISTED,
        "version": ntdne_kernels.__version__,
    }
    return render("audit.html", content)


def _classes(audit: LabelAudit, suspects: Tensor) -> list[dict[str, Any]]:
    """All classes that labels were given of, those with the most suspects first."""
    C = len(audit.classes)
    sizes = torch.bincount(audit.labels[audit.labels >= 0], minlength=C).tolist()
    wrong = torch.bincount(audit.labels[suspects], minlength=C).tolist()
    order = sorted((code for code in range(C) if sizes[code]), key=lambda code: -wrong[code])
    return [
        {"code": code, "name": str(audit.classes[code]), "size": sizes[code], "suspects": wrong[code]} for code in order
    ]


def _worst_of(audit: LabelAudit, code: int, count: int) -> Tensor:
    """Up to `count` judged images of a class whose labels nobody has checked, in the order of the ranking."""
    images = ((audit.labels == code) & audit.judged & ~audit.checked)[audit.ranking]
    return audit.ranking[images][:count]


def _groups_of_copies(copies: "pd.DataFrame") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first groups whose images carry different labels, and the first others."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _, group in copies.groupby("group", sort=False):
        listed = found[0] if bool(group["several_labels"].iloc[0]) else found[1]
        if len(listed) < MAX_LISTED:
            images = group[:MAX_COPIES].to_dict("records")
            listed.append({"images": images, "size": len(group), "several_splits": images[0]["several_splits"]})
    return found


def _classes_found(classes: "pd.DataFrame") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of classes that are perhaps one, and classes that are perhaps two, with examples of each half."""
    rows = classes.to_dict("records")
    split = [
        each
        | {
            "halves": [
                {"size": each[f"{prefix}images"], "examples": list(map(int, each[f"{prefix}examples"].split()))}
                for prefix in ("", "other_")
            ]
        }
        for each in rows
        if each["finding"] == "split"
    ]
    return [each for each in rows if each["finding"] == "merge"], split


def _sure(unlabelled: "pd.DataFrame") -> dict[str, Any]:
    """How many suggestions are sure, and how often labelled images with such shares agree."""
    sure = unlabelled[unlabelled["sure"]]
    return {"images": len(sure), "agreement": float(sure["agreement"].mean())}


def _confusions(audit: LabelAudit) -> list[dict[str, Any]]:
    """The most frequent pairs of a given label and another class."""
    given, true, count = audit.confusions
    other = (given != true) & (count >= 0.5)
    given, true, count = given[other], true[other], count[other]
    sizes = torch.bincount(audit.labels[audit.judged], minlength=len(audit.classes))
    largest = count.argsort(descending=True, stable=True)[:MAX_CONFUSIONS]
    return [
        {
            "given": str(audit.classes[int(given[i])]),
            "true": str(audit.classes[int(true[i])]),
            "count": round(float(count[i])),
            "share": float(count[i] / sizes[given[i]]),
        }
        for i in largest.tolist()
    ]


class _Items:
    """Images as the page shows them: with their labels, scores, neighbours and pictures.

    Args:
        audit: with the images' scores.
        bank: of the features.
        source: of the names and pictures.
        suspects: (N,) bool.
        with_neighbours: images that `of` can give.
        K: neighbours of each.
        others: further images that have pictures.
    """

    def __init__(
        self,
        audit: LabelAudit,
        bank: MemoryBank,
        source: Source,
        suspects: Tensor,
        with_neighbours: Tensor,
        K: int,
        others: Iterable[int],
    ) -> None:
        self.audit, self.source, self.suspects = audit, source, suspects
        self.score, self.suggested = audit.score, audit.suggested
        self.rank = torch.empty_like(audit.ranking)
        self.rank[audit.ranking] = torch.arange(1, len(audit) + 1)
        self.neighbours: dict[int, list[tuple[int, float]]] = {}
        found = (part.tolist() for part in nearest_neighbours(bank, with_neighbours, K))
        for image, nearest, similarity in zip(with_neighbours.tolist(), *found, strict=True):
            self.neighbours[image] = list(zip(nearest, similarity, strict=True))
        shown = {*others, *self.neighbours, *(n for nearest in self.neighbours.values() for n, _ in nearest)}
        self.thumbnails = {} if source.picture is None else thumbnails(source.picture, sorted(shown))

    def of(self, images: Tensor) -> list[dict[str, Any]]:
        """Everything that the page shows of each image."""
        return [self._item(image) for image in images.tolist()]

    def named(self, image: int) -> dict[str, Any]:
        """An image's number, file and label; None where it has none."""
        label = int(self.audit.labels[image])
        return {
            "image": image,
            "path": "" if self.source.paths is None else self.source.paths[image],
            "label": None if label < 0 else str(self.audit.classes[label]),
            "thumbnail": self.thumbnails.get(image, ""),
        }

    def group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of copies, as `_groups_of_copies` has it, with what `named` says of its images."""
        return group | {"images": [each | self.named(each["image"]) for each in group["images"]]}

    def half(self, half: dict[str, Any]) -> dict[str, Any]:
        """A half of a class, with what `named` says of its examples."""
        return half | {"examples": list(map(self.named, half["examples"]))}

    def _item(self, image: int) -> dict[str, Any]:
        audit = self.audit
        label, suggested = int(audit.labels[image]), int(self.suggested[image])
        compared = suggested if label < 0 else label
        return self.named(image) | {
            "suggested": str(audit.classes[suggested]) if suggested >= 0 else None,
            "share": float(audit.suggested_share[image]),
            "second": self._second(image) if label < 0 else None,
            "other": suggested != label,
            "judged": bool(audit.judged[image]),
            "score": float(self.score[image]),
            "quality": float(audit.quality[image]),
            "suspect": bool(self.suspects[image]),
            "rank": int(self.rank[image]),
            "neighbours": [
                self.named(neighbour)
                | {
                    "similarity": similarity,
                    "relation": "unknown" if other < 0 else "same" if other == compared else "different",
                }
                for neighbour, similarity in self.neighbours[image]
                for other in [int(audit.labels[neighbour])]
            ],
        }

    def _second(self, image: int) -> tuple[str, float] | None:
        """The class with the second largest share, and this share."""
        if self.audit.top_classes.size(1) < 2:
            return None
        return str(self.audit.classes[self.audit.top_classes[image, 1]]), float(self.audit.top_shares[image, 1])
