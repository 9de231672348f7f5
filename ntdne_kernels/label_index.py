"""Rows of a bank by class.

Shapes: B queries, N bank rows, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ntdne_kernels.ops.leave_one_out import UNLABELLED


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """Which rows of a bank belong to which class; built once, it spares the functions a look at all labels per call.

    The rows order[offsets[c]:offsets[c + 1]] carry the label classes[c]; unlabelled rows come first.

    Attributes:
        classes: (C,) the labels that occur, ascending, without −1.
        offsets: (C + 1,) where each class begins in class order; offsets[0] is the number of unlabelled rows.
        order: (N,) row at each place of the class order, or None where the rows already stand in class order.
        position: (N,) place of each row in the class order, or None likewise.
    """

    classes: Tensor
    offsets: Tensor
    order: Tensor | None
    position: Tensor | None
    size: int

    @staticmethod
    def from_labels(labels: Tensor) -> "LabelIndex":
        """Index the (N,) integer `labels`; −1 means unlabelled. Sorts and synchronises, so call it once.

        Raises:
            TypeError: labels are not an integer tensor.
            ValueError: labels are not one-dimensional, empty, or below −1.
        """
        labels = check_labels(labels, "labels")
        if labels.numel() == 0:
            raise ValueError("labels: expected at least one bank row, got an empty tensor")
        if int(labels.min()) < UNLABELLED:
            row = int(labels.argmin())
            raise ValueError(f"labels: expected -1 (unlabelled) or a class from 0, got {int(labels[row])} at row {row}")
        ordered, order = torch.sort(labels, stable=True)
        classes, counts = torch.unique_consecutive(ordered, return_counts=True)
        ends = torch.cumsum(counts, 0)
        if int(classes[0]) == UNLABELLED:
            classes, offsets = classes[1:], ends
        else:
            offsets = torch.cat([ends.new_zeros(1), ends])
        if bool((labels == ordered).all()):
            return LabelIndex(classes, offsets, None, None, len(labels))
        return LabelIndex(classes, offsets, order, invert(order), len(labels))

    def tensors(self) -> list[Tensor]:
        """classes and offsets, with order and position where the rows do not stand in class order."""
        if self.order is None or self.position is None:
            return [self.classes, self.offsets]
        return [self.classes, self.offsets, self.order, self.position]

    def to(self, device: torch.device | str) -> "LabelIndex":
        """The same index on another device."""
        order = None if self.order is None else self.order.to(device)
        position = None if self.position is None else self.position.to(device)
        return LabelIndex(self.classes.to(device), self.offsets.to(device), order, position, self.size)


def invert(permutation: Tensor) -> Tensor:
    """The permutation (N,) that undoes `permutation`."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def check_labels(labels: Tensor, name: str) -> Tensor:
    """The labels or indices as int64 (n,); TypeError or ValueError that names them otherwise."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(labels.shape)}")
    return labels.to(torch.int64)
