"""The losses that are compared: those of the paper, classifiers, and NTDNE as the package has it by default."""

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


METHODS: dict[str, tuple[type[Criterion], dict[str, Any]]] = {
    "cross-entropy": (CrossEntropyLoss, {}),
    "GCE": (GCELoss, {}),
    "SNCA": (SNCALoss, PAPER["SNCA"]),
    "t-RNSL": (TRNSLLoss, PAPER["t-RNSL"]),
    "NTDNE-unit-slope": (NTDNELoss, {}),  # the defaults of the package
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
