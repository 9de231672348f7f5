"""The memory bank: one unit row per archive image, kept in class order behind an interface by image index.

Shapes: B features, N images, D values, C classes.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from ntdne_kernels.functional import BANK_DTYPES, check_range, update_bank_
from ntdne_kernels.label_index import LabelIndex, check_labels
from ntdne_kernels.ops.leave_one_out import NOT_IN_BANK, UNLABELLED

INIT_CHUNK = 65536  # rows drawn at a time, so that the start needs no second bank


class MemoryBank(nn.Module):
    """Features of all N images of an archive, their labels, and the last leave-one-out score seen of each.

    Rows start as random unit vectors. They are stored class by class, so that a class is one contiguous range for the
    kernels; every public method takes image indices and hides that order.

    Args:
        labels: (N,) integer class of each image; −1 is unlabelled.
        dim: D, values per row.
        generator: source of the random start.
        device: where the bank lives; follows `.to()` like any buffer.
        dtype: float64, float32, float16 or bfloat16.

    Attributes:
        labels: (N,) int64, by image.
        storage: (N, D) the rows in class order.
        order: (N,) image of each stored row.

    Raises:
        TypeError, ValueError: labels, dim or dtype are not as described.
    """

    storage: Tensor
    labels: Tensor
    order: Tensor
    position: Tensor
    classes: Tensor
    offsets: Tensor
    scores: Tensor

    def __init__(
        self,
        labels: Tensor,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if dtype not in BANK_DTYPES:
            raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
        labels = check_labels(labels, "labels").detach().clone()
        if device is not None:
            labels = labels.to(device)
        self.register_buffer("labels", labels)
        for name in ("order", "position", "classes", "offsets"):
            self.register_buffer(name, None, persistent=name == "order")
        self._index_labels(labels)
        storage = torch.empty((len(labels), dim), dtype=dtype, device=labels.device)
        source = labels.device if generator is None else generator.device
        for rows in storage.split(INIT_CHUNK):
            noise = torch.randn(rows.shape, generator=generator, device=source)
            rows.copy_(nn.functional.normalize(noise, dim=1))
        self.register_buffer("storage", storage)
        # One place more than there are images, where queries that are not in the bank write theirs.
        self.register_buffer("scores", torch.full((len(labels) + 1,), torch.nan, device=labels.device))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def index(self) -> LabelIndex:
        """Classes of the stored rows, for `ntdne_kernels.functional`."""
        return LabelIndex(self.classes, self.offsets, None, None, len(self))

    @property
    def last_log_p(self) -> Tensor:
        """(N,) log p of each image when it was last scored, in training or by `refresh_indicator`.

        −inf: no other image has its label. NaN: not scored yet, or unlabelled.
        """
        return self.scores[:-1]

    def places(self, index: Tensor) -> Tensor:
        """(B,) rows of `storage` that hold the images `index` (B,); indices of no image stay as they are."""
        inside = (index >= 0) & (index < len(self))
        return torch.where(inside, self.position[index.clamp(0, len(self) - 1)], index)

    def rows(self, index: Tensor) -> Tensor:
        """(B, D) copy of the rows of the images `index` (B,).

        Raises:
            IndexError: an index is not an image of the bank (checked by PyTorch on a GPU).
        """
        index = self._check_index(index)
        if index.device.type == "cpu" and bool((index == NOT_IN_BANK).any()):
            raise IndexError(f"index: expected images from 0 to {len(self) - 1}, got -1")
        check_range("index", index, len(self))
        return self.storage[self.position[index]]

    def update_(
        self, features: Tensor, index: Tensor, momentum: float = 0.5, *, validate: bool = False
    ) -> "MemoryBank":
        """Blend (B, D) features into the rows of the images `index` (B,), in place; see `functional.update_bank_`."""
        index = self._check_index(index)
        check_range("index", index, len(self), look=validate)
        update_bank_(self.storage, features, self.places(index), momentum, validate=validate)
        return self

    def relabel(self, labels: Tensor) -> None:
        """Give the images new labels (N,); rows stay with their images, scores of changed images are forgotten.

        Raises:
            TypeError, ValueError: labels are no integers, below −1, or not one for each image.
        """
        labels = check_labels(labels, "labels")
        if len(labels) != len(self):
            raise ValueError(f"labels: expected one for each of the {len(self)} images, got {len(labels)}")
        labels = labels.to(self.labels.device, copy=True)
        old_position = self.position
        self._index_labels(labels)
        self.storage.copy_(self.storage[old_position[self.order]])
        self.last_log_p.masked_fill_(labels != self.labels, torch.nan)
        self.labels.copy_(labels)

    def record_(self, log_p: Tensor, index: Tensor) -> None:
        """Remember the scores log p (B,) of the images `index` (B,); of an image given twice the higher one."""
        labels = self.labels[index.clamp(0, len(self) - 1)]
        log_p = torch.where(labels == UNLABELLED, torch.nan, log_p)
        place = torch.where((index >= 0) & (index < len(self)), index, len(self))
        self.scores.scatter_reduce_(0, place, log_p.to(self.scores.dtype), "amax", include_self=False)

    def extra_repr(self) -> str:
        N, D = self.storage.shape
        return f"{N} images, {D} values, {len(self.classes)} classes, {self.storage.dtype}"

    def skipped_rows(self) -> int:
        """Features that updates on this bank's GPU have left out so far, for any bank; 0 on a CPU. Synchronises."""
        return int(torch.ops.ntdne_kernels.skipped_rows(self.storage))

    def _check_index(self, index: Tensor) -> Tensor:
        index = check_labels(index, "index")
        if index.device != self.labels.device:
            raise ValueError(f"index: expected the bank's device, {self.labels.device}, got {index.device}")
        return index

    def _index_labels(self, labels: Tensor) -> None:
        index = LabelIndex.from_labels(labels)
        images = torch.arange(len(labels), device=labels.device)
        self.order = images if index.order is None else index.order
        self.position = images if index.position is None else index.position
        self.classes, self.offsets = index.classes, index.offsets

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all of the bank or nothing of it."""
        problem = self.disagreement(state_dict, prefix)
        if problem is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'MemoryBank'}: {problem}; nothing was loaded into the bank.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def disagreement(self, state_dict: dict[str, Any], prefix: str = "") -> str | None:
        """Why a checkpoint's entries under `prefix` do not fit this bank, or None."""
        names = ("storage", "labels", "order", "scores")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if len(missing) == len(names):
            return None  # nothing of a bank: missing keys, which strict=False allows
        if missing:
            return f"the checkpoint lacks {', '.join(missing)}"
        storage, labels, order, scores = (state_dict[prefix + name] for name in names)
        N, D = self.storage.shape
        if storage.shape != self.storage.shape:
            return f"expected {N} images of {D} values, the checkpoint holds shape {tuple(storage.shape)}"
        if labels.shape != (N,) or order.shape != (N,) or scores.shape != (N + 1,):
            return f"the checkpoint's labels, order and scores do not belong to its {N} rows"
        if not torch.equal(torch.sort(labels, stable=True).indices, order):
            return "the checkpoint's row order is not the class order of its labels"
        differs: Tensor = labels.to(self.labels.device) != self.labels
        if bool(differs.any()):
            image = int(differs.nonzero()[0])
            return (
                f"labels differ at {int(differs.sum())} of {N} images, first at image {image}: {int(labels[image])} in "
                f"the checkpoint, {int(self.labels[image])} here. If the archive is the same, give the bank the "
                "checkpoint's labels first: memory.relabel(labels)"
            )
        return None


@torch.no_grad()
def fill_bank(bank: MemoryBank, encoder: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> int:
    """Replace the rows of a bank by the encoder's features of the archive: one pass, in evaluation mode.

    Start with it where the encoder is pretrained, and call it before `refresh_indicator` to score the encoder as it is.

    Args:
        bank: the bank to fill.
        encoder: maps a batch of images to (B, D) features, which need not be normalised.
        loader: batches (images, ..., index) as from `IndexedDataset`; the index comes last.
        progress: show progress on standard error: a bar on a terminal where tqdm is installed, else a line per tenth.

    Returns:
        How many images were filled. A warning says so where some were not in the loader; their rows stay.

    Raises:
        TypeError: a batch does not end with a tensor of indices.
        ValueError, IndexError: features or indices of a batch are bad, or an index stands twice in it; earlier batches
            stay written.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    device = next((parameter.device for parameter in encoder.parameters()), bank.storage.device)
    filled = torch.zeros(len(bank), dtype=torch.bool, device=bank.storage.device)
    encoder.eval()
    try:
        for batch in _with_progress(loader, "Filling the bank") if progress else loader:
            if not isinstance(batch, tuple | list) or not isinstance(batch[-1], Tensor):
                raise TypeError(
                    "loader: expected batches (images, ..., index) with a tensor of indices last, as from "
                    f"DataLoader(IndexedDataset(dataset)); got {type(batch).__name__}"
                )
            images, index = batch[0].to(device), batch[-1].to(bank.storage.device)
            if len(index.unique()) < len(index):
                raise ValueError(
                    "loader: expected each image at most once in a batch, got the same index twice; does the batch end "
                    "with labels instead of indices? Wrap the dataset in IndexedDataset"
                )
            features = encoder(images).to(bank.storage.device)
            bank.update_(features, index, momentum=0.0, validate=True)
            filled[index[index >= 0]] = True
    finally:
        for module, training in modes:
            module.training = training
    count = int(filled.sum())
    if count < len(bank):
        warnings.warn(
            f"fill_bank: {len(bank) - count} of {len(bank)} images were not in the loader; their rows stay",
            stacklevel=2,
        )
    return count


def _with_progress(loader: Iterable[Any], description: str) -> Iterator[Any]:
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            loader = tqdm(loader, desc=description, unit="batch", leave=False)
            yield from loader
            return
    total = len(loader) if isinstance(loader, Sized) else 0
    for done, batch in enumerate(loader, start=1):
        yield batch
        if total and done * 10 // total > (done - 1) * 10 // total:
            print(f"{description}: {done} of {total} batches", file=sys.stderr)
