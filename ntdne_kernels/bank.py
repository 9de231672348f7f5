"""The memory bank: one unit row per archive image, kept in class order behind an interface by image index.

Shapes: B features, N images, D values, C classes.
"""

import copy
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import BANK_DTYPES, NOT_IN_BANK, UNLABELLED, accumulator_dtype, check_range
from ntdne_kernels.distributed import Ranks
from ntdne_kernels.functional import check_update, write_rows
from ntdne_kernels.label_index import LabelIndex, class_order, fingerprint
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.schema import Archive
from ntdne_kernels.storage import allocate, mark, take_place
from ntdne_kernels.user_warning import warn_user

INIT_CHUNK = 65536  # rows drawn or looked at together, so that neither needs a second bank
UNIT = 0.01  # how far from 1 the length of a row may be

REWRITTEN = (
    "something outside wrote into the bank's tensors, an average over the entries of state_dict() or to_empty() say; "
    "keep the criterion out of what is averaged so. memory.load_state_dict(state), of a checkpoint or of the memory "
    "that was trained, brings back what was lost"
)

T = TypeVar("T")


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
        kind, path: the arguments `storage` and `path`, the latter of this rank's own file and absolute.
        ranks: the `distributed.Ranks` that share the bank, or None.

    Raises:
        TypeError, ValueError: labels, dim or dtype are not as described, or not the same on all ranks; or the file is
            another bank's.
        OSError: the file cannot be made or is in use.
    """

    labels: Tensor
    order: Tensor
    position: Tensor
    classes: Tensor
    offsets: Tensor
    scores: Tensor
    touched: Tensor

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
        self.labels = labels[first : first + n].to(device, torch.int64, copy=True)
        for name, tensor in self._class_order(labels).items():
            setattr(self, name, tensor)
        rows = self._together(lambda: allocate(storage, (n, dim), dtype, device, self.path, facts | {"first": first}))
        self._storage = rows.rows
        # Extra last slot: a sink for queries that are not kept here.
        self.scores = torch.full((n + 1,), torch.nan, device=device)
        # The buffer that averaging finds: in a copy it is its distance from the first bank, in its source one less.
        self.register_buffer("touched", torch.zeros((), device=device), persistent=False)
        self._source: Callable[[], MemoryBank | None] | None = None
        self._generation = 0
        self._sealed: tuple[int, ...] = ()
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
        return None if self.ranks is None else self.ranks.group

    @property
    def index(self) -> LabelIndex:
        """Classes of the stored rows, for `ntdne_kernels.functional`."""
        self.check_untouched()
        return LabelIndex(self.classes, self.local(self.offsets, clamp=True), None, None, len(self.images))

    @property
    def last_log_p(self) -> Tensor:
        """(n,) log p of each of `images` when it was last scored, in training or by `refresh_indicator`.

        −inf: no other image has its label. NaN: not scored yet, or unlabelled.
        """
        if not torch.compiler.is_compiling():
            self._follow()  # no more: the criterion looks at scores while it loads a checkpoint into what is lost
        return self.scores[:-1]

    @property
    def archive(self) -> Archive:
        """What a batch of images is looked up in, of a bank that is not sharded; see `ops.look_up`."""
        return Archive(self.labels, self.position, self.scores)

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
        return self._labels_of(rows + self.images.start)

    def _labels_of(self, places: Tensor) -> Tensor:
        """(b,) labels at the places (b,) of the whole class order."""
        c = torch.searchsorted(self.offsets, places, right=True) - 1
        if len(self.classes) == 0:
            return torch.full_like(places, UNLABELLED)
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
            index = self._check_update(features, index, momentum, look=validate)
            # On the rows' device the op itself looks the places up: on a GPU that is one launch for five.
            if self.kind == "device":
                self._write(features, index, momentum, self.position)
            else:
                self._write(features, self.places(index), momentum)
            self.fresh, self._source = False, None
            return self
        look = validate or (self.device.type == "cpu" and not torch.compiler.is_compiling())
        sizes = self.ranks.counts("update_bank", lambda: len(self._check_update(features, index, momentum, look=look)))
        index = as_index(index, device=self.device)
        batch = self.look_up(index, index, sizes)
        features = self.ranks.gather(features.detach().to(self._wide), sizes)  # of one dtype on all ranks
        if self.images:
            self._write(features, self.local(batch.places), momentum)
        self.fresh, self._source = False, None
        return self

    def relabel(self, labels: Any) -> None:
        """Give the images new labels (N,); rows stay with their images, scores of changed images are forgotten.

        Raises:
            TypeError, ValueError: labels are no integers, below −1, or not one for each image.
        """

        def check() -> dict[str, Any]:
            nonlocal labels
            self._follow()
            if self._sealed != self._seals():
                self._check_lengths()  # what was written into labels and order ends here
            labels = as_labels(labels)
            if len(labels) != len(self):
                raise ValueError(f"labels: expected one for each of the {len(self)} images, got {len(labels)}")
            if labels.data_ptr() == self.labels.data_ptr():
                raise ValueError(
                    "labels: expected a tensor of its own, got the bank's `labels`; change a clone of them"
                )
            return self._facts(labels, self._storage.size(1), self._storage.dtype)

        facts = check() if self.ranks is None else self.ranks.same_everywhere(check)
        facts |= {"first": self.images.start}
        path = None if self.path is None else self.path.with_name(f"{self.path.name}.relabelled")
        self.labels.copy_(self._labels_of(self.position))
        self._seal()
        like = self._storage
        with torch.inference_mode(False):  # what the bank keeps can be written outside of it too
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
            self._storage.copy_(rows)
        else:
            old = self.path
            self._together(lambda: take_place(path, old))
            self._storage = rows
        for name, tensor in new.items():
            setattr(self, name, tensor)
        kept = labels[self.images.start : self.images.stop].to(self.device, torch.int64)
        self.scores[:-1].masked_fill_(kept != self.labels, torch.nan)
        self.labels.copy_(kept)
        self._seal()

    def record_(self, log_p: Tensor, index: Tensor) -> None:
        """Remember the scores log p (B,) of the images `index` (B,); of an image given twice the higher one.

        Of a sharded bank each rank remembers those of its own images.
        """
        torch.ops.ntdne_kernels.record_scores_(self.scores, log_p, self.local(index), self.labels)

    def extra_repr(self) -> str:
        shared = "" if self.ranks is None else f", {len(self.images)} images on this rank of {self.ranks.size}"
        D = self._storage.size(1)
        return f"{len(self)} images, {D} values, {len(self.classes)} classes, {self._storage.dtype}{shared}"

    def skipped_rows(self) -> int:
        """Features without a direction that were left out so far on the bank's GPU, of the loss and of updates.

        They are counted for all banks on it. 0 on a CPU, where they raise. Synchronises.
        """
        on_device = int(skipped_counter(self.device)) if self.device.type != "cpu" else 0
        return on_device + int(torch.ops.ntdne_kernels.skipped_rows(self._storage))

    @property
    def _wide(self) -> torch.dtype:
        return accumulator_dtype(self._storage.dtype)

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

    def _write(self, features: Tensor, index: Tensor, momentum: float, position: Tensor | None = None) -> None:
        device = self._storage.device
        write_rows(self._storage, features.detach().to(device), index.to(device), momentum, position)

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
        """`.to()` and its like, for the rows; in host memory and on disk they stay.

        All else takes the device alone: `.type()` would round labels, `.half()` scores, and `.to_empty()` lose both.
        """
        self._follow()
        untouched = self._sealed == self._seals()
        storage = fn(self._storage) if self.kind == "device" else self._storage
        if storage.dtype not in BANK_DTYPES:
            raise TypeError(f"memory: rows are float64, float32, float16 or bfloat16, and cannot be {storage.dtype}")
        untouched &= storage is self._storage
        moved = {name: tensor.to(fn(tensor[:0]).device) for name, tensor in self._known().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.touched.fill_(self._generation)
        self._storage = storage
        for name, tensor in moved.items():
            setattr(self, name, tensor)
        if self.kind == "host" and self.device.type == "cuda" and not storage.is_pinned():
            self._storage = storage.pin_memory()
        self._seal()
        if not untouched:
            self._sealed = ()  # the next use looks, once
        return self

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
        if self._sealed != self._seals():
            self._check_labels()
            self._check_lengths()
            self._seal()

    def _seals(self) -> tuple[int, ...]:
        """What tells whether labels and order were written since, without a look at them.

        Who writes rows from outside, through the tensors of `state_dict`, writes these too. The rows' own version says
        nothing: the bank's updates raise it, those of compiled code without Python.
        """
        labels, order = self.labels, self.order
        return labels.data_ptr(), _version(labels), order.data_ptr(), _version(order)

    def _seal(self) -> None:
        self._sealed, self._seen = self._seals(), _version(self.touched)

    def _check_labels(self) -> None:
        written = f"{REWRITTEN}; memory.relabel(labels) gives new labels"
        known = self._labels_of(self.position)
        differs = self.labels != known
        if bool(differs.any()):
            image = int(differs.nonzero()[0])
            raise RuntimeError(
                f"memory: the labels of {int(differs.sum())} of {len(known)} images were changed, first that of image "
                f"{self.images[image]} from {int(known[image])} to {self.labels[image].item()}: {written}"
            )
        # A rank knows of its rows' images by their order alone.
        if self.ranks is None:
            changed = not self._inverts(self.order)
        else:
            changed = self._sealed[2:] not in ((), self._seals()[2:])
        if changed:
            raise RuntimeError(f"memory: the order of the rows was changed: {written}")

    def _inverts(self, order: Tensor) -> bool:
        return torch.equal(order[self.position], torch.arange(len(order), device=order.device))

    def _check_lengths(self) -> None:
        found = _first_not_unit(self._storage)
        if found is not None:
            row, length = found
            raise RuntimeError(
                f"memory: the row of image {int(self.order[row])} has length {length:.4g} instead of 1: {REWRITTEN}"
            )

    def _follow(self) -> None:
        """Take the state of the source, where this is a copy that was averaged with it since the last look."""
        if self._source is None or self._seen == _version(self.touched):
            return
        if float(self.touched) != self._generation:  # else others wrote, as DistributedDataParallel does
            source = self._source()
            if source is None:
                raise RuntimeError(
                    "memory: this copy of a bank was averaged with another, and the bank it was copied from is no "
                    "more: its rows and labels are those of when it was copied. memory.load_state_dict(state), of the "
                    "memory that was trained, gives it those it should have"
                )
            source.check_untouched()
            with torch.no_grad():
                for name, theirs in (source._known() | {"_storage": source._storage}).items():
                    own = getattr(self, name)
                    if own.shape == theirs.shape:
                        own.copy_(theirs)
                    else:  # other classes, after relabel
                        setattr(self, name, theirs.to(own.device, copy=True))
            self.fresh = source.fresh
        self._seal()

    def _known(self) -> dict[str, Tensor]:
        """All tensors but the rows."""
        names = ("labels", "order", "position", "classes", "offsets", "scores")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, by pickle too."""
        if self.path is not None:
            raise TypeError(f"MemoryBank: a bank on disk has the file {self.path} for itself and cannot be copied")
        self.check_untouched()
        return self.__dict__ | {"_source": None if self._source is None else _gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._seal()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryBank":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._source, copied._generation = weakref.ref(self), self._generation + 1
        for bank in (self, copied):
            bank.touched.fill_(bank._generation)
            bank._seal()
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
        first, stop, dim = self.images.start, self.images.stop, self._storage.size(1)
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
                self._storage[mine].copy_(noise)

    def _state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, of this rank."""
        return {"storage": self._storage, "labels": self.labels, "order": self.order, "scores": self.scores[:-1]}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Tensors of N rows; of a sharded bank as DTensors, which torch.distributed.checkpoint loads on any number of
        ranks.
        """
        self.check_untouched()
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
        names = {prefix + name: own for name, own in self._state().items()}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if names.keys() - state_dict.keys():  # then all of them
            missing_keys.extend(names if strict else ())
            return
        # Into the bank's tensors, also where the caller said assign=True: rows stay in their file, or on this rank.
        with torch.no_grad():
            for name, own in names.items():
                own.copy_(self.part(state_dict[name]))
        self._seal()
        self.fresh = False

    def disagreement(self, state_dict: dict[str, Any], prefix: str = "") -> str | None:
        """Why a checkpoint's entries under `prefix` do not fit this bank, on any rank; or None."""
        problem = self.own_disagreement(state_dict, prefix)
        storage = state_dict.get(f"{prefix}storage")
        found = None if problem or storage is None else _first_not_unit(self.part(storage))
        if found is not None:
            problem = f"row {found[0]} of the checkpoint has length {found[1]:.4g} instead of 1, as after averaging"
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
        N, D = len(self), self._storage.size(1)
        if storage.shape != (N, D):
            return f"expected {N} images of {D} values, the checkpoint holds shape {tuple(storage.shape)}"
        if labels.shape != (N,) or order.shape != (N,) or scores.shape != (N,):
            return f"the checkpoint's labels, order and scores do not belong to its {N} rows"
        labels, order = self.part(labels).to(self.device), self.part(order).to(self.device)
        known = self._labels_of(self.position)
        if len(labels) != len(known):
            return f"expected the {len(known)} images of this rank, the checkpoint holds {len(labels)}"
        differs: Tensor = labels != known
        if bool(differs.any()):
            image = int(differs.nonzero()[0])
            return (
                f"labels differ at {int(differs.sum())} of {len(labels)} images, first at image "
                f"{self.images[image]}: {labels[image].item()} in the checkpoint, {int(known[image])} here. If the "
                "archive is the same, and no average over the checkpoint changed them, give the bank the checkpoint's "
                "labels first: memory.relabel(labels)"
            )
        if not (self._inverts(order) if self.ranks is None else torch.equal(order, self.order)):
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


def _version(tensor: Tensor) -> int:
    """Rises with each write in place; tensors of inference mode count none."""
    return -1 if tensor.is_inference() else tensor._version


def _first_not_unit(rows: Tensor) -> tuple[int, float] | None:
    """The first of the rows (n, D) that is not of unit length, and its length."""
    for start in range(0, len(rows), INIT_CHUNK):
        chunk = rows[start : start + INIT_CHUNK]
        length = torch.linalg.vector_norm(chunk, dim=1, dtype=accumulator_dtype(rows.dtype))
        wrong = ~((length - 1).abs() <= UNIT)  # NaN too
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            return start + row, float(length[row])
    return None


def _gone() -> None:
    """The source of a copy that came out of a file."""


def _check_bank(dim: int, dtype: torch.dtype) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
