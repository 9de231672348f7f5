"""The part of a bank that a process keeps: its rows, and which image stands in which of them.

Rows stand in class order: unlabelled images first, then class by class, so that a class is one range of rows. An
image's *position* is its place in that order of the whole bank; a *row* counts from the first one kept here. In one
process the two are the same.

Shapes: B queries, N images, n of them kept here, D values, C classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, UNLABELLED
from ntdne_kernels.distributed import Processes
from ntdne_kernels.label_index import LabelIndex, class_order
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.schema import Archive


class ImageOrder(NamedTuple):
    """Which image has which position, where the classes begin, and how large they are."""

    classes: Tensor
    """(C,) the labels that occur, ascending, without −1."""
    offsets: Tensor
    """(C + 1,) position at which each class begins, then N."""
    order: Tensor
    """(n,) image of each row kept here."""
    position: Tensor
    """(n,) position of each image whose label is kept here."""
    class_sizes: tuple[tuple[int, int], ...]
    """(images, how many classes have so many) of the whole archive: numbers of the host, which cost no look at it."""

    def labels_at(self, positions: Tensor) -> Tensor:
        """(B,) labels of the images at the positions (B,)."""
        if len(self.classes) == 0:
            return torch.full_like(positions, UNLABELLED)
        c = torch.searchsorted(self.offsets, positions, right=True) - 1
        return torch.where(c >= 0, self.classes[c.clamp(min=0)], UNLABELLED)

    def is_inverse_of(self, order: Tensor) -> bool:
        """Whether an order (N,) of all images is that of their positions. Synchronises."""
        return torch.equal(order[self.position], torch.arange(len(order), device=order.device))


def image_order_of(labels: Tensor, images: range, device: torch.device) -> ImageOrder:
    """The order by class of all labels (N,), as the process that keeps the rows and labels of `images` needs it."""
    classes, offsets, order, position = class_order(labels, images.start, len(images))
    unchanged = torch.arange(images.start, images.stop, device="cpu")
    sizes, counts = offsets.diff().unique(return_counts=True)
    return ImageOrder(
        classes.to(device, copy=True),
        offsets.to(device, copy=True),
        (unchanged if order is None else order).to(device, copy=True),
        (unchanged if position is None else position).to(device, copy=True),
        tuple(zip(sizes.tolist(), counts.tolist(), strict=True)),
    )


@dataclass  # no NamedTuple: compilers of torch 2.10 cannot trace its properties
class Shard:
    """What a process keeps of a bank of N images: n rows, and labels and scores of n images."""

    storage: Tensor
    """(n, D) rows in class order."""
    labels: Tensor
    """(n,) int64, by image."""
    scores: Tensor
    """(n + 1,) last log p of each image; NaN: none yet. The last one takes what belongs to no image."""
    image_order: ImageOrder
    images: range
    """The images whose labels and scores are kept, and the positions whose rows are."""
    size: int
    """N."""
    processes: Processes

    @property
    def device(self) -> torch.device:
        """Of all but the rows, which may be in host memory."""
        return self.labels.device

    @property
    def is_whole(self) -> bool:
        """Whether all of the bank is kept here."""
        return len(self.images) == self.size

    @property
    def archive(self) -> Archive:
        """Where a batch of images is looked up, of a bank that is kept here as a whole; see `ops.look_up`."""
        return Archive(self.labels, self.image_order.position, self.scores)

    @property
    def label_index(self) -> LabelIndex:
        """The classes of the rows kept here."""
        return LabelIndex(*self.layout, None, None, len(self.images))

    @property
    def layout(self) -> ClassOrder:
        """The same, as ops take it."""
        classes, offsets = self.image_order[:2]
        if not self.is_whole:
            offsets = (offsets - self.images.start).clamp(0, len(self.images))
        return ClassOrder(classes, offsets)

    def local(self, x: Tensor) -> Tensor:
        """Images or positions (B,) of the whole bank as they are counted here; −1 for those that are kept elsewhere."""
        if self.is_whole:
            return x
        first, n = self.images.start, len(self.images)
        return torch.where((x >= first) & (x < first + n), x - first, NOT_IN_BANK)

    def positions(self, images: Tensor) -> Tensor:
        """(B,) positions of the images (B,) of a bank that is kept here as a whole; other indices stay as they are."""
        inside = (images >= 0) & (images < self.size)
        return torch.where(inside, self.image_order.position[images.clamp(0, self.size - 1)], images)

    def stored_rows(self, rows: Tensor) -> Tensor:
        """(B, D) copy of the rows (B,), on the device of the labels."""
        return self.storage[rows.to(self.storage.device)].to(self.device)
