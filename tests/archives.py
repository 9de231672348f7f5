"""Made archives of unit rows, and the forms in which the losses and the ops take them."""

import torch
from torch import Tensor, nn

from ntdne_kernels import LabelIndex
from ntdne_kernels.ops.layout import PlainLabels
from ntdne_kernels.ops.schema import Batch


class Archive:
    """B queries, most of them noisy copies of rows of a bank of N rows with labels from −1 to C − 1."""

    def __init__(
        self,
        B: int = 9,
        N: int = 40,
        D: int = 5,
        C: int = 4,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        unlabelled: bool = True,
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        bank = nn.functional.normalize(torch.randn(N, D, generator=made, dtype=torch.float64), dim=1)
        index = torch.randint(-1, N, (B,), generator=made)
        noise = torch.randn(B, D, generator=made, dtype=torch.float64)
        features = nn.functional.normalize(bank[index.clamp(min=0)] + 0.5 * noise, dim=1)
        labels = torch.randint(-1 if unlabelled else 0, C, (N,), generator=made)
        self.bank = bank.to(device, dtype)
        self.features = features.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.bank_labels = labels.to(device)
        # Queries outside the bank take a label of their own.
        own = torch.randint(-1, C, (B,), generator=made)
        self.labels = torch.where(index >= 0, labels[index.clamp(min=0)], own).to(device)
        self.index = index.to(device)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `ntdne_kernels.functional` takes them."""
        return self.features, self.bank, self.labels, self.bank_labels, self.index


def arguments(archive: Archive, by: str) -> tuple[Tensor, Tensor, Tensor, Tensor | LabelIndex, Tensor]:
    """The archive as plain labels, as an index of rows in any order, or as an index of rows in class order."""
    features, bank, labels, bank_labels, index = archive.arguments()
    if by == "labels":
        return features, bank, labels, bank_labels, index
    classes = LabelIndex.from_labels(bank_labels)
    if by == "index" or classes.order is None:
        return features, bank, labels, classes, index
    place = torch.where(index >= 0, classes.position[index.clamp(min=0)], -1)
    ordered = LabelIndex.from_labels(bank_labels[classes.order])
    assert ordered.order is None
    return features, bank[classes.order], labels, ordered, place


def labels_of(archive: Archive, by: str) -> Tensor:
    """(N,) labels of the bank that `arguments` returns."""
    return archive.bank_labels.sort(stable=True).values if by == "sorted index" else archive.bank_labels


def batch_of(archive: Archive, by: str, sigma: float = 0.1) -> Batch:
    """The archive as the ops take it."""
    features, bank, labels, bank_labels, index = arguments(archive, by)
    layout = bank_labels.layout if isinstance(bank_labels, LabelIndex) else PlainLabels(bank_labels)
    return Batch(features, bank, labels, index, layout, sigma)
