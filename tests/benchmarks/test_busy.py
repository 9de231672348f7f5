"""Busy processes are busy from the first line of the block on, and have ended after it, however it ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import busy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's count of processor time")


def children(parent: int) -> list[int]:
    """The processes that a process has started and that still run."""
    found = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [int(path.name) for path in found if stat(int(path.name))[:2] == ["running", str(parent)]]


def stat(process: int) -> list[str]:
    """Whether it runs, its parent, processor time, niceness."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["gone"]
    return ["gone" if fields[0] in "ZX" else "running", fields[1], fields[11], fields[16]]


def wait_until(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_process_computes_all_the_time_as_an_ordinary_one():
    before = children(os.getpid())
    with busy.busy(2):
        started = [child for child in children(os.getpid()) if child not in before]
        assert len(started) == 2
        assert {stat(child)[3] for child in started} == {stat(os.getpid())[3]}
        for child in started:
            used = int(stat(child)[2])
            wait_until(lambda child=child, used=used: int(stat(child)[2]) > used + 5)
    assert {stat(child)[0] for child in started} == {"gone"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_processes(error):
    before = children(os.getpid())
    started = []

    def fails():
        with busy.busy(1):
            started.extend(child for child in children(os.getpid()) if child not in before)
            raise error

    with pytest.raises(error):
        fails()
    assert [stat(child)[0] for child in started] == ["gone"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_to_the_measurement_ends_the_processes(name):
    code = (
        "import signal, time; from benchmarks.busy import busy\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "with busy(1): print('here', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as measurement:
        assert measurement.stdout.readline() == b"here\n"
        (started,) = children(measurement.pid)
        measurement.send_signal(getattr(signal, name))
        assert measurement.wait(60) != 0
    wait_until(lambda: stat(started)[0] == "gone")


def test_a_process_that_cannot_begin_is_an_error(monkeypatch):
    monkeypatch.setattr(busy, "ROOT", ROOT / "tests")
    with pytest.raises(RuntimeError, match="ended before it was busy"), busy.busy(1):
        pass


def test_no_process_is_started_for_an_idle_case(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with busy.busy(0):
        pass
    assert busy.beside(0) == ""
    assert busy.beside(1) == ", beside 1 busy process"
