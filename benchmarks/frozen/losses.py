"""The losses that are compared on frozen features, by their names in the tables."""

from itertools import product
from typing import Any

from torch import Tensor

from benchmarks.aerial.losses import METHODS as AERIAL
from benchmarks.aerial.losses import PAPER
from ntdne_kernels import NTDNELoss
from ntdne_kernels.experiments.loss_registry import LOSSES
from ntdne_kernels.experiments.losses import Criterion

Method = tuple[type[Criterion], dict[str, Any]]
OURS = "NTDNE"
COMPARED: dict[str, Method] = {
    "cross-entropy": AERIAL["cross-entropy"],
    "GCE": AERIAL["GCE"],
    **{
        name: (LOSSES[name], PAPER.get(name, {}))
        for name in ("D-CNN", "Triplet", "NSL", "SNCA", "ArcFace", "MAE", "SCE", "t-RNSL")
    },
    "NTDNE, paper": AERIAL["NTDNE-paper"],
    OURS: AERIAL["NTDNE-unit-slope"],
}
"""The losses of the tables: class and options, the paper's where its preset has them, else the class's defaults."""
TUNED: dict[str, Method] = {
    f"NTDNE, k = {k}, warm-up {warmup}": (NTDNELoss, {**PAPER["NTDNE"], "k": k, "warmup_epochs": warmup})
    for k, warmup in product((0.3, "auto"), (0, 20))
}
"""The settings of NTDNE without division that one would try by hand."""
AUDITED = {
    f"{method}, suspects {treatment}": (method, treatment)
    for method, treatment in product(("cross-entropy", "SNCA", OURS), ("left out", "corrected"))
}
"""Losses that train after an audit of the training images, and what is done with its suspects: `problem.audited`."""


def make_criterion(method: str, labels: Tensor, dim: int) -> Criterion:
    """The loss of a method for given labels (N,) and features of `dim` values."""
    make, options = (COMPARED | TUNED)[method]
    return make(labels, dim, **options)
