"""MemoryBank: one unit row per image of an archive, kept in class order behind an interface by image index.

Its parts: `shard` is what this process keeps, `batch` a batch of images against it, `module` what PyTorch moves, copies
and saves, `guard` notices what was written from outside, `state` says what a checkpoint holds.

Shapes: b features of this process, N images, n of them kept here, D values, C classes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import BANK_DTYPES, NOT_IN_BANK, can_look_inside, check_range
from ntdne_kernels.bank.batch import LocalBatch, ShardedBatch, find
from ntdne_kernels.bank.guard import check_unit_rows
from ntdne_kernels.bank.module import BankModule
from ntdne_kernels.bank.shard import Shard, image_order_of
from ntdne_kernels.bank.unit_rows import CHUNK, fill_at_random
from ntdne_kernels.distributed import Report, check_same_settings, processes_of
from ntdne_kernels.functional import check_update
from ntdne_kernels.label_index import fingerprint
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.storage import allocate, mark, take_place
from ntdne_kernels.user_warning import warn_user


class MemoryBank(BankModule):
    """Features of all N images of an archive, their labels, and the last leave-one-out score seen of each.

    Rows start as random unit vectors. They are stored class by class, so that a class is one contiguous range for the
    kernels; every public method takes image indices and hides that order.

    With a `process_group` the bank is sharded: each of W ranks keeps at most ceil(N/W) rows, a contiguous range of the
    class order, and the labels and scores of as many images. Methods that take images or labels are then called by all
    ranks together, each with images of its own (relabel: with all labels).

    Its tensors are not buffers, so averaging, broadcasting or casting a module's buffers changes no label and leaves
    rows of unit length. `.to()` moves all of them and gives its float dtype to the rows alone; `state_dict` holds what
    a checkpoint needs.

    A deep copy that AveragedModel or its like averages, with `use_buffers` or without, takes the bank of the module it
    was copied from at its next use, until features go into the copy itself. The criterion's settings and epoch are the
    copy's own. If labels, order or rows are changed in place all the same, through the tensors of `state_dict()` for
    instance, the next use raises RuntimeError. Compiled code does neither: call `check_untouched()` before it.

    Args:
        labels: (N,) integer class of each image, −1 for unlabelled: a tensor, list, array, Series and the like. Names
            are numbered by `encode_labels` first.
        dim: D, values per row.
        generator: source of the random start; the same on all ranks gives the rows of one process.
        device: where the bank lives; follows `.to()` like any buffer. None: where the labels are, or the CPU.
        dtype: float64, float32, float16 or bfloat16.
        process_group: ranks that share the bank: a torch.distributed group, or a DeviceMesh of one dimension. None: the
            bank is this process's own.
        storage: where the rows live: "device"; "host", memory of the host, from which a GPU reads them chunk by chunk;
            or "disk", a memory-mapped file for what is larger than memory. The numbers are the same.
        path: of that file, with <path>.json beside it; on ranks each has its own, <path>.<rank>-of-<W>. If it exists
            already and belongs to this bank, the bank starts with its rows.

    Attributes (n = N without a process group):
        labels: (n,) int64, by image.
        order: (n,) image of each stored row.
        images: the n images whose labels and scores are kept here.
        fresh: whether the rows are still those of the random start: not read from a file, updated or loaded.
        storage_kind, path: the arguments `storage` and `path`, the latter of this rank's own file and absolute.
        processes: who shares the bank, `distributed.Ranks` or `distributed.OneProcess`.

    Raises:
        TypeError: labels, dim or dtype are not as described.
        ValueError: they are not as described, or not the same on all ranks; or the file is another bank's.
        OSError: the file cannot be made or is in use.

    Example:
        >>> memory = MemoryBank([0, 1, 0, -1], dim=2, generator=torch.Generator().manual_seed(0))
        >>> memory
        MemoryBank(4 images, 2 values, 2 classes, torch.float32)
        >>> _ = memory.update_(torch.tensor([[3.0, 0.0]]), [2], momentum=0.0)
        >>> memory.rows([2])
        tensor([[1., 0.]])
    """

    @torch.inference_mode(mode=False)  # what the bank keeps can be written outside of it too
    def __init__(
        self,
        labels: Any,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        process_group: ProcessGroup | DeviceMesh | None = None,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        processes = processes_of(process_group)
        own_path: Path | None = None

        def check() -> dict[str, Any]:
            nonlocal labels, own_path
            # Absolute, for a change of the working directory; behind a link, its target is replaced.
            own_path = None if path is None else processes.own_path(Path(path)).resolve()
            _check_bank(dim, dtype)
            labels = as_labels(labels)
            return _facts(labels, dim, dtype, with_labels=processes.size > 1 or own_path is not None)

        facts = processes.same_everywhere(check)
        device = labels.device if device is None else torch.device(device)
        images = processes.shard(len(labels))
        own, n = slice(images.start, images.stop), len(images)
        image_order = image_order_of(labels, images, device)
        rows = processes.together(
            lambda: allocate(storage, (n, dim), dtype, device, own_path, facts | {"first": images.start})
        )
        own_labels = labels[own].to(device, torch.int64, copy=True)
        scores = torch.full((n + 1,), torch.nan, dtype=torch.float32, device=device)
        super().__init__(
            Shard(rows.rows, own_labels, scores, image_order, images, len(labels), processes),
            storage,
            own_path,
            rows.fresh,
        )
        if rows.fresh:
            fill_at_random(rows.rows, images, len(labels), generator, device)
            self._guard.seal_rows(self._storage)
            if own_path is not None:
                mark(own_path, ready=True)
        of_processes = processes.counts("MemoryBank", lambda: int(rows.fresh))
        anew = [rank for rank, fresh in enumerate(of_processes) if fresh]
        if 0 < len(anew) < processes.size:
            warn_user(f"path: the files of ranks {anew} are new and start at random; those of the others were taken up")

    def rows(self, index: Any) -> Tensor:
        """(b, D) copy of the rows of the images `index` (b,); on ranks each holds those of all for a moment.

        Raises:
            IndexError: an index is not an image of the bank (on a GPU by PyTorch; there a sharded bank gives NaN).
        """
        return self._begin("rows", lambda: self._check_images(index)).rows()

    def update_(self, features: Tensor, index: Any, momentum: float = 0.5, *, validate: bool = False) -> "MemoryBank":
        """Blend (b, D) features into the rows of the images `index` (b,), in place; see `functional.update_bank_`.

        Of a sharded bank each rank writes the rows it keeps, in the order of the batch of all ranks.
        """
        # One process finds a bad value when it writes. Ranks look first: by then another one may have written.
        look = validate or (self.processes.size > 1 and can_look_inside(self.labels))
        batch = self._begin("update_bank", lambda: self._check_update(features, index, momentum, look=look), momentum)
        batch.blend_(features, momentum)
        self.fresh, self._guard.source = False, None
        if torch.compiler.is_compiling():
            self._guard.updated_in_compiled_code = True
        else:
            self._guard.seal_rows(self._storage)
        return self

    def relabel(self, labels: Any) -> None:
        """Give the images new labels (N,). Rows stay with their images; images with another label lose their score.

        Raises:
            TypeError: labels are no integers.
            ValueError: labels are below −1, or not one for each image.
        """

        def check() -> dict[str, Any]:
            nonlocal labels
            labels = self._check_new_labels(labels)
            with_labels = self.processes.size > 1 or self.path is not None
            return _facts(labels, self._storage.size(1), self._storage.dtype, with_labels=with_labels)

        facts = self.processes.same_everywhere(check) | {"first": self.images.start}
        self.labels.copy_(self._image_order.labels_at(self.position))
        self._seal()
        path = None if self.path is None else self.path.with_name(f"{self.path.name}.relabelled")
        old = self._storage
        with torch.inference_mode(False):  # what the bank keeps can be written outside of it too
            image_order = image_order_of(labels, self.images, self.device)
            new = self.processes.together(
                lambda: allocate(self.storage_kind, (len(old), old.size(1)), old.dtype, old.device, path, facts)
            ).rows
        step = max(CHUNK // self.processes.size, 1)  # each process gets the rows of all chunks
        for start in range(0, max(self.processes.lengths(self.size)), step):  # on each as often as on any other
            chunk = slice(start, start + step)
            new[chunk] = self.rows(image_order.order[chunk]).to(new.device)
        if path is None:
            old.copy_(new)
        else:
            own = Path(str(self.path))
            self.processes.together(lambda: take_place(path, own))
            self._storage = new
        self._take_order(image_order)
        kept = labels[self.images.start : self.images.stop].to(self.device, torch.int64)
        self.scores[:-1].masked_fill_(kept != self.labels, torch.nan)
        self.labels.copy_(kept)
        self._seal()

    def record_(self, log_p: Tensor, index: Tensor) -> None:
        """Remember the scores log p (B,) of the images `index` (B,); of an image given twice the higher one.

        Of a sharded bank each rank remembers those of its own images.
        """
        torch.ops.ntdne_kernels.record_scores_(self.scores, log_p, self.local(index), self.labels)

    def batch(self, images: Tensor, labels: Tensor | None, reports: list[Report]) -> LocalBatch | ShardedBatch:
        """The batch of all processes, given this one's images (b,), −1 for none, and labels (b,) for those.

        The `reports` are those of all processes; see `Ranks.exchange`.
        """
        return find(self._shard, images, labels, reports)

    def skipped_rows(self) -> int:
        """How many features without a direction the loss and updates have left out so far on the bank's device.

        Counts those of all banks on that device. On a CPU such features raise, and are left out and counted in compiled
        code alone. Synchronises.
        """
        return int(skipped_counter(self.device)) + int(torch.ops.ntdne_kernels.skipped_rows(self._storage))

    def _begin(
        self, call: str, check: Callable[[], Tensor], momentum: float | None = None
    ) -> LocalBatch | ShardedBatch:
        """The batch of all processes, given the images (b,) that each one's check returns, and the same momentum."""

        def report() -> tuple[Tensor, Report]:
            images = check()
            return images, Report(len(images), settings=self.processes.checksum((momentum,)))

        images, reports = self.processes.exchange(call, report)
        check_same_settings(reports, "momentum: expected the same")
        return self.batch(images, None, reports)

    def _check_index(self, index: Any) -> Tensor:
        images = as_index(index, device=self.device)
        if images.device != self.device:
            raise ValueError(f"index: expected the bank's device, {self.device}, got {images.device}")
        return images

    def _check_images(self, index: Any) -> Tensor:
        self.check_untouched()
        images = self._check_index(index)
        if images.device.type == "cpu" and bool((images == NOT_IN_BANK).any()):
            raise IndexError(f"index: expected images from 0 to {len(self) - 1}, got -1")
        check_range("index", images, len(self))
        return images

    def _check_update(self, features: Tensor, index: Any, momentum: float, *, look: bool) -> Tensor:
        self.check_untouched()
        like = self._storage
        if like.device != self.device:
            like = like.new_empty((0, like.size(1)), device=self.device)
        return check_update(like, features, self._check_index(index), momentum, len(self), look=look)

    def _check_new_labels(self, labels: Any) -> Tensor:
        self._follow()
        if not self._is_sealed():
            check_unit_rows(self._shard)  # what was written into labels and order ends with the new labels
        new = as_labels(labels)
        if len(new) != len(self):
            raise ValueError(f"labels: expected one for each of the {len(self)} images, got {len(new)}")
        if new.data_ptr() == self.labels.data_ptr():
            raise ValueError("labels: expected a tensor of its own, got the bank's `labels`; change a clone of them")
        return new


def _facts(labels: Tensor, dim: int, dtype: torch.dtype, *, with_labels: bool) -> dict[str, Any]:
    """What processes, or a bank and its file, must have in common."""
    facts = {"images": len(labels), "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
    return facts | {"labels": fingerprint(labels)} if with_labels else facts


def _check_bank(dim: int, dtype: torch.dtype) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
