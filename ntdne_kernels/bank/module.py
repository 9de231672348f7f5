"""A bank's tensors as a PyTorch module: moved, copied, saved, loaded and guarded as a whole.

Shapes: b features of this process, N images, n of them kept here, D values, C classes.
"""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import BANK_DTYPES
from ntdne_kernels.bank import state
from ntdne_kernels.bank.guard import Guard, check_labels_and_order, check_unit_rows
from ntdne_kernels.bank.shard import ImageOrder, Shard
from ntdne_kernels.distributed import Ranks
from ntdne_kernels.label_index import LabelIndex
from ntdne_kernels.ops.schema import Archive
from ntdne_kernels.user_warning import warn_user


class BankModule(nn.Module):
    """What MemoryBank is to PyTorch. None of its tensors but the guard's mark is a buffer; see `guard` for why.

    Args:
        shard: what this process keeps.
        storage_kind: "device", "host" or "disk".
        path: of the file that holds the rows, for "disk".
        fresh: whether the rows are still to be filled.
    """

    labels: Tensor
    order: Tensor
    position: Tensor
    classes: Tensor
    offsets: Tensor
    scores: Tensor
    average_mark: Tensor
    class_sizes: tuple[tuple[int, int], ...]

    def __init__(self, shard: Shard, storage_kind: str, path: Path | None, fresh: bool) -> None:
        super().__init__()
        self._storage, self.labels, self.scores = shard.storage, shard.labels, shard.scores
        self.images, self.size, self.processes = shard.images, shard.size, shard.processes
        self._take_order(shard.image_order)
        self.register_buffer("average_mark", torch.zeros((), device=shard.device), persistent=False)
        self.storage_kind, self.path, self.fresh = storage_kind, path, fresh
        self._guard = Guard()
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
            self._follow()  # and no check: a criterion that loads a checkpoint reads scores before the bank is mended
        return self.scores[:-1]

    @property
    def archive(self) -> Archive:
        """Where a batch of images is looked up in a bank that is not sharded; see `ops.look_up`."""
        return self._shard.archive

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

    def local(self, x: Tensor) -> Tensor:
        """Images or positions (B,) of the whole bank as they are counted here; −1 for those of other ranks."""
        return self._shard.local(x)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        here, D = self._shard, self._storage.size(1)
        shared = "" if here.is_whole else f", {len(self.images)} images on this rank of {self.processes.size}"
        return f"{len(self)} images, {D} values, {len(self.classes)} classes, {self._storage.dtype}{shared}"

    def check_untouched(self) -> None:
        """Update an averaged copy from its source, and check that nothing else wrote into labels, order or rows.

        Reads values, which synchronises, only if something was written from outside since the last call.

        Raises:
            RuntimeError: labels or order are not those of construction or `relabel`, or rows are not of unit length; or
                the source of an averaged copy no longer exists.
        """
        if torch.compiler.is_compiling():
            return
        self._follow()
        if not self._is_sealed():
            check_labels_and_order(self._shard, self._guard)
            check_unit_rows(self._shard)
            self._seal()

    def disagreement(self, state_dict: dict[str, Any], prefix: str = "") -> str | None:
        """Why a checkpoint's entries under `prefix` do not fit this bank, on any rank; or None."""
        return state.disagreement(self._shard, state_dict, prefix)

    def own_disagreement(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """As `disagreement`, of this rank alone, and without a look at the rows."""
        return state.own_disagreement(self._shard, state_dict, prefix)

    @property
    def _shard(self) -> Shard:
        return Shard(self._storage, self.labels, self.scores, self._image_order, self.images, self.size, self.processes)

    @property
    def _image_order(self) -> ImageOrder:
        return ImageOrder(self.classes, self.offsets, self.order, self.position, self.class_sizes)

    def _take_order(self, image_order: ImageOrder) -> None:
        self.classes, self.offsets, self.order, self.position, self.class_sizes = image_order

    def _all_but_rows(self) -> dict[str, Tensor]:
        names = ("labels", "scores", "classes", "offsets", "order", "position")
        return {name: getattr(self, name) for name in names}

    def _seal(self) -> None:
        self._guard.seal(self.labels, self.order, self._storage, self.average_mark)

    def _is_sealed(self) -> bool:
        if self._guard.updated_in_compiled_code:
            self._guard.seal_rows(self._storage)
        return self._guard.is_sealed(self.labels, self.order, self._storage)

    def _follow(self) -> None:
        """Copy the state of the source, if this is a copy that was averaged since the last look."""
        if self._guard.source is None or not self._guard.mark_was_written(self.average_mark):
            return
        if float(self.average_mark) != self._guard.generation:  # else others wrote, as DistributedDataParallel does
            source = self._guard.living_source()
            source.check_untouched()
            with torch.inference_mode(False), torch.no_grad():
                for name, theirs in (source._all_but_rows() | {"_storage": source._storage}).items():
                    own = getattr(self, name)
                    if own.shape == theirs.shape:
                        own.copy_(theirs)
                    else:  # other classes, after relabel
                        setattr(self, name, theirs.to(own.device, copy=True))
            self.fresh, self.class_sizes = source.fresh, source.class_sizes
        self._seal()

    @torch.inference_mode(mode=False)  # what the bank keeps can be written outside of it too
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()` and its like, applied to the rows; rows in host memory and on disk stay where they are.

        All other tensors take only the device: `.type()` would round labels, `.half()` scores; `.to_empty()` lose both.
        """
        self._follow()
        untouched = self._is_sealed()
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

    @torch.inference_mode(mode=False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
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

    @property
    def places(self) -> Callable[[Tensor], Tensor]:
        """Former name of `positions`."""
        _warn_renamed("places", "positions")
        return self.positions

    @property
    def take(self) -> Callable[[Tensor], Tensor]:
        """Former name of `stored_rows`."""
        _warn_renamed("take", "stored_rows")
        return self.stored_rows


def _warn_renamed(old: str, new: str) -> None:
    if not torch.compiler.is_compiling():
        warn_user(f"MemoryBank.{old} is now called {new}", DeprecationWarning)
