"""The losses that are compared: those of the paper, classifiers, and NTDNE scaled for a plain learning rate."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.experiments.losses import BatchLoss, Criterion, TRNSLLoss
from ntdne_kernels.experiments.settings import read_preset
from ntdne_kernels.ops.losses import ntdne

PAPER = read_preset("paper")["losses"]


class CrossEntropyLoss(BatchLoss):
    """Cross-entropy of a linear classifier."""

    def __init__(self, labels: Tensor, dim: int) -> None:
        super().__init__(labels, dim)
        self.classifier = nn.Linear(dim, self.classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        return cross_entropy(self.classifier(features), labels)


class GCELoss(CrossEntropyLoss):
    """Generalised cross-entropy: (1 − s^q)/q of the given class's softmax probability s of a linear classifier.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, eq. 6, with its q = 0.7.
    """

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        log_s = -cross_entropy(self.classifier(features), labels, reduction="none")
        return ntdne(log_s, 0.7, None).mean()


class UnitSlopeNTDNELoss(NTDNELoss):
    """NTDNE divided by its slope at chance, with k="auto" from the first epoch on.

    The gradient of NTDNE is SNCA's times p^q, and in a new bank p is near c, the share of the image's class. Divided by
    the mean of c^q over the images, the gradient starts at SNCA's size, so that SNCA's learning rate fits.
    """

    def __init__(self, labels: Tensor, dim: int, **options: Any) -> None:
        super().__init__(labels, dim, k="auto", warmup_epochs=0, **options)
        share = labels.bincount()[labels] / len(labels)
        self.slope_at_chance = float((share**self.q).mean())

    def forward(
        self,
        features: Tensor,
        index: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `NTDNELoss.forward`."""
        found = super().forward(features, index, labels=labels, return_scores=return_scores)
        if isinstance(found, tuple):
            return found[0] / self.slope_at_chance, found[1]
        return found / self.slope_at_chance


METHODS: dict[str, tuple[type[Criterion], dict[str, Any]]] = {
    "cross-entropy": (CrossEntropyLoss, {}),
    "GCE": (GCELoss, {}),
    "SNCA": (SNCALoss, PAPER["SNCA"]),
    "t-RNSL": (TRNSLLoss, PAPER["t-RNSL"]),
    "NTDNE": (NTDNELoss, {}),  # the defaults of the package
    "NTDNE-unit-slope": (UnitSlopeNTDNELoss, {}),
    "NTDNE-paper": (NTDNELoss, PAPER["NTDNE"]),  # k = 0.3 from epoch 20 on
}


def make_criterion(method: str, labels: Tensor, dim: int, reference: bool = False) -> Criterion:
    """The loss of a method.

    Args:
        method: A key of `METHODS`.
        labels: (N,) of the training images.
        dim: Of the features.
        reference: Compute the losses that have a bank in b×N PyTorch.
    """
    make, options = METHODS[method]
    if reference and issubclass(make, NTDNELoss | SNCALoss):
        options = options | {"fused": False}
    return make(labels, dim, **options)
