"""A pass of an encoder over the archive into its bank: on one process or shared by many, taken up where it stopped.

Shapes: b images of a batch, N of the archive, n of this rank, D values.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntdne_kernels.arguments import NOT_IN_BANK
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.data import INDEX, IndexedDataset
from ntdne_kernels.labels import as_index
from ntdne_kernels.progress import with_progress
from ntdne_kernels.storage import flush
from ntdne_kernels.user_warning import warn_user

SAVE_SECONDS = 600.0  # between two checkpoints of a pass
IMAGES = ("pixel_values", "image", "images", "img")  # keys of the images in a batch with keys; the first there is


@torch.no_grad()
def fill_bank(
    bank: MemoryBank,
    encoder: nn.Module,
    loader: Iterable[Any],
    *,
    progress: bool = True,
    resume: str | Path | None = None,
) -> int:
    """Replace the rows of a bank by the encoder's features of the archive: one pass, in evaluation mode.

    Start with it where the encoder is pretrained, and call it before `refresh_indicator` to score the encoder as it is.
    Of a sharded bank each rank encodes the images of its own loader (with a DistributedSampler, say); ranks may have
    different numbers of batches.

    Args:
        bank: the bank to fill.
        encoder: maps a batch of images to (b, D) features, which need not be normalised.
        loader: batches (images, ..., index) as from `IndexedDataset`; the index comes last. Or batches with keys, as
            from a Hugging Face dataset: "index", and "pixel_values", "image", "images" or "img".
        progress: show progress on standard error: a bar on a terminal where tqdm is installed, else a line per tenth.
        resume: folder for the state of the pass, saved every ten minutes. Called again with it after a kill, on any
            number of ranks, the pass goes on with the images that are missing; the end of the pass empties it. Needs a
            DataLoader of an IndexedDataset, so that images need not be read to be skipped. Banks that are not sharded
            need a folder each.

    Returns:
        How many images were filled, on all ranks. A warning says so where some were not in the loader; their rows stay.

    Raises:
        TypeError: a batch has no tensor of indices; with `resume`, the loader is not as described.
        ValueError, IndexError: features or indices of a batch are bad, or an index stands twice in it; earlier batches
            stay written.
        RuntimeError: another rank raised one of these.
    """
    filled, done = _Filled(bank), 0
    state = {"filled": filled} if bank.path is not None else {"filled": filled, "bank": bank}
    saving: dict[str, Any] = {"process_group": bank.process_group, "no_dist": bank.ranks is None}
    if resume is not None:
        from ntdne_kernels import checkpoint  # imports for a second, which others need not wait

        loader = _check_resumable(loader)
        done = checkpoint.load_checkpoint(resume, state, **saving) or 0
        if done and bank.path is not None and any(_counts(bank, lambda: int(bank.fresh))):
            warn_user(f"resume: the bank's file is newer than the pass in {resume}, which starts anew")
            filled.filled.zero_()
        loader = _without(loader, filled.everywhere())
    if isinstance(encoder, nn.parallel.DistributedDataParallel):
        encoder = encoder.module  # whose forward talks to ranks that may have no batch left
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    leads = bank.ranks is None or bank.ranks.rank == 0
    batches = iter(with_progress(loader, "Filling the bank") if progress and leads else loader)
    encoded: list[Tensor] = []

    def encode() -> int:
        """How many batches there are: one or none."""
        batch = next(batches, None)
        encoded[:] = _nothing(bank) if batch is None else _encode(encoder, batch, bank.device)
        return int(batch is not None)

    saved = time.monotonic()
    try:
        while any(_counts(bank, encode)):
            features, index = encoded
            bank.update_(features, index, momentum=0.0, validate=True)
            filled.mark(index)
            done += 1
            due = time.monotonic() - saved >= SAVE_SECONDS
            if resume is not None and _counts(bank, due.__int__)[0]:  # by the clock of one rank
                if bank.path is not None:
                    flush(bank.path)  # before it is said which rows are there
                checkpoint.save_checkpoint(resume, state, done, keep=1, **saving)
                saved = time.monotonic()
    finally:
        for module, training in modes:
            module.training = training
    if resume is not None:
        checkpoint.remove_checkpoints(resume, **saving)
    count = sum(_counts(bank, lambda: int(filled.filled.sum())))
    if count < len(bank):
        warn_user(f"fill_bank: {len(bank) - count} of {len(bank)} images were not in the loader; their rows stay")
    return count


class _Filled(nn.Module):
    """Which of the images that are kept here (n,) were filled."""

    filled: Tensor

    def __init__(self, bank: MemoryBank) -> None:
        super().__init__()
        self.register_buffer("filled", torch.zeros_like(bank.labels, dtype=torch.bool))
        self.ranks, self.local, self.whole, self.part = bank.ranks, bank.local, bank.whole, bank.part

    def mark(self, index: Tensor) -> None:
        """Note the images (b,) of this rank's batch as filled, where they are kept."""
        if self.ranks is not None:
            index = self.ranks.gather(index.to(torch.int64), self.ranks.counts("fill_bank", index.__len__))
        image = self.local(index)
        self.filled[image[image >= 0]] = True

    def everywhere(self) -> Tensor:
        """(N,) bool."""
        if self.ranks is None:
            return self.filled
        return self.ranks.gather(self.filled, self.ranks.counts("fill_bank", self.filled.__len__))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}filled"] = self.whole(self.filled)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = state_dict | {f"{prefix}filled": self.part(state_dict[f"{prefix}filled"])}
        super()._load_from_state_dict(own, prefix, *rest)


def _counts(bank: MemoryBank, count: Callable[[], int]) -> list[int]:
    """What the function returns, on each rank that shares the bank."""
    return [count()] if bank.ranks is None else bank.ranks.counts("fill_bank", count)


def _nothing(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    """Features (0, D) and images (0,) of a rank that has no batch left."""
    return torch.empty((0, bank.storage.size(1)), device=bank.device), bank.order[:0]


def _encode(encoder: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (b, D) and images (b,) of a batch, on the bank's device."""
    pixels, index = _images_and_index(batch)
    index = as_index(index).to(device)
    images = index[index != NOT_IN_BANK]
    if len(images.unique()) < len(images):
        raise ValueError(
            "loader: expected each image at most once in a batch, got the same index twice; does the batch end "
            "with labels instead of indices? Wrap the dataset in IndexedDataset"
        )
    encoder_device = next((parameter.device for parameter in encoder.parameters()), device)
    return encoder(pixels.to(encoder_device)).to(device), index


def _images_and_index(batch: Any) -> tuple[Any, Tensor]:
    """Images (b, ...) and indices (b,) of a batch."""
    if isinstance(batch, tuple | list) and isinstance(batch[-1], Tensor):
        return batch[0], batch[-1]
    if isinstance(batch, Mapping):
        key = next((key for key in IMAGES if isinstance(batch.get(key), Tensor)), None)
        if key is not None and isinstance(batch.get(INDEX), Tensor):
            return batch[key], batch[INDEX]
    found = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        "loader: expected batches (images, ..., index) with a tensor of indices last, or with tensors under the keys "
        f"{INDEX!r} and {' or '.join(map(repr, IMAGES))}, as from DataLoader(IndexedDataset(dataset)); got {found}"
    )


def _check_resumable(loader: Iterable[Any]) -> "DataLoader[Any]":
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IndexedDataset):
        found = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise TypeError(f"loader: resume needs DataLoader(IndexedDataset(dataset), batch_size=...), got {found}")
    if loader.batch_size is None or not isinstance(loader.sampler, Iterable):
        raise TypeError("loader: resume needs a DataLoader with batch_size and a sampler, got one with a batch_sampler")
    return loader


def _without(loader: "DataLoader[Any]", filled: Tensor) -> "DataLoader[Any]":
    """The loader without the images that were filled (N,)."""
    known = filled.cpu().numpy()
    left = [image for image in loader.sampler if not known[image]]
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=left,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
