"""The memory bank: one unit row per archive image, kept in class order behind an interface by image index.

Shapes: B features, N images, D values, C classes.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.distributed import Ranks
from ntdne_kernels.functional import BANK_DTYPES, check_range, check_update, update_bank_
from ntdne_kernels.label_index import LabelIndex, class_order, fingerprint
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.bank_update import accumulator_dtype
from ntdne_kernels.ops.leave_one_out import NOT_IN_BANK, UNLABELLED
from ntdne_kernels.ops.user_warning import warn_user
from ntdne_kernels.storage import allocate, mark, take_place

INIT_CHUNK = 65536  # rows drawn at a time, so that the start needs no second bank

T = TypeVar("T")


class MemoryBank(nn.Module):
    """Features of all N images of an archive, their labels, and the last leave-one-out score seen of each.

    Rows start as random unit vectors. They are stored class by class, so that a class is one contiguous range for the
    kernels; every public method takes image indices and hides that order.

    With a `process_group` the bank is sharded: each of W ranks keeps at most ceil(N/W) rows, a contiguous range of the
    class order, and the labels and scores of as many images. Methods that take images or labels are then called by all
    ranks together, each with images of its own (relabel: with all labels).

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
        storage: (n, D) the rows in class order, on a CPU for "host" and "disk".
        order: (n,) image of each stored row.
        images: the n images whose labels and scores are kept here.
        fresh: whether the rows are still those of the random start: not taken up from a file, updated or loaded.
        kind, path: the arguments `storage` and `path`, the latter of this rank's own file and absolute.
        ranks: the `distributed.Ranks` that share the bank, or None.

    Raises:
        TypeError, ValueError: labels, dim or dtype are not as described, or not the same on all ranks; or the file is
            another bank's.
        OSError: the file cannot be made or is in use.
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
        self.ranks = None if process_group is None else Ranks(process_group)
        self.kind, self.path = storage, None

        def check() -> dict[str, Any]:
            nonlocal labels
            self.path = None if path is None else self._own_path(path)
            _check_bank(dim, dtype)
            labels = as_labels(labels)
            return self._facts(labels, dim, dtype)

        facts = check() if self.ranks is None else self.ranks.same_everywhere(check)
        device = labels.device if device is None else torch.device(device)
        self.size = len(labels)
        first, n = (0, self.size) if self.ranks is None else self.ranks.shard(self.size)
        self.images = range(first, first + n)
        self.register_buffer("labels", labels[first : first + n].to(device, torch.int64, copy=True))
        for name, tensor in self._class_order(labels).items():
            self.register_buffer(name, tensor, persistent=name == "order")
        rows = self._together(lambda: allocate(storage, (n, dim), dtype, device, self.path, facts | {"first": first}))
        self.register_buffer("storage", rows.rows)
        # One place more than there are images, where queries that are not kept here write theirs.
        self.register_buffer("scores", torch.full((n + 1,), torch.nan, device=device), persistent=False)
        self.fresh = rows.fresh
        if rows.fresh:
            self._start_at_random(generator)
            if self.path is not None:
                mark(self.path, ready=True)
        if self.ranks is not None:
            anew = [
                rank for rank, fresh in enumerate(self.ranks.counts("MemoryBank", lambda: int(rows.fresh))) if fresh
            ]
            if 0 < len(anew) < self.ranks.size:
                warn_user(
                    f"path: the files of ranks {anew} are new and start at random; those of the others were taken up"
                )
        self._version = self._own_version()

    def __len__(self) -> int:
        return self.size

    @property
    def device(self) -> torch.device:
        """Where features and indices are expected."""
        return self.labels.device

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the bank, or None."""
        return None if self.ranks is None else self.ranks.group

    @property
    def index(self) -> LabelIndex:
        """Classes of the stored rows, for `ntdne_kernels.functional`."""
        return LabelIndex(self.classes, self.local(self.offsets, clamp=True), None, None, len(self.images))

    @property
    def last_log_p(self) -> Tensor:
        """(n,) log p of each of `images` when it was last scored, in training or by `refresh_indicator`.

        −inf: no other image has its label. NaN: not scored yet, or unlabelled.
        """
        return self.scores[:-1]

    def places(self, index: Tensor) -> Tensor:
        """(B,) rows of `storage` that hold the images `index` (B,), of a bank that is not sharded.

        Indices of no image stay as they are.
        """
        inside = (index >= 0) & (index < self.size)
        return torch.where(inside, self.position[index.clamp(0, self.size - 1)], index)

    def look_up(self, index: Tensor, labels: Tensor, sizes: list[int]) -> "Batch":
        """The batch of all ranks, given each one's images (b,), labels (b,) for those of index −1, and their counts."""
        assert self.ranks is not None
        index, labels = self.ranks.gather(torch.stack([index, labels], dim=1), sizes).unbind(dim=1)
        found = torch.full((3, len(index)), torch.iinfo(torch.int64).min, device=index.device)
        if self.images:
            image = self.local(index)
            own = image.clamp(min=0)
            kept = torch.stack(
                [self.labels[own], self.position[own], self.scores[own].float().view(torch.int32).long()]
            )
            found = torch.where(image >= 0, kept, found)
        stored, places, bits = self.ranks.largest(found)  # one rank has each image
        known = places >= 0
        return Batch(
            index,
            torch.where(known, stored, labels),
            torch.where(known, places, NOT_IN_BANK),
            torch.where(known, bits.int().view(torch.float32), torch.nan),
        )

    def local(self, x: Tensor, *, clamp: bool = False) -> Tensor:
        """Images or places of the whole bank as they are counted here; −1 for those of other ranks, or the nearest."""
        if self.ranks is None:
            return x
        first, n = self.images.start, len(self.images)
        if clamp:
            return (x - first).clamp(0, n)
        return torch.where((x >= first) & (x < first + n), x - first, NOT_IN_BANK)

    def whole(self, part: Tensor) -> Tensor:
        """The tensor (N, ...) of which this rank keeps `part` (n, ...), as state dicts hold it: a DTensor on ranks."""
        return part if self.ranks is None else self.ranks.as_dtensor(part, len(self))

    def part(self, x: Tensor) -> Tensor:
        """What this rank keeps of a tensor (N, ...) or DTensor."""
        return x if self.ranks is None else self.ranks.part(x)

    def take(self, rows: Tensor) -> Tensor:
        """(b, D) copy of the rows (b,) of `storage`, on the bank's device."""
        return self.storage[rows.to(self.storage.device)].to(self.device)

    def stored_labels(self, rows: Tensor) -> Tensor:
        """(b,) labels of the rows (b,) of `storage`."""
        c = torch.searchsorted(self.offsets, rows + self.images.start, right=True) - 1
        if len(self.classes) == 0:
            return torch.full_like(rows, UNLABELLED)
        return torch.where(c >= 0, self.classes[c.clamp(min=0)], UNLABELLED)

    def rows(self, index: Any) -> Tensor:
        """(b, D) copy of the rows of the images `index` (b,); on ranks each holds those of all for a moment.

        Raises:
            IndexError: an index is not an image of the bank (on a GPU by PyTorch; there a sharded bank gives NaN).
        """
        if self.ranks is None:
            return self.take(self.position[self._check_images(index)])
        sizes = self.ranks.counts("rows", lambda: len(self._check_images(index)))
        index = as_index(index, device=self.device)
        whole = self.look_up(index, index, sizes).places
        places, own = self.local(whole), self.ranks.own(sizes)
        rows = torch.full((len(places), self.storage.size(1)), -torch.inf, dtype=self._wide, device=self.device)
        rows[places >= 0] = self.take(places[places >= 0]).to(self._wide)
        found = self.ranks.largest(rows)[own]  # one rank has each row
        return torch.where(whole[own].unsqueeze(1) >= 0, found, torch.nan).to(self.storage.dtype)

    def update_(self, features: Tensor, index: Any, momentum: float = 0.5, *, validate: bool = False) -> "MemoryBank":
        """Blend (b, D) features into the rows of the images `index` (b,), in place; see `functional.update_bank_`.

        Of a sharded bank each rank writes the rows it keeps, in the order of the batch of all ranks.
        """
        if self.ranks is None:
            index = self._check_index(index)
            check_range("index", index, len(self), look=validate)
            self._write(features, self.places(index), momentum, validate)
            self.fresh = False
            return self
        sizes = self.ranks.counts("update_bank", lambda: self._check_update(features, index, momentum, validate))
        index = as_index(index, device=self.device)
        batch = self.look_up(index, index, sizes)
        features = self.ranks.gather(features.detach().to(self._wide), sizes)  # of one dtype on all ranks
        if self.images:
            self._write(features, self.local(batch.places), momentum, validate=False)
        self.fresh = False
        return self

    def relabel(self, labels: Any) -> None:
        """Give the images new labels (N,); rows stay with their images, scores of changed images are forgotten.

        Raises:
            TypeError, ValueError: labels are no integers, below −1, or not one for each image.
        """

        def check() -> dict[str, Any]:
            nonlocal labels
            labels = as_labels(labels)
            if len(labels) != len(self):
                raise ValueError(f"labels: expected one for each of the {len(self)} images, got {len(labels)}")
            if labels.data_ptr() == self.labels.data_ptr():
                raise ValueError(
                    "labels: expected a tensor of its own, got the bank's `labels`; change a clone of them"
                )
            return self._facts(labels, self.storage.size(1), self.storage.dtype)

        facts = check() if self.ranks is None else self.ranks.same_everywhere(check)
        facts |= {"first": self.images.start}
        path = None if self.path is None else self.path.with_name(f"{self.path.name}.relabelled")
        like = self.storage
        with torch.inference_mode(False):  # what becomes a buffer can be written outside of it too
            new = self._class_order(labels)
            rows = self._together(
                lambda: allocate(self.kind, (len(like), like.size(1)), like.dtype, like.device, path, facts)
            ).rows
        most, step = len(self), INIT_CHUNK
        if self.ranks is not None:  # each rank gets the chunks of all
            most, step = self.ranks.most(len(self)), max(INIT_CHUNK // self.ranks.size, 1)
        for start in range(0, most, step):  # on each rank as often as on any other
            chunk = slice(start, start + step)
            rows[chunk] = self.rows(new["order"][chunk]).to(rows.device)
        if path is None or self.path is None:
            self.storage.copy_(rows)
        else:
            old = self.path
            self._together(lambda: take_place(path, old))
            self.storage = rows
        for name, tensor in new.items():
            setattr(self, name, tensor)
        kept = labels[self.images.start : self.images.stop].to(self.device, torch.int64)
        self.last_log_p.masked_fill_(kept != self.labels, torch.nan)
        self.labels.copy_(kept)
        self._version = self._own_version()

    def record_(self, log_p: Tensor, index: Tensor) -> None:
        """Remember the scores log p (B,) of the images `index` (B,); of an image given twice the higher one.

        Of a sharded bank each rank remembers those of its own images.
        """
        n = len(self.images)
        if n == 0:
            return
        image = self.local(index)
        inside = (image >= 0) & (image < n)
        labels = self.labels[image.clamp(0, n - 1)]
        log_p = torch.where(labels == UNLABELLED, torch.nan, log_p)
        self.scores.scatter_reduce_(
            0, torch.where(inside, image, n), log_p.to(self.scores.dtype), "amax", include_self=False
        )

    def extra_repr(self) -> str:
        shared = "" if self.ranks is None else f", {len(self.images)} images on this rank of {self.ranks.size}"
        D = self.storage.size(1)
        return f"{len(self)} images, {D} values, {len(self.classes)} classes, {self.storage.dtype}{shared}"

    def skipped_rows(self) -> int:
        """Features that updates on this bank's GPU have left out so far, for any bank; 0 on a CPU. Synchronises."""
        return int(torch.ops.ntdne_kernels.skipped_rows(self.storage))

    @property
    def _wide(self) -> torch.dtype:
        return accumulator_dtype(self.storage.dtype)

    def _check_index(self, index: Any) -> Tensor:
        images = as_index(index, device=self.device)
        if images.device != self.device:
            raise ValueError(f"index: expected the bank's device, {self.device}, got {images.device}")
        return images

    def _check_images(self, index: Any) -> Tensor:
        images = self._check_index(index)
        if images.device.type == "cpu" and bool((images == NOT_IN_BANK).any()):
            raise IndexError(f"index: expected images from 0 to {len(self) - 1}, got -1")
        check_range("index", images, len(self))
        return images

    def _check_update(self, features: Tensor, index: Tensor, momentum: float, validate: bool) -> int:
        look = validate or (self.device.type == "cpu" and not torch.compiler.is_compiling())
        like = self.storage.new_empty((0, self.storage.size(1)), device=self.device)
        return len(check_update(like, features, self._check_index(index), momentum, len(self), look=look))

    def _write(self, features: Tensor, rows: Tensor, momentum: float, validate: bool) -> None:
        if self.kind != "device":
            features, rows = features.detach().to(self.storage.device), rows.to(self.storage.device)
        update_bank_(self.storage, features, rows, momentum, validate=validate)

    def _facts(self, labels: Tensor, dim: int, dtype: torch.dtype) -> dict[str, Any]:
        """What ranks, or a bank and its file, must have in common."""
        facts = {"images": len(labels), "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
        return facts if self.ranks is None and self.path is None else facts | {"labels": fingerprint(labels)}

    def _together(self, call: Callable[[], T]) -> T:
        return call() if self.ranks is None else self.ranks.together(call)

    def _own_path(self, path: str | os.PathLike[str]) -> Path:
        path = Path(path)
        if self.ranks is not None:
            path = path.with_name(f"{path.name}.{self.ranks.rank}-of-{self.ranks.size}")
        return path.resolve()  # also after the working directory has changed; behind a link, its target is replaced

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryBank":
        """`.to()` and its like: rows in host memory and on disk stay there."""
        storage = self.storage
        try:
            if self.kind != "device":
                self._buffers["storage"] = None
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            if self.kind != "device":
                self._buffers["storage"] = storage
        if self.kind == "host" and self.device.type == "cuda" and not storage.is_pinned():
            self.storage = storage.pin_memory()
        self._version = self._own_version()
        return self

    def check_untouched(self) -> None:
        """RuntimeError where the buffers were overwritten from outside, as DistributedDataParallel does."""
        if not torch.compiler.is_compiling() and self._version != self._own_version():
            raise RuntimeError(
                "the bank's buffers were overwritten, probably with those of rank 0: a criterion in a wrapped module "
                "needs DistributedDataParallel(..., broadcast_buffers=False); this bank is lost"
            )

    def _own_version(self) -> int:
        return -1 if self.labels.is_inference() else self.labels._version

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, by pickle too."""
        if self.path is not None:
            raise TypeError(f"MemoryBank: a bank on disk has the file {self.path} for itself and cannot be copied")
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryBank":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._version = copied._own_version()
        return copied

    def _class_order(self, labels: Tensor) -> dict[str, Tensor]:
        """The bank's buffers of that name, given all labels (N,)."""
        tensors = class_order(labels, self.images.start, len(self.images))
        names = ("classes", "offsets", "order", "position")
        as_they_stand = torch.arange(self.images.start, self.images.stop)
        return {
            name: (as_they_stand if x is None else x).to(self.device, copy=True)
            for name, x in zip(names, tensors, strict=True)
        }

    def _start_at_random(self, generator: torch.Generator | None) -> None:
        """Rows of length 1 in any direction: the same whatever the number of ranks, which skip what others keep.

        The first chunk of the class order is drawn from the generator, each later one from one of its own.
        """
        source = self.device if generator is None else generator.device
        first, stop, dim = self.images.start, self.images.stop, self.storage.size(1)
        seed = 0
        for begin in range(0, len(self), INIT_CHUNK):
            end = min(begin + INIT_CHUNK, len(self))
            if begin > 0:
                if seed == 0:
                    seed = int(torch.randint(1, 2**62, (), generator=generator, device=source))
                if end <= first or begin >= stop:
                    continue
            drawn = generator if begin == 0 else torch.Generator(source).manual_seed(seed + begin)
            noise = torch.randn((end - begin, dim), generator=drawn, device=source)
            mine = slice(max(begin, first) - first, min(end, stop) - first)
            if mine.start < mine.stop:
                noise = nn.functional.normalize(noise[max(first - begin, 0) :][: mine.stop - mine.start], dim=1)
                self.storage[mine].copy_(noise)

    def _state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, of this rank."""
        return {"storage": self.storage, "labels": self.labels, "order": self.order, "scores": self.last_log_p}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Tensors of N rows; of a sharded bank as DTensors, which torch.distributed.checkpoint loads on any number of
        ranks.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in self._state().items():
            destination[prefix + name] = self.whole(part.detach())

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
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name in self._state().keys() & {key.removeprefix(prefix) for key in state}:
            state[prefix + name] = self.part(state[prefix + name])
        scores = state.pop(f"{prefix}scores", None)
        # Into the buffers, also where the caller said assign=True: rows stay in their file, or in this rank's memory.
        local_metadata = local_metadata | {"assign_to_params_buffers": False}
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._version = self._own_version()
        self.fresh &= f"{prefix}storage" not in state
        if scores is not None:
            self.last_log_p.copy_(scores)
        elif strict:
            missing_keys.append(f"{prefix}scores")

    def disagreement(self, state_dict: dict[str, Any], prefix: str = "") -> str | None:
        """Why a checkpoint's entries under `prefix` do not fit this bank, on any rank; or None."""
        problem = self.own_disagreement(state_dict, prefix)
        return problem if self.ranks is None else self.ranks.first_problem(problem)

    def own_disagreement(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """As `disagreement`, of this rank alone."""
        names = tuple(self._state())
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if len(missing) == len(names):
            return None  # nothing of a bank: missing keys, which strict=False allows
        if missing:
            return f"the checkpoint lacks {', '.join(missing)}"
        storage, labels, order, scores = (state_dict[prefix + name] for name in names)
        if self.ranks is None and hasattr(storage, "full_tensor"):
            return "the checkpoint's tensors are sharded; load_checkpoint loads what save_checkpoint wrote on any ranks"
        N, D = len(self), self.storage.size(1)
        if storage.shape != (N, D):
            return f"expected {N} images of {D} values, the checkpoint holds shape {tuple(storage.shape)}"
        if labels.shape != (N,) or order.shape != (N,) or scores.shape != (N,):
            return f"the checkpoint's labels, order and scores do not belong to its {N} rows"
        labels, order = self.part(labels).to(self.device), self.part(order).to(self.device)
        if len(labels) != len(self.labels):
            return f"expected the {len(self.labels)} images of this rank, the checkpoint holds {len(labels)}"
        differs: Tensor = labels != self.labels
        if bool(differs.any()):
            image = int(differs.nonzero()[0])
            return (
                f"labels differ at {int(differs.sum())} of {len(labels)} images, first at image "
                f"{self.images[image]}: {int(labels[image])} in the checkpoint, {int(self.labels[image])} here. If the "
                "archive is the same, give the bank the checkpoint's labels first: memory.relabel(labels)"
            )
        if not torch.equal(order, self.order):
            return "the checkpoint's row order is not the class order of its labels"
        return None


class Batch(NamedTuple):
    """The images of all ranks' batches, (B,) each."""

    images: Tensor
    labels: Tensor
    places: Tensor
    """In the class order of the whole bank; −1 for none."""
    scores: Tensor
    """log p when last scored; NaN for never."""


def _check_bank(dim: int, dtype: torch.dtype) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
