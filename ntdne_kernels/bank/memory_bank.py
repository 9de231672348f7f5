"""MemoryBank: one unit row per image of an archive, kept in class order behind an interface by image index.

Its parts: `shard` is what this process keeps, `batch` a batch of images against it, `guard` notices what was written
from outside, `state` says what a checkpoint holds.

Shapes: b features of this process, N images, n of them kept here, D values, C classes.
"""

import copy
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import BANK_DTYPES, NOT_IN_BANK, can_look_inside, check_range
from ntdne_kernels.bank import state
from ntdne_kernels.bank.batch import Batch, ShardedBatch, find
from ntdne_kernels.bank.guard import Guard, check_labels_and_order, check_unit_rows
from ntdne_kernels.bank.shard import ClassOrder, Shard, class_order_of
from ntdne_kernels.bank.unit_rows import CHUNK, fill_at_random
from ntdne_kernels.distributed import Ranks, Report, processes_of
from ntdne_kernels.functional import check_update
from ntdne_kernels.label_index import LabelIndex, fingerprint
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.storage import allocate, mark, take_place
from ntdne_kernels.user_warning import warn_user


class MemoryBank(nn.Module):
    """Features of all N images of an archive, their labels, and the last leave-one-out score seen of each.

    Rows start as random unit vectors. They are stored class by class, so that a class is one contiguous range for the
    kernels; every public method takes image indices and hides that order.

    With a `process_group` the bank is sharded: each of W ranks keeps at most ceil(N/W) rows, a contiguous range of the
    class order, and the labels and scores of as many images. Methods that take images or labels are then called by all
    ranks together, each with images of its own (relabel: with all labels).

    None of its tensors is a buffer of PyTorch, so what averages, broadcasts or casts a module's buffers changes no
    label and leaves rows of unit length. `.to()` moves all of them and gives its float dtype to the rows; `state_dict`
    holds what a checkpoint needs. A deep copy that AveragedModel or its like average, with `use_buffers` or without,
    takes the bank of the module it was copied from when it is next used, until features go into the copy itself; the
    criterion's settings and epoch are the copy's own. Where labels, order or rows are changed in place all the same,
    through the tensors of `state_dict()` say, the next use raises RuntimeError. Compiled code does neither: call
    `check_untouched()` before it.

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
        path: of that file, with <path>.json beside it; on ranks each has its own, <path>.<rank>-of-<W>. A file of this
            bank that is there already is taken up with its rows.

    Attributes (n = N without a process group):
        labels: (n,) int64, by image.
        order: (n,) image of each stored row.
        images: the n images whose labels and scores are kept here.
        fresh: whether the rows are still those of the random start: not taken up from a file, updated or loaded.
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

    labels: Tensor
    order: Tensor
    position: Tensor
    classes: Tensor
    offsets: Tensor
    scores: Tensor
    average_mark: Tensor

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
        super().__init__()
        self.processes = processes_of(process_group)
        self.storage_kind, self.path = storage, None

        def check() -> dict[str, Any]:
            nonlocal labels
            # Absolute, for a change of the working directory; behind a link, its target is replaced.
            self.path = None if path is None else self.processes.own_path(Path(path)).resolve()
            _check_bank(dim, dtype)
            labels = as_labels(labels)
            return self._facts(labels, dim, dtype)

        facts = self.processes.same_everywhere(check)
        device = labels.device if device is None else torch.device(device)
        self.size = len(labels)
        self.images = self.processes.shard(self.size)
        own, n = slice(self.images.start, self.images.stop), len(self.images)
        self.labels = labels[own].to(device, torch.int64, copy=True)
        self._take_order(class_order_of(labels, self.images, device))
        rows = self.processes.together(
            lambda: allocate(storage, (n, dim), dtype, device, self.path, facts | {"first": own.start})
        )
        self._storage = rows.rows
        self.scores = torch.full((n + 1,), torch.nan, device=device)  # the last slot takes what is not kept here
        self.register_buffer("average_mark", torch.zeros((), device=device), persistent=False)
        self._guard = Guard()
        self.fresh = rows.fresh
        if rows.fresh:
            fill_at_random(self._storage, self.images, self.size, generator, device)
            if self.path is not None:
                mark(self.path, ready=True)
        of_processes = self.processes.counts("MemoryBank", lambda: int(rows.fresh))
        anew = [rank for rank, fresh in enumerate(of_processes) if fresh]
        if 0 < len(anew) < self.processes.size:
            warn_user(f"path: the files of ranks {anew} are new and start at random; those of the others were taken up")
        self._seal()

    def __len__(self) -> int:
        return self.size

    @property
    def storage(self) -> Tensor:
        """(n, D) the rows in class order, on a CPU for "host" and "disk".

        Raises:
            RuntimeError: as `check_untouched`.
        """
        self.check_untouched()
        return self._storage

    @property
    def device(self) -> torch.device:
        """Where features and indices are expected."""
        return self.labels.device

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the bank, or None."""
        return self.processes.group

    @property
    def ranks(self) -> Ranks | None:
        """The `processes` that share the bank, or None where it is one process's own."""
        return self.processes if isinstance(self.processes, Ranks) else None

    @property
    def label_index(self) -> LabelIndex:
        """Classes of the stored rows, for `ntdne_kernels.functional`."""
        return self.shard.label_index

    @property
    def last_log_p(self) -> Tensor:
        """(n,) log p of each of `images` when it was last scored, in training or by `refresh_indicator`.

        −inf: no other image has its label. NaN: not scored yet, or unlabelled.
        """
        if not torch.compiler.is_compiling():
            self._follow()  # no more: the criterion looks at scores while it loads a checkpoint into what is lost
        return self.scores[:-1]

    @property
    def archive(self) -> list[Tensor]:
        """What a batch of images is looked up in, of a bank that is not sharded; see `leave_one_out.look_up`."""
        return [self.labels, self.position, self.scores]

    @property
    def shard(self) -> Shard:
        """What this process keeps of the bank.

        Raises:
            RuntimeError: as `check_untouched`.
        """
        self.check_untouched()
        return self._shard

    def positions(self, index: Tensor) -> Tensor:
        """(B,) rows of `storage` that hold the images `index` (B,), of a bank that is not sharded.

        Indices of no image stay as they are.
        """
        return self._shard.positions(index)

    def stored_rows(self, rows: Tensor) -> Tensor:
        """(b, D) copy of the rows (b,) of `storage`, on the bank's device."""
        return self.shard.stored_rows(rows)

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
        # One process finds a bad value when it writes. Ranks look before, because another one may have written by then.
        look = validate or (self.processes.size > 1 and can_look_inside(self.labels))
        batch = self._begin("update_bank", lambda: self._check_update(features, index, momentum, look=look))
        batch.blend_(features, momentum)
        self.fresh, self._guard.source = False, None
        return self

    def relabel(self, labels: Any) -> None:
        """Give the images new labels (N,); rows stay with their images, scores of changed images are forgotten.

        Raises:
            TypeError: labels are no integers.
            ValueError: labels are below −1, or not one for each image.
        """

        def check() -> dict[str, Any]:
            nonlocal labels
            labels = self._check_new_labels(labels)
            return self._facts(labels, self._storage.size(1), self._storage.dtype)

        facts = self.processes.same_everywhere(check) | {"first": self.images.start}
        self.labels.copy_(self._by_class.labels_at(self.position))
        self._seal()
        path = None if self.path is None else self.path.with_name(f"{self.path.name}.relabelled")
        old = self._storage
        with torch.inference_mode(False):  # what the bank keeps can be written outside of it too
            by_class = class_order_of(labels, self.images, self.device)
            new = self.processes.together(
                lambda: allocate(self.storage_kind, (len(old), old.size(1)), old.dtype, old.device, path, facts)
            ).rows
        step = max(CHUNK // self.processes.size, 1)  # each process gets the rows of all chunks
        for start in range(0, max(self.processes.lengths(self.size)), step):  # on each as often as on any other
            chunk = slice(start, start + step)
            new[chunk] = self.rows(by_class.order[chunk]).to(new.device)
        if path is None:
            old.copy_(new)
        else:
            own = Path(str(self.path))
            self.processes.together(lambda: take_place(path, own))
            self._storage = new
        self._take_order(by_class)
        kept = labels[self.images.start : self.images.stop].to(self.device, torch.int64)
        self.scores[:-1].masked_fill_(kept != self.labels, torch.nan)
        self.labels.copy_(kept)
        self._seal()

    def record_(self, log_p: Tensor, index: Tensor) -> None:
        """Remember the scores log p (B,) of the images `index` (B,); of an image given twice the higher one.

        Of a sharded bank each rank remembers those of its own images.
        """
        torch.ops.ntdne_kernels.record_scores_(self.scores, log_p, self.local(index), self.labels)

    def batch(self, images: Tensor, labels: Tensor | None, reports: list[Report]) -> Batch | ShardedBatch:
        """The batch of all processes, given this one's images (b,), −1 for none, and labels (b,) for those.

        The `reports` are those of all processes; see `Ranks.exchange`.
        """
        return find(self._shard, images, labels, reports)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        here, D = self._shard, self._storage.size(1)
        shared = "" if here.is_whole else f", {len(self.images)} images on this rank of {self.processes.size}"
        return f"{len(self)} images, {D} values, {len(self.classes)} classes, {self._storage.dtype}{shared}"

    def skipped_rows(self) -> int:
        """Features without a direction that were left out so far on the bank's GPU, of the loss and of updates.

        They are counted for all banks on it. 0 on a CPU, where they raise. Synchronises.
        """
        on_device = int(skipped_counter(self.device)) if self.device.type != "cpu" else 0
        return on_device + int(torch.ops.ntdne_kernels.skipped_rows(self._storage))

    def check_untouched(self) -> None:
        """Bring a copy that was averaged up to its source, and see that labels, order and rows are still the bank's.

        Looks, and synchronises, where something was written from outside since the last call; else it costs nothing.

        Raises:
            RuntimeError: labels or order are not those of construction or `relabel`, or rows are not of unit length; or
                the source of an averaged copy is no more.
        """
        if torch.compiler.is_compiling():
            return
        self._follow()
        if not self._guard.is_sealed(self.labels, self.order):
            check_labels_and_order(self._shard, self._guard)
            check_unit_rows(self._shard)
            self._seal()

    def local(self, x: Tensor) -> Tensor:
        """Images or positions (B,) of the whole bank as they are counted here; −1 for those of other ranks."""
        return self._shard.local(x)

    def whole(self, part: Tensor) -> Tensor:
        """The tensor (N, ...) of which this rank keeps `part` (n, ...), as state dicts hold it: a DTensor on ranks."""
        return self.processes.to_state(part, len(self))

    def part(self, x: Tensor) -> Tensor:
        """What this rank keeps of a tensor (N, ...) or DTensor."""
        return self.processes.from_state(x)

    def disagreement(self, state_dict: dict[str, Any], prefix: str = "") -> str | None:
        """Why a checkpoint's entries under `prefix` do not fit this bank, on any rank; or None."""
        return state.disagreement(self._shard, state_dict, prefix)

    def own_disagreement(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """As `disagreement`, of this rank alone, and without a look at the rows."""
        return state.own_disagreement(self._shard, state_dict, prefix)

    @property
    def _shard(self) -> Shard:
        return Shard(self._storage, self.labels, self.scores, self._by_class, self.images, self.size, self.processes)

    @property
    def _by_class(self) -> ClassOrder:
        return ClassOrder(self.classes, self.offsets, self.order, self.position)

    def _take_order(self, by_class: ClassOrder) -> None:
        self.classes, self.offsets, self.order, self.position = by_class

    def _all_but_rows(self) -> dict[str, Tensor]:
        return {"labels": self.labels, "scores": self.scores} | self._by_class._asdict()

    def _begin(self, call: str, check: Callable[[], Tensor]) -> Batch | ShardedBatch:
        """The batch of all processes, given the images (b,) that each one's check returns."""

        def report() -> tuple[Tensor, Report]:
            images = check()
            return images, Report(len(images))

        images, reports = self.processes.exchange(call, report)
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
        if not self._guard.is_sealed(self.labels, self.order):
            check_unit_rows(self._shard)  # what was written into labels and order ends with the new labels
        new = as_labels(labels)
        if len(new) != len(self):
            raise ValueError(f"labels: expected one for each of the {len(self)} images, got {len(new)}")
        if new.data_ptr() == self.labels.data_ptr():
            raise ValueError("labels: expected a tensor of its own, got the bank's `labels`; change a clone of them")
        return new

    def _facts(self, labels: Tensor, dim: int, dtype: torch.dtype) -> dict[str, Any]:
        """What processes, or a bank and its file, must have in common."""
        facts = {"images": len(labels), "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
        if self.processes.size == 1 and self.path is None:
            return facts
        return facts | {"labels": fingerprint(labels)}

    def _seal(self) -> None:
        self._guard.seal(self.labels, self.order, self.average_mark)

    def _follow(self) -> None:
        """Take the state of the source, where this is a copy that was averaged with it since the last look."""
        if not self._guard.mark_was_written(self.average_mark):
            return
        if float(self.average_mark) != self._guard.generation:  # else others wrote, as DistributedDataParallel does
            source = self._guard.living_source()
            source.check_untouched()
            with torch.no_grad():
                for name, theirs in (source._all_but_rows() | {"_storage": source._storage}).items():
                    own = getattr(self, name)
                    if own.shape == theirs.shape:
                        own.copy_(theirs)
                    else:  # other classes, after relabel
                        setattr(self, name, theirs.to(own.device, copy=True))
            self.fresh = source.fresh
        self._seal()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryBank":
        """`.to()` and its like, for the rows; in host memory and on disk they stay.

        All else takes the device alone: `.type()` would round labels, `.half()` scores, and `.to_empty()` lose both.
        """
        self._follow()
        untouched = self._guard.is_sealed(self.labels, self.order)
        storage = fn(self._storage) if self.storage_kind == "device" else self._storage
        if storage.dtype not in BANK_DTYPES:
            raise TypeError(f"memory: rows are float64, float32, float16 or bfloat16, and cannot be {storage.dtype}")
        untouched &= storage is self._storage
        moved = {name: tensor.to(fn(tensor[:0]).device) for name, tensor in self._all_but_rows().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.average_mark.fill_(self._guard.generation)
        self._storage = storage
        for name, tensor in moved.items():
            setattr(self, name, tensor)
        if self.storage_kind == "host" and self.device.type == "cuda" and not storage.is_pinned():
            self._storage = storage.pin_memory()
        self._seal()
        if not untouched:
            self._guard.unseal()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, by pickle too."""
        if self.path is not None:
            raise TypeError(f"MemoryBank: a bank on disk has the file {self.path} for itself and cannot be copied")
        self.check_untouched()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._seal()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryBank":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._guard.source, copied._guard.generation = weakref.ref(self), self._guard.generation + 1
        for bank in (self, copied):
            bank.average_mark.fill_(bank._guard.generation)
            bank._seal()
        return copied

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_untouched()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in state.entries_of(self._shard).items():
            destination[prefix + name] = self.processes.to_state(part.detach(), len(self))

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
        """Load all of the bank or nothing of it, on all ranks or on none."""
        problem = self.disagreement(state_dict, prefix)
        if problem is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'MemoryBank'}: {problem}; nothing was loaded into the bank.")
            return
        names = {prefix + name: own for name, own in state.entries_of(self._shard).items()}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if names.keys() - state_dict.keys():  # then all of them
            missing_keys.extend(names if strict else ())
            return
        # Into the bank's tensors, also where the caller said assign=True: rows stay in their file, or on this rank.
        with torch.no_grad():
            for name, own in names.items():
                own.copy_(self.processes.from_state(state_dict[name]))
        self._seal()
        self.fresh = False

    # Former names.

    @property
    def index(self) -> LabelIndex:
        """Former name of `label_index`."""
        _warn_renamed("index", "label_index")
        return self.label_index

    @property
    def kind(self) -> str:
        """Former name of `storage_kind`."""
        _warn_renamed("kind", "storage_kind")
        return self.storage_kind

    def places(self, index: Tensor) -> Tensor:
        """Former name of `positions`."""
        _warn_renamed("places", "positions")
        return self.positions(index)

    def take(self, rows: Tensor) -> Tensor:
        """Former name of `stored_rows`."""
        _warn_renamed("take", "stored_rows")
        return self.stored_rows(rows)


def _warn_renamed(old: str, new: str) -> None:
    if not torch.compiler.is_compiling():
        warn_user(f"MemoryBank.{old} is now called {new}", DeprecationWarning)


def _check_bank(dim: int, dtype: torch.dtype) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
