"""Checkpoints: whole or not there at all, and the same run on any number of ranks."""

import copy
import os
import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ntdne_kernels import MemoryBank, NTDNELoss, checkpoint
from ntdne_kernels.checkpoint import CheckpointError, load_checkpoint, remove_checkpoints, save_checkpoint
from tests import ranks

LABELS = torch.tensor([2, 0, -1, 1, 0, 2, 2, 1, 0])  # 9 on 4 ranks: 3, 3, 3 and none
D = 6


def world():
    return distributed.group.WORLD if distributed.is_initialized() else None


def own_rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


class Run:
    """A training run of an encoder with two optimizers; sharded and replicated where there is a process group."""

    def __init__(self, seed, labels=LABELS, dim=D, width=8):
        torch.manual_seed(seed)
        first, last = nn.Linear(4, width), nn.Linear(width, dim)
        self.encoder = nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), last)
        if world():
            self.encoder = DistributedDataParallel(self.encoder)
        generator = torch.Generator().manual_seed(seed)
        self.criterion = NTDNELoss(
            labels, dim, k=0.3, warmup_epochs=2, unit_slope=False, generator=generator, process_group=world()
        )
        self.sgd = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        self.adam = torch.optim.Adam(last.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.sgd, [1, 2])

    def state(self):
        return {
            "encoder": self.encoder,
            "criterion": self.criterion,
            "sgd": self.sgd,
            "adam": self.adam,
            "schedule": self.schedule,
        }

    def train(self, epochs):
        for epoch in epochs:
            self.criterion.set_epoch(epoch)
            generator = torch.Generator().manual_seed(100 * epoch + own_rank())
            images = torch.randn((3, 4), generator=generator)
            index = torch.randperm(len(LABELS), generator=generator)[:3]
            features = self.encoder(images)
            self.criterion(features, index).backward()
            for optimizer in (self.sgd, self.adam):
                optimizer.step()
                optimizer.zero_grad()
            self.criterion.update_bank(features, index)
            self.schedule.step()
        return self

    def everything(self):
        """All that training changes, of this rank."""
        memory = self.criterion.memory
        encoder = self.encoder.module if world() else self.encoder
        bank = [memory.rows(torch.arange(len(LABELS))), memory.labels, memory.last_log_p, memory.order]
        return copy.deepcopy(
            {
                "bank": bank,
                "epoch": self.criterion.get_extra_state(),
                "encoder": list(encoder.state_dict().values()),
                "optimizers": [self.sgd.state_dict(), self.adam.state_dict()],
                "schedule": self.schedule.state_dict(),
            }
        )


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def changed(found, expected):
    try:
        assert_same(found, expected)
    except AssertionError:
        return True
    return False


def error_of(action, *arguments, **options):
    """The message of the CheckpointError that the action raises."""
    with pytest.raises(CheckpointError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def on_ranks(count, function, *arguments):
    """On so many ranks, or without a process group where that is 0."""
    return ranks.run(function, count, *arguments) if count else [function(*arguments)]


def save(folder, step=1):
    run = Run(seed=1).train(range(3))
    save_checkpoint(folder, run.state(), step)
    return run.everything()


def load(folder):
    run = Run(seed=2)
    return load_checkpoint(folder, run.state()), run.everything()


def in_small_parts(function, *arguments):
    checkpoint.PART, before = 2 * D * 4, checkpoint.PART
    try:
        return function(*arguments)
    finally:
        checkpoint.PART = before


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (1, 4), (2, 4), (4, 0), (0, 4), (0, 0)])
def test_any_number_of_ranks_loads_what_any_other_saved(before, after, tmp_path):
    saved = on_ranks(before, in_small_parts, save, tmp_path)
    loaded = on_ranks(after, in_small_parts, load, tmp_path)
    assert [step for step, _ in loaded] == [1] * max(after, 1)
    loaded = [everything for _, everything in loaded]
    for place in (1, 2, 3):  # labels, scores and order of each rank's images
        whole = [torch.cat([rank["bank"][place] for rank in of_ranks]) for of_ranks in (loaded, saved)]
        assert_same(*whole)
    for rank in loaded:
        assert_same(rank["bank"][0], saved[0]["bank"][0])
        assert rank["epoch"] == {"epoch": 2, "epoch_was_set": True}
        # What is replicated is rank 0's, also the statistics of batch normalisation, which differ by rank.
        for name in ("encoder", "optimizers", "schedule"):
            assert_same(rank[name], saved[0][name])


def save_bank(folder, file):
    generator = torch.Generator().manual_seed(1)
    path = f"{file}{own_rank()}"
    bank = MemoryBank(LABELS, D, generator=generator, process_group=world(), storage="disk", path=path)
    in_small_parts(save_checkpoint, folder, {"bank": bank}, 1)


def test_rows_on_disk_are_saved_and_loaded_as_any_other(tmp_path):
    on_ranks(2, save_bank, tmp_path / "checkpoints", tmp_path / "rows")
    expected = MemoryBank(LABELS, D, generator=torch.Generator().manual_seed(1)).storage
    for name, place in (("device", {}), ("host", {}), ("disk", {"path": tmp_path / "loaded"})):
        bank = MemoryBank(LABELS, D, storage=name, **place)
        assert load_checkpoint(tmp_path / "checkpoints", {"bank": bank}) == 1
        assert_same(bank.storage, expected)


def train_save_and_train_on(folder):
    run = Run(seed=1).train(range(3))
    save_checkpoint(folder, run.state(), 3)
    return run.train(range(3, 6)).everything()


def load_and_train_on(folder):
    run = Run(seed=2)
    assert load_checkpoint(folder, run.state()) == 3
    return run.train(range(3, 6)).everything()


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_that_is_loaded_continues_bit_for_bit(count, tmp_path):
    expected = on_ranks(count, train_save_and_train_on, tmp_path)
    assert_same(on_ranks(count, load_and_train_on, tmp_path), expected)
    assert changed(expected, on_ranks(count, save, tmp_path / "other"))  # training goes on at all


def test_parts_are_cut_where_tensors_are_large(tmp_path):
    in_small_parts(save, tmp_path)
    save(tmp_path / "whole")
    chunks, whole = (
        FileSystemReader(folder / "step-00000001")
        .read_metadata()
        .state_dict_metadata["criterion.memory.storage"]
        .chunks
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert [tuple(chunk.sizes) for chunk in chunks] == [(2, D)] * 4 + [(1, D)]
    assert [tuple(chunk.sizes) for chunk in whole] == [(9, D)]


def test_a_checkpoint_converts_to_a_file_of_torch_save(tmp_path):
    expected = save(tmp_path)
    dcp_to_torch_save(tmp_path / "step-00000001", tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt", weights_only=False)
    assert_same([value for key, value in found.items() if key.startswith("encoder.")], expected["encoder"])
    assert_same(found["sgd"], expected["optimizers"][0])


def test_wrappers_leave_no_trace_in_the_names(tmp_path):
    module, bare = nn.Linear(2, 2), nn.Linear(2, 2)
    save_checkpoint(tmp_path, {"encoder": torch.compile(module)}, 1)
    assert load_checkpoint(tmp_path, {"encoder": bare}) == 1
    assert_same(bare.weight, module.weight)


def test_less_than_was_saved_can_be_loaded(tmp_path):
    saved = save(tmp_path)
    run = Run(seed=2)
    before = run.everything()
    assert load_checkpoint(tmp_path, {"encoder": run.encoder}) == 1
    assert_same(run.everything(), before | {"encoder": saved["encoder"]})


def test_no_checkpoint_yet(tmp_path):
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    assert load_checkpoint(tmp_path / "nowhere", {"encoder": module}) is None
    for name in ("step-00000007.partial", "step-12", "epoch-00000007", "step-00000007b", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").touch()
    assert load_checkpoint(tmp_path, {"encoder": module}) is None
    assert_same(module.state_dict(), before)


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    module = nn.Linear(2, 2)
    strange = {"step-12", "epoch-00000007", "notes"}
    for name in strange:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002.partial").mkdir()  # of a run that was killed
    (tmp_path / "step-00000002.partial" / "__0_0.distcp").touch()
    for step in (3, 20, 100_000_000, 200_000_000):
        module.weight.data.fill_(step)
        save_checkpoint(tmp_path, {"encoder": module}, step)
    assert {path.name for path in tmp_path.iterdir()} == strange | {"step-100000000", "step-200000000"}
    save_checkpoint(tmp_path, {"encoder": module}, 200_000_001, keep=3)
    assert len(list(tmp_path.glob("step-*"))) == 4
    save_checkpoint(tmp_path, {"encoder": module}, 200_000_002, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == strange | {"step-200000002"}
    assert load_checkpoint(tmp_path, {"encoder": module}) == 200_000_002


def save_and_remove(folder):
    save(folder)
    if own_rank() == 0:  # which removes; others may come later
        (folder / "step-00000002.partial").mkdir()
    remove_checkpoints(folder)
    return load_checkpoint(folder, {"encoder": nn.Linear(2, 2)})


@pytest.mark.parametrize("count", [0, 2])
def test_the_checkpoints_of_a_finished_run_are_removed(count, tmp_path):
    (tmp_path / "notes").mkdir()
    assert set(on_ranks(count, save_and_remove, tmp_path)) == {None}
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    remove_checkpoints(tmp_path / "nowhere")


def test_a_step_comes_after_the_newest(tmp_path):
    module = nn.Linear(2, 2)
    save_checkpoint(tmp_path, {"encoder": module}, 5)
    for step in (5, 4):
        message = error_of(save_checkpoint, tmp_path, {"encoder": module}, step)
        assert f"step: expected more than 5, the newest checkpoint in the folder, got {step}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_bad_arguments(tmp_path):
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="step: expected an integer of at least 0, got -1"):
        save_checkpoint(tmp_path, {"encoder": module}, -1)
    with pytest.raises(ValueError, match="keep: expected an integer of at least 1, got 0"):
        save_checkpoint(tmp_path, {"encoder": module}, 1, keep=0)
    with pytest.raises(ValueError, match="state: expected names without a dot, got 'a.b'"):
        save_checkpoint(tmp_path, {"a.b": module}, 1)
    with pytest.raises(TypeError, match="state: expected a dict of names and what to save, got Linear"):
        save_checkpoint(tmp_path, nn.Linear(2, 1), 1)
    with pytest.raises(TypeError, match=r"state\['epoch'\]: expected something with state_dict .*, got int"):
        load_checkpoint(tmp_path, {"epoch": 3})
    assert not list(tmp_path.iterdir())


def save_with_others_arguments(folder, case):
    """The error of a call that is another one on rank 1."""
    state, step = {"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)}, 1
    if own_rank() == 1:
        state = {"state": {"encoder": state["encoder"]}, "bad": {"encoder": 3}}.get(case, state)
        step = 2 if case == "step" else step
    with pytest.raises((TypeError, ValueError)) as error:
        save_checkpoint(folder, state, step)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("step", "step: expected the same on all ranks, but rank 0 has 1, rank 1 has 2"),
        ("state", "state: expected the same on all ranks, but rank 0 has ['encoder', 'head'], rank 1 has ['encoder']"),
        ("bad", "state['encoder']: expected something with state_dict and load_state_dict, got int"),
    ],
)
def test_other_arguments_on_a_rank_are_told_on_every_rank(case, message, tmp_path):
    for rank, text in enumerate(ranks.run(save_with_others_arguments, 2, tmp_path, case, timeout=60)):
        assert text == ("rank 1: " if case == "bad" and rank == 0 else "") + message
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_renamed_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, Path.rename

    def note_sync(file):
        events.append(("sync", Path(f"/proc/self/fd/{file}").readlink().name))
        sync(file)

    def note_rename(path, new):
        events.append(("rename", new.name))
        return rename(path, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_sync)
        patch.setattr(Path, "rename", note_rename)
        save_checkpoint(tmp_path, {"encoder": nn.Linear(2, 2)}, 1)
    assert events == [
        ("sync", "__0_0.distcp"),
        ("sync", ".metadata.tmp"),
        ("rename", ".metadata"),
        ("sync", "step-00000001.partial"),
        ("rename", "step-00000001"),
        ("sync", tmp_path.name),
    ]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder, rank, moment):
    """A second checkpoint, in the middle of which a rank is killed."""
    run = Run(seed=3).train(range(4))
    if own_rank() == rank:
        action = getattr(FileSystemWriter, moment)

        def act_and_die(self, *arguments, **named):
            action(self, *arguments, **named)
            die()

        setattr(FileSystemWriter, moment, act_and_die)
    save_checkpoint(folder, run.state(), 2)


@pytest.mark.parametrize(("rank", "moment"), [(1, "prepare_local_plan"), (1, "write_data"), (0, "finish")])
def test_a_rank_that_is_killed_leaves_the_checkpoint_before(rank, moment, tmp_path):
    saved = on_ranks(2, save, tmp_path)
    outcomes = ranks.run_to_the_end(save_and_die, 2, tmp_path, rank, moment, timeout=30)
    assert "ended with -9" in outcomes[rank].how
    assert "still running" not in outcomes[1 - rank].how
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002.partial"}
    ((step, loaded),) = on_ranks(0, load, tmp_path)
    assert step == 1
    assert_same(loaded["bank"][0], saved[0]["bank"][0])
    save(tmp_path, step=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_one(tmp_path, monkeypatch):
    module = nn.Linear(2, 2)

    def half(folder):
        (folder / ".metadata").unlink()
        raise OSError("interrupted")

    save_checkpoint(tmp_path, {"encoder": module}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", half)
        message = error_of(lambda: save_checkpoint(tmp_path, {"encoder": module}, 2, keep=1))
    assert "step-00000002, but cannot remove an older one: OSError: interrupted" in message
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001.partial", "step-00000002"}
    save_checkpoint(tmp_path, {"encoder": module}, 3, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003"}


@contextmanager
def files_end_at(size):
    """A disk that is full for files larger than that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def save_on_a_full_disk(folder, full_rank):
    run = Run(seed=3).train(range(4))
    if own_rank() != full_rank:
        return error_of(save_checkpoint, folder, run.state(), 2)
    with files_end_at(1000):
        return error_of(save_checkpoint, folder, run.state(), 2)


@pytest.mark.parametrize("full_rank", [0, 2])
def test_a_full_disk_is_told_on_every_rank(full_rank, tmp_path):
    saved = on_ranks(4, save, tmp_path)
    messages = on_ranks(4, save_on_a_full_disk, tmp_path, full_rank)
    assert len(set(messages)) == 1
    assert messages[0] == (
        f"cannot save {tmp_path}/step-00000002: rank {full_rank}: OSError: [Errno 27] File too large"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    ((step, loaded),) = on_ranks(0, load, tmp_path)
    assert step == 1
    assert_same(loaded["bank"][0], saved[0]["bank"][0])


def test_the_reason_is_told_where_a_large_tensor_does_not_fit(tmp_path):
    with files_end_at(100_000):
        message = error_of(save_checkpoint, tmp_path, {"encoder": nn.Linear(500, 500)}, 1)
    assert message == f"cannot save {tmp_path}/step-00000001: OSError: [Errno 27] File too large"


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("no")
        self.lock = threading.Lock()


class FailsOnRankOne(nn.Module):
    def state_dict(self):
        if own_rank() == 1:
            raise Unpicklable
        return {}


def save_what_fails(folder):
    return error_of(save_checkpoint, folder, {"module": FailsOnRankOne()}, 1)


def test_an_error_that_cannot_be_sent_is_told_on_every_rank(tmp_path):
    messages = ranks.run(save_what_fails, 3, tmp_path, timeout=30)
    assert set(messages) == {f"cannot save {tmp_path}/step-00000001: rank 1: Unpicklable: no"}
    assert not list(tmp_path.iterdir())


def save_where_only_rank_0_sees(folder):
    if own_rank() == 1:
        folder = folder / "elsewhere"
    return error_of(save_checkpoint, folder, Run(seed=1).state(), 1)


def test_ranks_that_write_to_different_disks_are_told(tmp_path):
    first, second = on_ranks(2, save_where_only_rank_0_sees, tmp_path)
    assert f"{tmp_path}/step-00000001.partial/__1_0.distcp is missing; do all ranks see the same folder?" in first
    assert second.endswith(first.partition("rank 0")[2])
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def load_in_vain(folder):
    run = Run(seed=2).train(range(2))
    before = run.everything()
    message = error_of(load_checkpoint, folder, run.state())
    return message, changed(run.everything(), before)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_damaged_file_is_named_and_nothing_is_changed(damage, count, tmp_path):
    on_ranks(4, save, tmp_path)
    file = tmp_path / "step-00000001" / "__2_0.distcp"
    size = file.stat().st_size
    if damage == "missing":
        file.unlink()
        expected = f"{file} is missing"
    else:
        os.truncate(file, size - 1)
        expected = f"{file} is cut off: expected {size} bytes, found {size - 1}"
    for message, was_changed in on_ranks(count, load_in_vain, tmp_path):
        assert f"cannot load {tmp_path}/step-00000001; nothing was changed" in message
        assert expected in message
        assert not was_changed


def test_a_checkpoint_without_its_metadata_is_damaged(tmp_path):
    save(tmp_path)
    (tmp_path / "step-00000001" / ".metadata").unlink()
    ((message, was_changed),) = on_ranks(0, load_in_vain, tmp_path)
    assert "nothing was changed: FileNotFoundError" in message
    assert ".metadata" in message
    assert not was_changed


def one_label(image, label):
    labels = LABELS.clone()
    labels[image] = label
    return labels


def other_runs():
    """Runs that a checkpoint of Run(1) does not fit, and what is said of each."""
    labels = "first at image 7: 1 in the checkpoint, 0 here"
    yield Run(2, one_label(7, 0)), ["criterion.memory: labels differ at 1 of ", labels]
    storage = "criterion.memory.storage: the checkpoint holds shape (9, 6), expected shape (9, 7)"
    yield Run(2, dim=7), ["encoder.3.weight: the checkpoint holds shape (6, 8), expected shape (7, 8)", storage]
    yield Run(2, LABELS[:-1]), ["criterion.memory.labels: the checkpoint holds shape (9,), expected shape (8,)"]
    yield Run(2, width=5), ["encoder.0.weight: the checkpoint holds shape (8, 4), expected shape (5, 4)", "and 2 more"]
    run = Run(2)
    run.encoder = nn.Linear(4, D)
    yield run, ["encoder.weight is not in the checkpoint; ", "encoder.0.weight is in the checkpoint only; "]
    run = Run(2)
    run.adam = torch.optim.Adam(run.encoder.parameters())
    yield run, ["loaded state dict contains a parameter group that doesn't match the size"]


def load_into_others(folder):
    outcomes = []
    for run, expected in other_runs():
        memory = run.criterion.memory
        changing = [memory.storage, memory.labels, memory.order, *run.encoder.state_dict().values()]
        changing += [run.sgd.state_dict(), run.adam.state_dict(), run.schedule.state_dict()]
        before = copy.deepcopy(changing)
        message = error_of(load_checkpoint, folder, run.state())
        changing[-3:] = [run.sgd.state_dict(), run.adam.state_dict(), run.schedule.state_dict()]
        outcomes.append((message, expected, changed(changing, before)))
    return outcomes


def test_a_checkpoint_with_a_damaged_order_is_refused(tmp_path):
    saved, bank = MemoryBank(LABELS, D), MemoryBank(LABELS, D)
    saved.order.copy_(saved.order.flip(0))
    saved._seal()  # else it could not be saved
    save_checkpoint(tmp_path, {"bank": saved}, 1)
    before = copy.deepcopy(bank.state_dict())
    message = error_of(load_checkpoint, tmp_path, {"bank": bank})
    assert "bank: the checkpoint's row order is not the class order of its labels" in message
    assert_same(bank.state_dict(), before)


@pytest.mark.parametrize("count", [0, 3])
def test_a_checkpoint_of_something_else_is_refused_and_nothing_is_changed(count, tmp_path):
    on_ranks(2, save, tmp_path)
    for outcomes in zip(*on_ranks(count, load_into_others, tmp_path), strict=True):
        assert len({message for message, _, _ in outcomes}) == 1  # the same on every rank
        for message, expected, was_changed in outcomes:
            assert f"cannot load {tmp_path}/step-00000001; nothing was changed" in message
            assert all(part in message for part in expected), message
            assert not was_changed


def load_from_rank_0():
    """What PyTorch leaves on each rank of a state dict that it is to pass on, and whether the bank was changed."""
    criterion = NTDNELoss(LABELS, D, process_group=world())
    before = criterion.memory.storage.clone()
    whole = get_model_state_dict(criterion, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises(RuntimeError) as caught:
        set_model_state_dict(criterion, whole, options=options)
    return str(caught.value), torch.equal(criterion.memory.storage, before)


def test_a_state_dict_that_rank_0_alone_has_is_refused_on_all_ranks():
    for said, unchanged in ranks.run(load_from_rank_0, 2):
        assert "entries of the bank are on rank 0 and not on all ranks; broadcast_from_rank0 of PyTorch" in said
        assert unchanged


def save_on_two_of_three_ranks(folder):
    group = distributed.new_group([1, 2])
    if own_rank() == 0:
        return None
    bank = MemoryBank(LABELS, D, process_group=group)
    save_checkpoint(folder, {"bank": bank}, 1, process_group=DeviceMesh.from_group(group, "cpu"))
    return bank.rows(torch.arange(len(LABELS)))


def test_a_group_of_some_of_the_ranks_can_save(tmp_path):
    _, rows, _ = ranks.run(save_on_two_of_three_ranks, 3, tmp_path)
    bank = MemoryBank(LABELS, D)
    assert load_checkpoint(tmp_path, {"bank": bank}) == 1
    assert_same(bank.rows(torch.arange(len(LABELS))), rows)


def save_banks_of_other_ranks(folder):
    """Of a bank on each rank that both save, and one on both that a rank saves alone, after a whole checkpoint."""
    group = [distributed.new_group([0]), distributed.new_group([1])][own_rank()]
    shared, own = MemoryBank(LABELS, D, process_group=world()), MemoryBank(LABELS, D, process_group=group)
    save_checkpoint(folder, {"bank": shared}, 1, keep=1)
    together = error_of(save_checkpoint, folder, {"bank": own}, 2, keep=1)
    alone = error_of(save_checkpoint, folder, {"bank": shared}, 3, keep=1, no_dist=True) if own_rank() == 0 else ""
    apart = folder / str(own_rank())
    save_checkpoint(apart, {"bank": own}, 1, process_group=group)
    save_checkpoint(apart, {"bank": own}, 2, no_dist=True)
    loaded = load_checkpoint(folder, {"bank": shared}), load_checkpoint(apart, {"bank": own}, no_dist=True)
    return together, alone, *loaded


def test_a_bank_is_saved_by_the_ranks_that_share_it(tmp_path):
    """Else half of its rows would be lost, or be those of another bank, and the checkpoints before be removed."""
    for rank, (together, alone, whole, apart) in enumerate(ranks.run(save_banks_of_other_ranks, 2, tmp_path)):
        assert "bank: expected a bank shared by the ranks that save, [0, 1], got one of [0]" in together
        assert rank or "bank: expected a bank shared by the ranks that save, [0], got one of [0, 1]" in alone
        assert (whole, apart) == (1, 2)


def test_a_checkpoint_without_a_rank_s_part_is_refused(tmp_path, monkeypatch):
    bank = MemoryBank(LABELS, D)
    monkeypatch.setattr(checkpoint, "PART", 64)
    save_checkpoint(tmp_path, {"bank": bank}, 1)
    read = checkpoint.FileSystemReader.read_metadata

    def without_a_part(reader):
        metadata = read(reader)
        metadata.state_dict_metadata["bank.storage"].chunks.pop()
        return metadata

    monkeypatch.setattr(checkpoint.FileSystemReader, "read_metadata", without_a_part)
    with pytest.raises(CheckpointError, match="nothing was changed: ValueError: bank.storage: parts of it are missing"):
        load_checkpoint(tmp_path, {"bank": bank})


class ShardedOptimizer:
    def state_dict(self):
        part = DTensor.from_local(torch.ones(2), DeviceMesh.from_group(world(), "cpu"), [Shard(0)])
        return {"state": {0: {"momentum": part}}}

    def load_state_dict(self, state):
        raise NotImplementedError


def save_a_sharded_optimizer(folder):
    return error_of(save_checkpoint, folder, {"adam": ShardedOptimizer()}, 1)


def test_a_sharded_optimizer_is_refused(tmp_path):
    for message in ranks.run(save_a_sharded_optimizer, 2, tmp_path):
        assert "rank 0: TypeError: adam: expected a state that is the same on all ranks" in message
