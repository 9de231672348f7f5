"""Which bank rows belong to which class, and which of them count for which query.

Shapes: B queries, N bank rows, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK

# Equals no label, also none that a user's labels could hold by mistake.
_MATCHES_NOTHING = torch.iinfo(torch.int64).min


class PlainLabels(NamedTuple):
    """Nothing but the label of each row is known."""

    row_labels: Tensor
    """(N,), −1 for unlabelled."""


class ClassOrder(NamedTuple):
    """The rows stand class by class: row j is of classes[c] for offsets[c] ≤ j < offsets[c + 1]."""

    classes: Tensor
    """(C,) the labels that occur, ascending, without −1."""
    offsets: Tensor
    """(C + 1,); the offsets[0] rows before them are unlabelled."""


class PermutedRows(NamedTuple):
    """The rows stand in any order; row order[j] is the one at place j of the class order."""

    classes: Tensor
    """As in `ClassOrder`."""
    offsets: Tensor
    """As in `ClassOrder`."""
    order: Tensor
    """(N,) row at each place of the class order."""
    position: Tensor
    """(N,) place of each row in the class order."""


ClassLayout = PlainLabels | ClassOrder | PermutedRows

FLAT_LAYOUT = "Tensor? row_labels, Tensor? classes, Tensor? offsets, Tensor? order, Tensor? position"
"""A layout among the arguments of an op, which has no types of its own."""
Flat = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def flatten(layout: ClassLayout) -> Flat:
    """The layout as `FLAT_LAYOUT` has it."""
    if isinstance(layout, PlainLabels):
        return layout.row_labels, None, None, None, None
    if isinstance(layout, ClassOrder):
        return None, layout.classes, layout.offsets, None, None
    return None, layout.classes, layout.offsets, layout.order, layout.position


def unflatten(
    row_labels: Tensor | None,
    classes: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    position: Tensor | None,
) -> ClassLayout:
    """The layout from what `flatten` made of it."""
    if row_labels is not None:
        return PlainLabels(row_labels)
    assert classes is not None
    assert offsets is not None
    if order is None or position is None:
        return ClassOrder(classes, offsets)
    return PermutedRows(classes, offsets, order, position)


def part_of(layout: ClassLayout, start: int, n: int) -> ClassLayout:
    """The layout of the rows from `start` to `start + n` alone.

    Raises:
        ValueError: the rows stand in another order than that of their classes.
    """
    if isinstance(layout, PlainLabels):
        return PlainLabels(layout.row_labels[start : start + n])
    if isinstance(layout, ClassOrder):
        return ClassOrder(layout.classes, (layout.offsets - start).clamp(0, n))
    raise ValueError(
        "bank_labels: expected an index of rows in class order, or plain labels, for a bank that is not on the device "
        "of the features; got an index of rows in another order, which would be gathered one by one"
    )


def class_ranges(labels: Tensor, classes: Tensor, offsets: Tensor) -> Tensor:
    """(B, 2) begin and end, in class order, of the rows with each of the (B,) labels; (0, 0) where none has."""
    if len(classes) == 0:
        return labels.new_zeros((len(labels), 2))
    c = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    return torch.where((classes[c] == labels).unsqueeze(1), offsets.unfold(0, 2, 1)[c], 0)


class Neighbours(NamedTuple):
    """Which bank rows count for which query.

    Bank rows are visited in `order` (N,), or as they stand where it is None; j counts in that order.
    """

    same: Tensor
    """With `row_labels`: (B,) labels, j is of the query's class where they are equal. Without: (B, 2) ranges of j."""
    row_labels: Tensor | None
    """(N,), or None where a class is one range of j."""
    order: Tensor | None
    excluded: Tensor
    """(B,): the query itself, which is not its own neighbour; −1 where it is not in the bank."""


def neighbours_of(labels: Tensor, index: Tensor, layout: ClassLayout) -> Neighbours:
    """Neighbours of queries with `labels` (B,) in the bank rows `index` (B,), −1 for none."""
    # isinstance, because the compiler of torch 2.10 cannot trace a match statement.
    if isinstance(layout, PlainLabels):
        return Neighbours(torch.where(labels >= 0, labels, _MATCHES_NOTHING), layout.row_labels, None, index)
    ranges = class_ranges(labels, layout.classes, layout.offsets)
    if isinstance(layout, ClassOrder):
        return Neighbours(ranges, None, None, index)
    position = layout.position
    inside = (index >= 0) & (index < len(position))
    place = torch.where(inside, position[index.clamp(0, len(position) - 1)], NOT_IN_BANK)
    return Neighbours(ranges, None, layout.order, place)
