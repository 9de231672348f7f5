"""Checkpoints of a training run: written as a whole or not at all, and loaded by any number of processes.

A checkpoint is a folder in the format of torch.distributed.checkpoint (DCP). Tensors that are sharded over the ranks,
such as those of a sharded MemoryBank, are written by the ranks that hold them; everything else is replicated, and rank
0 writes its copy. DCP's planners, writer and reader do the work. What the ranks tell each other is sent here and not by
dcp.save, which pickles exceptions: one that cannot be pickled leaves the other ranks waiting.

Shapes: W ranks, N images.
"""

import dataclasses
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.distributed import OneProcess, Processes, processes_of

PART = 64 * 2**20  # bytes of a tensor that are written and read at a time
PROBLEMS_SHOWN = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded; raised on all ranks, naming the first one that failed and why."""


def save_checkpoint(
    folder: str | os.PathLike[str],
    state: Mapping[str, Any],
    step: int,
    *,
    keep: int = 2,
    process_group: ProcessGroup | DeviceMesh | None = None,
    no_dist: bool = False,
) -> None:
    """Write a checkpoint of what a training loop needs to continue, and remove all but the newest ones.

    All ranks call it together, with a folder that all of them see. The checkpoint is written under another name and
    renamed once every file is on the disk. So a run may be killed, or a disk be full, at any moment, and the checkpoint
    before is whole.

    Args:
        folder: of this run's checkpoints, and of no other run's.
        state: name (without a dot) → module, optimizer, scheduler or anything else with state_dict and load_state_dict.
            DistributedDataParallel and torch.compile leave no trace in the names. Whatever is not a module must be the
            same on all ranks: optimizers must be of replicated parameters.
        step: number of this checkpoint, larger than those before.
        keep: how many checkpoints to keep, this one included.
        process_group: the ranks that save; None: all of them, or this process alone if there is no process group. They
            must be the ranks that share the banks: where each group has a bank, each saves to a folder of its own.
        no_dist: this process saves alone, whatever other ranks do.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not as described, or not the same on all ranks.
        CheckpointError: a rank failed, or a bank is shared by other ranks. The older checkpoints are whole, and nothing
            is left of this one.

    Example:
        >>> import tempfile
        >>> encoder = nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, {"encoder": encoder}, step=1)
        ...     load_checkpoint(folder, {"encoder": encoder})
        1
    """
    processes = _processes(process_group, no_dist)
    items = _items(processes, state, step=(step, 0), keep=(keep, 1))
    rank = processes.rank
    folder = Path(folder)
    checkpoint = folder / f"step-{step:08d}"
    partial = checkpoint.with_suffix(".partial")
    writer = FileSystemWriter(partial)
    planner = _InParts(flatten_state_dict=False, flatten_sharded_tensors=False)
    failed = f"cannot save {checkpoint}"
    try:
        with _together(processes, failed):
            _check_banks(items, processes)
            if rank == 0:
                _make_room(folder, step)
        with _together(processes, failed):
            entries = _entries({name: item.state_dict() for name, item in items.items()}, items)
            own = {key: value for key, value in entries.items() if rank == 0 or isinstance(value, DTensor)}
            planner.set_up_planner(own, is_coordinator=rank == 0)
            writer.set_up_storage_writer(rank == 0)
            plan = writer.prepare_local_plan(planner.create_local_plan())
        plans = processes.gather_objects(plan)
        with _together(processes, failed):
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
            written = writer.write_data(planner.finish_plan(plans[rank]), planner).wait()
        all_written = processes.gather_objects(written)
        with _together(processes, failed):
            if rank == 0:
                writer.finish(metadata, all_written)
                _check_files(partial, FileSystemReader(partial).read_metadata())
                _to_disk(partial)
                partial.rename(checkpoint)
                _to_disk(folder)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with _together(processes, f"saved {checkpoint}, but cannot remove an older one"):
        if rank == 0:
            _remove_all_but(keep, folder)


def load_checkpoint(
    folder: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
    no_dist: bool = False,
) -> int | None:
    """Load the newest checkpoint into what `save_checkpoint` was given, in place; all ranks call it together.

    The number of ranks may differ from that of the save. Before anything is changed, the checkpoint is checked: every
    file is there and long enough, every tensor has its shape here, nothing is missing or left over, and the labels are
    those of the bank. `state` may name less than was saved, an encoder alone for instance.

    Args:
        folder: of this run's checkpoints.
        state: name → what was saved under that name.
        process_group: the ranks that load; None: all of them, or this process alone if there is no process group.
        no_dist: this process loads alone, whatever other ranks do.

    Returns:
        The step of the checkpoint, or None if there is none yet and nothing was loaded.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not as described, or not the same on all ranks.
        CheckpointError: the checkpoint is damaged or does not fit; the error says that nothing was changed, unless a
            disk failed while it was read.

    Example:
        >>> load_checkpoint("no such folder", {"encoder": nn.Linear(4, 2)}) is None
        True
    """
    processes = _processes(process_group, no_dist)
    items = _items(processes, state)
    folder = Path(folder)
    with _together(processes, f"cannot look for checkpoints in {folder}"):
        saved = _saved(folder)
    saved = processes.gather_objects(saved)[0]
    if not saved:
        return None
    step = max(saved)
    reader = FileSystemReader(saved[step])
    modules = {name: item for name, item in items.items() if isinstance(item, nn.Module)}
    others = {name: item for name, item in items.items() if name not in modules}

    refused = f"cannot load {saved[step]}; nothing was changed"
    with _together(processes, refused):
        metadata = reader.read_metadata()
        _check_files(saved[step], metadata)
        before = {name: item.state_dict() for name, item in items.items()}
        entries = _entries(before, items)
        _check_entries(entries, metadata, items)
        aside: dict[str, Any] = dict.fromkeys(others)
        _read(reader, metadata, aside)
    # DCP loads in place, into the bank's own tensors, so what decides on loading is read into copies. Labels are first:
    # where one differs, only the rank that keeps it can say so, while the order differs on other ranks too.
    for key in ("labels", "order"):
        with _together(processes, refused):
            banks = _banks(items)
            copies = {prefix + key: torch.empty_like(entries[prefix + key]) for prefix in banks}
            _read(reader, metadata, copies)
            for prefix, bank in banks.items():
                problem = bank.own_disagreement(entries | copies, prefix)
                if problem is not None:
                    raise ValueError(f"{prefix.rstrip('.')}: {problem}")
    try:
        with _together(processes, refused):
            for name, item in others.items():
                item.load_state_dict(aside[name])
    except CheckpointError:
        for name, item in others.items():
            item.load_state_dict(before[name])
        raise

    broken = f"failed in the middle of loading {saved[step]}; what was loaded into is unusable"
    with _together(processes, broken):
        loaded = {key: value for key, value in entries.items() if key not in others}
        _read(reader, metadata, loaded)
        for name in modules:
            before[name].update({key: loaded[f"{name}.{key}"] for key in before[name]})
    with _together(processes, broken):
        for name, module in modules.items():
            module.load_state_dict(before[name])
    return step


def remove_checkpoints(
    folder: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
    no_dist: bool = False,
) -> None:
    """Remove all checkpoints in the folder, at the end of a run; all ranks call it together.

    Raises:
        CheckpointError: one of them cannot be removed.
    """
    processes = _processes(process_group, no_dist)
    with _together(processes, f"cannot remove the checkpoints in {folder}"):
        if processes.rank == 0:
            _remove_all_but(0, Path(folder))


class _InParts(DefaultSavePlanner):
    """Cuts large tensors into ranges of rows.

    DCP copies what it writes, from a GPU for instance, and reads what it loads, one such part at a time. Loading a bank
    of 2 GB takes 0.13 GB more; in one part it would take 2 GB more. A rank that needs some rows of another rank's shard
    reads only the parts that have them.
    """

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.parts: dict[MetadataIndex, Tensor] = {}
        return dataclasses.replace(plan, items=[part for item in plan.items for part in self._cut(item)])

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.parts[index] if index in self.parts else super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            object = tree_map_only(Tensor, lambda tensor: _on_cpu(write_item.index.fqn, tensor), object)
        written: Tensor | io.BytesIO = super().transform_object(write_item, object)
        return written

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        data, whole = item.tensor_data, self.lookup_object(item.index)
        if data is None or whole.nbytes <= PART:
            yield item
            return
        row, *rest = data.chunk.offsets
        for part in whole.split(max(1, PART * len(whole) // whole.nbytes)):
            offsets = torch.Size((row, *rest))
            index = MetadataIndex(item.index.fqn, offsets)
            self.parts[index] = part
            chunk = ChunkStorageMetadata(offsets, part.shape)
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=chunk))
            row += len(part)


@contextmanager
def _together(processes: Processes, failed: str) -> Iterator[None]:
    """Wait for all processes at the end of the block; raise CheckpointError on all of them if it failed on one."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    problems = processes.gather_objects(error and _reason(error))
    failing = [rank for rank, problem in enumerate(problems) if problem is not None]
    if failing:
        others = "" if len(failing) == 1 else f" (and {len(failing) - 1} more ranks failed)"
        raise CheckpointError(f"{failed}: {processes.name_of(failing[0])}{problems[failing[0]]}{others}") from error


def _reason(error: BaseException) -> str:
    # On a full disk torch.save raises "RuntimeError: unexpected pos 704 vs 598" on top of the reason.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _processes(process_group: ProcessGroup | DeviceMesh | None, no_dist: bool) -> Processes:
    """Those that save or load together: this one alone, those of the group, or all there are."""
    if no_dist:
        return OneProcess()
    if process_group is None and distributed.is_available() and distributed.is_initialized():
        process_group = distributed.group.WORLD
    return processes_of(process_group)


def _items(processes: Processes, state: Mapping[str, Any], **numbers: tuple[int, int]) -> dict[str, Any]:
    """The items of the state, without wrappers, once all processes were given the same names and numbers.

    Each of the numbers comes with the least it may be.
    """
    items: dict[str, Any] = {}

    def check() -> dict[str, Any]:
        for name, (number, least) in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")
        items.update(_unwrapped(state))
        return {"state": list(items)} | {name: number for name, (number, _) in numbers.items()}

    processes.same_everywhere(check)
    return items


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without wrappers, which would rename every entry of a module."""
    items = {}
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict of names and what to save, got {type(state).__name__}")
    for name, item in state.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"state: expected names without a dot, got {name!r}")
        if not hasattr(item, "state_dict") or not hasattr(item, "load_state_dict"):
            raise TypeError(
                f"state[{name!r}]: expected something with state_dict and load_state_dict, got {type(item).__name__}"
            )
        while isinstance(item, DistributedDataParallel) or hasattr(item, "_orig_mod"):
            item = item.module if isinstance(item, DistributedDataParallel) else item._orig_mod
        items[name] = item
    return items


def _entries(states: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds: each entry of a module as `name.key`, the state of anything else in one piece."""
    entries: dict[str, Any] = {}
    for name, state in states.items():
        if isinstance(items[name], nn.Module):
            entries |= {f"{name}.{key}": value for key, value in state.items()}
        else:
            entries[name] = state
    return entries


def _banks(items: dict[str, Any]) -> dict[str, MemoryBank]:
    """The banks in the modules among the items, by the prefix of their entries."""
    return {
        ".".join(filter(None, (name, path))) + ".": module
        for name, root in items.items()
        if isinstance(root, nn.Module)
        for path, module in root.named_modules()
        if isinstance(module, MemoryBank)
    }


def _check_banks(items: dict[str, Any], processes: Processes) -> None:
    """Refuse a bank of which other ranks than those that save have rows, or whose rows here would be another bank's."""
    saving = processes.global_ranks()
    for prefix, bank in _banks(items).items():
        sharing = bank.processes.global_ranks()
        if not isinstance(bank.processes, OneProcess) and sharing != saving:
            raise ValueError(
                f"{prefix.rstrip('.')}: expected a bank shared by the ranks that save, {saving}, got one of {sharing}; "
                "save_checkpoint(..., process_group=...) of its group, with a folder for each group"
            )


def _read(reader: FileSystemReader, metadata: Metadata, entries: dict[str, Any]) -> None:
    """Fill the tensors of `entries` in place, and replace its other values."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(entries, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def _check_files(checkpoint: Path, metadata: Metadata) -> None:
    """Refuse a checkpoint of which a file is missing or cut off, without reading any."""
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        file = checkpoint / name
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; do all ranks see the same folder?")
        if file.stat().st_size < size:
            raise ValueError(f"{file} is cut off: expected {size} bytes, found {file.stat().st_size}")


def _check_entries(entries: dict[str, Any], metadata: Metadata, names: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose entries have other names or shapes, or of whose tensors a part was never written."""
    saved = {key: entry for key, entry in metadata.state_dict_metadata.items() if key.split(".")[0] in names}
    problems = [f"{key} is not in the checkpoint" for key in entries if key not in saved]
    problems += [f"{key} is in the checkpoint only" for key in saved if key not in entries]
    problems += [
        f"{key}: the checkpoint holds {_shape(saved[key])}, expected {_shape(entry)}"
        for key, entry in entries.items()
        if key in saved and _shape(saved[key]) != _shape(entry)
    ]
    problems += [f"{key}: parts of it are missing" for key in entries if key in saved and not _is_whole(saved[key])]
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        raise ValueError("; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else ""))


def _is_whole(entry: Any) -> bool:
    """Whether the parts of a saved tensor, which do not overlap, are all of it."""
    if not isinstance(entry, TensorStorageMetadata):
        return True
    return sum(chunk.sizes.numel() for chunk in entry.chunks) >= entry.size.numel()


def _shape(entry: Any) -> str:
    if isinstance(entry, TensorStorageMetadata):
        return f"shape {tuple(entry.size)}"
    return f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else "no tensor"


def _on_cpu(key: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        raise TypeError(f"{key}: expected a state that is the same on all ranks, found a sharded tensor in it (FSDP?)")
    return tensor.cpu()


def _saved(folder: Path) -> dict[int, Path]:
    """The checkpoints in the folder, by step."""
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return {}
    return {int(path.name[5:]): path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()}


def _make_room(folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(_saved(folder), default=-1)
    if step <= newest:
        raise ValueError(f"step: expected more than {newest}, the newest checkpoint in the folder, got {step}")
    _remove_partial(folder)


def _remove_all_but(newest: int, folder: Path) -> None:
    """Each is renamed first, so an interrupted removal leaves nothing that passes for a checkpoint."""
    saved = _saved(folder)
    for step in sorted(saved)[: max(len(saved) - newest, 0)]:
        saved[step].rename(saved[step].with_suffix(".partial"))
    _remove_partial(folder)


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)


def _to_disk(folder: Path) -> None:
    """Make the names in the folder survive a power cut; the files' contents already do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
