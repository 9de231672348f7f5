"""Rows of a bank by class.

Shapes: B queries, N bank rows, C classes.
"""

import ctypes
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.labels import as_labels
from ntdne_kernels.ops.layout import ClassOrder, PermutedRows
from ntdne_kernels.user_warning import warn_user

CHUNK = 1 << 19  # labels looked at together: some 50 MiB; four times as many leave the cache and take twice the time
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


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
    def from_labels(labels: Any) -> "LabelIndex":
        """Index the (N,) integer `labels`; −1 means unlabelled. Synchronises, so call it once; see `class_order`.

        Args:
            labels: a tensor, list, array, Series and the like.

        Raises:
            TypeError: labels are not integers; of names the error says how to number them.
            ValueError: labels are not one-dimensional, empty, or below −1.
        """
        labels = as_labels(labels)
        return LabelIndex(*class_order(labels, 0, len(labels)), len(labels))

    @property
    def layout(self) -> ClassOrder | PermutedRows:
        """The index as ops take it."""
        if self.order is None or self.position is None:
            return ClassOrder(self.classes, self.offsets)
        return PermutedRows(self.classes, self.offsets, self.order, self.position)

    def tensors(self) -> list[Tensor]:
        """The tensors of `layout`. Deprecated."""
        warn_user("LabelIndex.tensors() is deprecated; list(index.layout) is the same", DeprecationWarning)
        return list(self.layout)

    def to(self, device: torch.device | str) -> "LabelIndex":
        """The same index on another device."""
        order = None if self.order is None else self.order.to(device)
        position = None if self.position is None else self.position.to(device)
        return LabelIndex(self.classes.to(device), self.offsets.to(device), order, position, self.size)


def class_order(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Classes of all labels, and the part [first, first + count) of their order: the rows that sort them stably.

    A counting sort: one pass over the labels counts each class, which tells where it begins; a second pass puts each
    row at the next free place of its class. Needs memory for its results, `CHUNK` labels and C classes, not for N.

    Args:
        labels: (N,) integers of any dtype, −1 is unlabelled; may be a memory map.
        first: first place, and first row, of the part.
        count: places, and rows, of the part; with first = 0 and count = N it is the whole order.

    Returns:
        classes (C,) and offsets (C + 1,) as in `LabelIndex`; order (count,), the row at each place of the part; and
        position (count,), the place of each row of the part; both None where all labels already stand in class order.

    Raises:
        TypeError: labels are not integers.
        ValueError: labels are not one-dimensional, empty, or below −1, or the part does not lie inside them.
    """
    labels = as_labels(labels)
    N, end = len(labels), first + count
    if N == 0:
        raise ValueError("labels: expected at least one bank row, got an empty tensor")
    if first < 0 or count < 0 or (count > 0 and end > N):
        raise ValueError(f"first, count: expected a part of {N} rows, got {count} rows from {first}")

    chunks = range(0, N, CHUNK)
    values, counts = _total(_count(labels[start : start + CHUNK], start) for start in chunks)
    offsets = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
    labelled = slice(int(values[0] == UNLABELLED), None)
    if _ascends(labels):
        return values[labelled], offsets[labelled], None, None

    # A sort of int8 takes half the time of one of int64.
    narrow = next(dtype for dtype in SIGNED if int(values[-1]) <= torch.iinfo(dtype).max)
    order, position = offsets.new_empty(count), offsets.new_empty(count)
    free = offsets[:-1] - first  # next free place of each class, counted from the part's first
    for start in chunks:
        ordered, rows = torch.sort(labels[start : start + CHUNK].to(narrow), stable=True)
        # Each run of equal labels takes the next places of its class.
        run_values, run_counts = torch.unique_consecutive(ordered, return_counts=True)
        run_begins = torch.cumsum(run_counts, 0) - run_counts
        classes = torch.searchsorted(values, run_values.to(torch.int64))
        place = torch.repeat_interleave(free.index_select(0, classes) - run_begins, run_counts, output_size=len(rows))
        place += torch.arange(len(rows), device=rows.device)
        free.index_add_(0, classes, run_counts)
        # The part's rows are a range of the chunk; its places are one of the sorted chunk, where places ascend.
        begin, stop = (min(max(bound - start, 0), len(rows)) for bound in (first, end))
        place_of_row = torch.empty_like(place).scatter_(0, rows, place)
        position[start + begin - first : start + stop - first] = place_of_row[begin:stop] + first
        begin, stop = torch.searchsorted(place, place.new_tensor([0, count])).tolist()
        order.scatter_(0, place[begin:stop], rows[begin:stop] + start)
    return values[labelled], offsets[labelled], order, position


def _count(chunk: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The values that occur among the labels `chunk`, the first of which is row `start`, and how often."""
    chunk = chunk.to(torch.int64)
    low, high = (int(bound) for bound in torch.aminmax(chunk))
    if low < UNLABELLED:
        row = int((chunk < UNLABELLED).to(torch.uint8).argmax())
        raise ValueError(
            f"labels: expected -1 (unlabelled) or a class from 0, got {int(chunk[row])} at row {start + row}"
        )
    if high - low < len(chunk):  # takes a tenth of the time of unique, which sorts
        counts = torch.bincount(chunk - low)
        values = counts.nonzero().squeeze(1)
        return values + low, counts[values]
    values, counts = torch.unique(chunk, return_counts=True)
    return values, counts


def _total(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The values that occur in any of the parts, ascending, and how often; from those of each part."""
    kept: list[tuple[Tensor, Tensor]] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part[0])
        # Not after each part: 5·10^6 classes would be sorted again and again.
        if size > 2 * len(kept[0][0]) + CHUNK:
            kept = [_merged(kept)]
            size = len(kept[0][0])
    return kept[0] if len(kept) == 1 else _merged(kept)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    values, place = torch.unique(torch.cat([values for values, _ in parts]), return_inverse=True)
    counts = torch.cat([counts for _, counts in parts])
    return values, torch.zeros_like(values).index_add_(0, place, counts)


def _ascends(labels: Tensor) -> bool:
    # Chunks overlap by one label; labels in another order are found out in the first.
    chunks = (labels[start : start + CHUNK + 1].to(torch.int64) for start in range(0, len(labels), CHUNK))
    return all(bool((chunk[1:] >= chunk[:-1]).all()) for chunk in chunks)


def fingerprint(labels: Tensor) -> str:
    """SHA-256 of the (N,) integer `labels`: the same for the same values in the same order, whatever their dtype.

    Raises:
        TypeError, ValueError: labels are not integers, or have not one dimension.
    """
    labels = as_labels(labels)
    digest = hashlib.sha256()
    for start in range(0, len(labels), CHUNK):
        chunk = labels[start : start + CHUNK].to("cpu", torch.int64).contiguous()
        # The bytes themselves; Tensor.numpy() would need NumPy, which the package does without.
        digest.update((ctypes.c_char * (8 * len(chunk))).from_address(chunk.data_ptr()))
    return digest.hexdigest()
