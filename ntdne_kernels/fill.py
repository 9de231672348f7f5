"""One pass of an encoder over the archive into its bank: on one process or shared by ranks, and resumable.

Shapes: b images of a batch, N of the archive, n of this rank, D values.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
IMAGE_KEYS = ("pixel_values", "image", "images", "img")  # where batches with keys may have their images


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

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> dataset = IndexedDataset(TensorDataset(images, torch.tensor([1, 0])))
        >>> bank = MemoryBank(dataset.labels, dim=2)
        >>> fill_bank(bank, nn.Identity(), DataLoader(dataset, batch_size=2), progress=False)
        2
        >>> bank.rows([0, 1])
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Args:
        bank: the bank to fill.
        encoder: maps a batch of images to (b, D) features, which need not be normalised.
        loader: batches (images, ..., index) as from `IndexedDataset`, with the index last. Or batches with keys, as
            from a Hugging Face dataset: "index", and "pixel_values", "image", "images" or "img".
        progress: show progress on standard error: a bar on a terminal where tqdm is installed, else a line per tenth.
        resume: folder in which the state of the pass is saved every ten minutes. Called again with it after a kill, on
            any number of ranks, the pass goes on with the images that are missing. The end of the pass empties the
            folder. Needs a DataLoader of an IndexedDataset, so that images need not be read to be skipped. Banks that
            are not sharded need a folder each.

    Returns:
        How many images were filled, on all ranks. Images that are not in the loader keep their rows, and a warning
        counts them.

    Raises:
        TypeError: a batch has no tensor of indices; with `resume`, the loader is not as described.
        ValueError: features of a batch are bad, or an index stands twice in it; earlier batches stay written.
        IndexError: an index is not an image of the bank; earlier batches stay written.
        RuntimeError: another rank raised one of these.
    """
    filled = _Filled(bank)
    saved = None if resume is None else _SavedPass(Path(resume), bank, filled)
    if saved is not None:
        loader = saved.take_up(loader)
    is_first_rank = bank.processes.rank == 0
    batches = iter(with_progress(loader, "Filling the bank") if progress and is_first_rank else loader)
    if isinstance(encoder, nn.parallel.DistributedDataParallel):
        encoder = encoder.module  # the wrapper's forward waits for all ranks, and some may have no batch left
    no_features = torch.empty((0, bank.storage.size(1)), device=bank.device)
    features, index = no_features, bank.order[:0]

    def encode_next() -> int:
        """How many batches this rank encoded: one, or none where it has none left."""
        nonlocal features, index
        batch = next(batches, None)
        features, index = (no_features, bank.order[:0]) if batch is None else _encode(encoder, batch, bank.device)
        return int(batch is not None)

    with _evaluating(encoder):
        while any(_on_each_rank(bank, encode_next)):
            bank.update_(features, index, momentum=0.0, validate=True)
            filled.mark(index)
            if saved is not None:
                saved.batch_done()
    if saved is not None:
        saved.remove()
    count = sum(_on_each_rank(bank, lambda: int(filled.filled.sum())))
    if count < len(bank):
        warn_user(f"fill_bank: {len(bank) - count} of {len(bank)} images were not in the loader; their rows stay")
    return count


class _Filled(nn.Module):
    """Which of the images that are kept here (n,) were filled; on ranks a checkpoint holds all N."""

    filled: Tensor

    def __init__(self, bank: MemoryBank) -> None:
        super().__init__()
        self.register_buffer("filled", torch.zeros_like(bank.labels, dtype=torch.bool))
        self.processes, self.local, self.size = bank.processes, bank.local, len(bank)

    def mark(self, index: Tensor) -> None:
        """Note the images (b,) of this rank's batch as filled, where they are kept."""
        image = self.local(self._of_all_ranks(index.to(torch.int64)))
        self.filled[image[image >= 0]] = True

    def everywhere(self) -> Tensor:
        """(N,) bool."""
        return self._of_all_ranks(self.filled)

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """The values (b,) of each rank, one after the other."""
        return self.processes.gather(values, self.processes.counts("fill_bank", values.__len__))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}filled"] = self.processes.to_state(self.filled, self.size)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = state_dict | {f"{prefix}filled": self.processes.from_state(state_dict[f"{prefix}filled"])}
        super()._load_from_state_dict(own, prefix, *rest)


class _SavedPass:
    """The state of a pass in a folder: which images were filled, and their rows unless the bank has them on disk."""

    def __init__(self, folder: Path, bank: MemoryBank, filled: _Filled) -> None:
        from ntdne_kernels import checkpoint  # takes a second to import, which a pass without a folder is spared

        self.checkpoint, self.folder, self.bank, self.filled = checkpoint, folder, bank, filled
        self.state = {"filled": filled} if bank.path is not None else {"filled": filled, "bank": bank}
        self.processes: dict[str, Any] = {"process_group": bank.process_group, "no_dist": bank.process_group is None}
        self.batches, self.last_saved = 0, time.monotonic()

    def take_up(self, loader: Iterable[Any]) -> "DataLoader[Any]":
        """Load the state, if there is one: the loader of the images that are missing."""
        loader = _check_resumable(loader)
        self.batches = self.checkpoint.load_checkpoint(self.folder, self.state, **self.processes) or 0
        if self.batches and self.bank.path is not None and any(_on_each_rank(self.bank, lambda: int(self.bank.fresh))):
            warn_user(f"resume: the bank's file is newer than the pass in {self.folder}, which starts anew")
            self.filled.filled.zero_()
        return _without(loader, self.filled.everywhere())

    def batch_done(self) -> None:
        """Save the state where that was last done a while ago."""
        self.batches += 1
        due = time.monotonic() - self.last_saved >= SAVE_SECONDS
        if not _on_each_rank(self.bank, due.__int__)[0]:  # by the clock of the first rank
            return
        if self.bank.path is not None:
            flush(self.bank.path)  # rows reach the disk before the checkpoint that counts them as filled
        self.checkpoint.save_checkpoint(self.folder, self.state, self.batches, keep=1, **self.processes)
        self.last_saved = time.monotonic()

    def remove(self) -> None:
        """Empty the folder."""
        self.checkpoint.remove_checkpoints(self.folder, **self.processes)


@contextlib.contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which each module is in its own mode again."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _on_each_rank(bank: MemoryBank, count: Callable[[], int]) -> list[int]:
    """What the function returns on each rank that shares the bank."""
    return bank.processes.counts("fill_bank", count)


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
        key = next((key for key in IMAGE_KEYS if isinstance(batch.get(key), Tensor)), None)
        if key is not None and isinstance(batch.get(INDEX), Tensor):
            return batch[key], batch[INDEX]
    found = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        "loader: expected batches (images, ..., index) with a tensor of indices last, or with tensors under the keys "
        f"{INDEX!r} and {' or '.join(map(repr, IMAGE_KEYS))}, as from DataLoader(IndexedDataset(dataset)); got {found}"
    )


def _check_resumable(loader: Iterable[Any]) -> "DataLoader[Any]":
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IndexedDataset):
        found = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise TypeError(f"loader: resume needs DataLoader(IndexedDataset(dataset), batch_size=...), got {found}")
    if loader.batch_size is None or not isinstance(loader.sampler, Iterable):
        raise TypeError("loader: resume needs a DataLoader with batch_size and a sampler, got one with a batch_sampler")
    return loader


def _without(loader: "DataLoader[Any]", filled: Tensor) -> "DataLoader[Any]":
    """The loader without the images that were filled, (N,) bool."""
    is_filled = filled.cpu().numpy()
    missing = [image for image in loader.sampler if not is_filled[image]]
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=missing,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
