"""Where rows live: files that are taken up, refused or left as they were; what a killed process leaves."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels import storage
from ntdne_kernels.functional import update_bank_
from tests import formulas

CPU = torch.device("cpu")
FACTS = {"labels": "1f2e", "first": 0}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "bank.bin"


def on_disk(path: Path, N: int = 30, D: int = 8, dtype: torch.dtype = torch.float32, **facts) -> storage.Rows:
    return storage.allocate("disk", (N, D), dtype, CPU, path, FACTS | facts)


def filled(path: Path, **options) -> Tensor:
    """A copy of the rows of a file that is ready and closed again."""
    rows, fresh = on_disk(path, **options)
    assert fresh
    rows.copy_(nn.functional.normalize(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)), dim=1))
    storage.mark(path, ready=True)
    return rows.clone()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_file_are_updated_like_any_other_and_taken_up_again(path, dtype):
    before = filled(path, dtype=dtype)
    rows, fresh = on_disk(path, dtype=dtype)
    assert not fresh
    assert torch.equal(rows, before)
    features, index = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), torch.arange(0, 27, 3)
    expected = torch.tensor(formulas.update_bank(before, features, index, 0.5), dtype=torch.float64)
    update_bank_(rows, features, index, 0.5)
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=3 * torch.finfo(dtype).eps + 1e-7)
    written = rows.clone()
    del rows
    assert torch.equal(on_disk(path, dtype=dtype).rows, written)
    assert path.stat().st_size == 30 * 8 * dtype.itemsize


def test_a_file_has_its_place_on_the_disk_from_the_start(path):
    rows = on_disk(path, N=1000).rows
    assert path.stat().st_blocks * 512 >= rows.nbytes


@pytest.mark.parametrize("kind", ["device", "host"])
def test_memory_is_always_fresh(kind):
    with torch.device("meta"):  # a default device, as torch.set_default_device sets it
        rows, fresh = storage.allocate(kind, (30, 8), torch.bfloat16, CPU)
    assert fresh
    assert (rows.shape, rows.dtype, rows.device) == ((30, 8), torch.bfloat16, CPU)


@pytest.mark.gpu
def test_host_memory_for_a_gpu_is_pinned():
    assert storage.allocate("host", (30, 8), torch.float32, torch.device("cuda")).rows.is_pinned()


def test_a_rank_without_rows_has_a_file_too(path):
    assert on_disk(path, N=0).rows.shape == (0, 8)
    storage.mark(path, ready=True)
    rows, fresh = on_disk(path, N=0)
    assert (rows.shape, fresh) == ((0, 8), False)


def test_kind_and_path_must_agree(path):
    with pytest.raises(ValueError, match="storage: expected one of 'device', 'host', 'disk', got 'tape'"):
        storage.allocate("tape", (3, 2), torch.float32, CPU)
    with pytest.raises(ValueError, match="path: expected a file for storage='disk'.*got None"):
        storage.allocate("disk", (3, 2), torch.float32, CPU)
    with pytest.raises(ValueError, match="path: expected .* None otherwise, got .*bank.bin"):
        storage.allocate("host", (3, 2), torch.float32, CPU, path)
    assert not path.exists()


def test_a_fill_that_did_not_finish_is_started_again(path):
    on_disk(path).rows.fill_(1.0)
    rows, fresh = on_disk(path, N=50, labels="another")  # of another bank even: nothing was in it
    assert fresh
    assert rows.shape == (50, 8)
    assert not rows.any()


def test_rows_that_change_places_are_not_taken_up_before_they_are_ready_again(path):
    filled(path)
    storage.mark(path, ready=False)
    assert on_disk(path).fresh
    storage.mark(path, ready=True)
    assert not on_disk(path).fresh


def test_the_file_of_another_bank_is_refused_and_left_as_it_was(path, tmp_path):
    filled(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"path: .* shape \(file: \[30, 8\], here: \[31, 8\]\)"):
        on_disk(path, N=31)
    with pytest.raises(ValueError, match=r"dtype \(file: float32, here: bfloat16\), first \(file: 0, here: 7\)"):
        on_disk(path, dtype=torch.bfloat16, first=7)
    with pytest.raises(ValueError, match=r"rank \(file: None, here: 1\)"):
        on_disk(path, rank=1)
    with pytest.raises(ValueError, match=r"labels \(file: 1f2e, here: None\)"):
        storage.allocate("disk", (30, 8), torch.float32, CPU, path, {"first": 0})
    assert contents(tmp_path) == before


def test_a_file_that_is_no_bank_is_refused_and_left_as_it_was(path, tmp_path):
    path.write_text("a thesis")
    with pytest.raises(
        ValueError, match=r"path: expected a new file or a bank's, got .*bank.bin without bank.bin.json"
    ):
        on_disk(path)
    assert contents(tmp_path) == {"bank.bin": b"a thesis"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ready": 1}', "\udcff"])
def test_an_unreadable_description_is_named(path, tmp_path, text):
    filled(path)
    Path(f"{path}.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="path: expected .*bank.bin.json to describe a bank's file"):
        on_disk(path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", [0, 17, 2000])
def test_a_file_of_the_wrong_size_is_refused(path, size):
    filled(path)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=f"path: expected 960 bytes, as .*bank.bin.json says, got {size} in"):
        on_disk(path)


def test_a_file_that_is_gone_is_not_replaced_by_an_empty_one(path, tmp_path):
    filled(path)
    path.unlink()
    with pytest.raises(ValueError, match="expected 960 bytes.* got 0"):
        on_disk(path)
    assert list(contents(tmp_path)) == ["bank.bin.json"]


def test_a_path_that_cannot_be_a_file_is_an_error_of_its_kind(tmp_path):
    for wrong, error in ((tmp_path, IsADirectoryError), (tmp_path / "missing" / "bank.bin", FileNotFoundError)):
        with pytest.raises(error, match="path: expected a file to write to"):
            on_disk(wrong)
    assert contents(tmp_path) == {}


def test_a_file_that_may_not_be_written_is_an_error():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be read by its user alone
        Path(folder).chmod(0o755)
        path = Path(folder) / "bank.bin"
        filled(path)
        path.chmod(0o444)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="path: expected a file to write to"):
                on_disk(path)
        finally:
            os.seteuid(user)


def test_a_disk_without_place_is_an_error_that_leaves_nothing(path, tmp_path):
    with pytest.raises(OSError, match=r"path: expected place for 32\d+ bytes, \d+ are free: No space left") as raised:
        on_disk(path, N=10**15)
    assert raised.value.errno == errno.ENOSPC
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("started", [False, True])
def test_place_that_is_refused_later_is_an_error_that_leaves_nothing(path, tmp_path, started):
    """A quota, say: here the largest file that the process may write."""
    if started:
        on_disk(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="path: expected place for 32000 bytes.*File too large"):
            on_disk(path, N=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("step", ["flock", "_write_description", "replace", "posix_fallocate", "mmap", "flush"])
def test_a_kill_at_any_step_of_the_start_leaves_a_file_that_is_started_again(path, monkeypatch, step):
    child = os.fork()
    if child == 0:
        owner = {"flock": storage.fcntl, "replace": Path, "posix_fallocate": os, "mmap": storage.mmap}.get(
            step, storage
        )
        monkeypatch.setattr(owner, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        on_disk(path).rows.zero_()
        storage.mark(path, ready=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert on_disk(path).fresh
    storage.mark(path, ready=True)
    assert not on_disk(path).fresh


def test_rows_may_be_made_beside_the_file_and_take_its_place(path, tmp_path):
    before, beside = filled(path), tmp_path / "beside"
    rows = on_disk(beside, labels="new").rows.copy_(before.flip(0))
    storage.take_place(beside, path)
    assert sorted(contents(tmp_path)) == ["bank.bin", "bank.bin.json"]
    with pytest.raises(BlockingIOError):
        on_disk(path, labels="new")
    rows[0] = 1.0
    del rows
    rows, fresh = on_disk(path, labels="new")
    assert not fresh
    assert rows[0].tolist() == [1.0] * 8
    assert torch.equal(rows[1:], before.flip(0)[1:])


@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_a_kill_while_rows_are_replaced_leaves_none_taken_for_others(path, tmp_path, monkeypatch, rename):
    before, beside = filled(path), tmp_path / "beside"
    child = os.fork()
    if child == 0:
        on_disk(beside, labels="new").rows.copy_(before.flip(0))
        replace, done = Path.replace, []

        def replace_or_die(file: Path, target: Path) -> None:
            done.append(target)
            if len(done) == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(file, target)

        monkeypatch.setattr(Path, "replace", replace_or_die)
        storage.take_place(beside, path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if rename == 1:  # of the old file's description, which is to say that it is not ready
        assert torch.equal(on_disk(path).rows, before)
    else:
        assert on_disk(path, labels="new").fresh
    assert on_disk(beside, labels="newer").fresh


def test_one_bank_at_a_time_has_the_file_open(path):
    before = filled(path)
    rows = on_disk(path).rows
    part = rows[3:5]
    del rows
    with pytest.raises(
        BlockingIOError, match="path: expected a file for this bank alone, but another bank has it open"
    ):
        on_disk(path)
    other = f"from tests.test_storage import *; storage.LOCK_SECONDS = 0.0; on_disk(Path({str(path)!r}))"
    result = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in result.stderr
    del part
    assert torch.equal(on_disk(path).rows, before)


def test_a_file_still_open_in_a_worker_of_a_killed_process_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_SECONDS", 30.0)
    filled(path)
    rows = on_disk(path).rows
    worker = os.fork()
    if worker == 0:
        time.sleep(0.5)
        os._exit(0)
    del rows
    started = time.monotonic()
    assert not on_disk(path).fresh
    assert 0.2 < time.monotonic() - started < 20
    os.waitpid(worker, 0)


def keep_updating(path: str) -> None:
    """What the killed process does; says so when it has begun."""
    rows = on_disk(Path(path), N=2000, D=64, dtype=torch.bfloat16).rows
    source = torch.Generator().manual_seed(1)
    for step in range(10**9):
        features, index = torch.randn(256, 64, generator=source), torch.randint(0, 2000, (256,), generator=source)
        update_bank_(rows, features, index, 0.5)
        if step == 20:
            print("updating", flush=True)


def test_a_kill_in_the_middle_of_updates_leaves_every_row_of_unit_norm(path):
    before = filled(path, N=2000, D=64, dtype=torch.bfloat16)
    command = f"import tests.test_storage as t; t.keep_updating({str(path)!r})"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    rows, fresh = on_disk(path, N=2000, D=64, dtype=torch.bfloat16)
    assert not fresh
    assert (rows != before).any(dim=1).sum() > 1000
    assert ((rows.float().norm(dim=1) - 1).abs() < 0.01).sum() >= 1999  # one may be half of the old and half of the new
    assert rows.isfinite().all()


def test_the_description_is_plain_json(path):
    filled(path)
    assert json.loads(Path(f"{path}.json").read_text()) == {
        "format": 1,
        "shape": [30, 8],
        "dtype": "float32",
        "labels": "1f2e",
        "first": 0,
        "ready": True,
    }
