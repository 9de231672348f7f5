"""What the host does for a step is measured where no GPU is: launches are counted and named, packages take turns, and a
step that fails is a row beside the others. The stages of gpu.sh go on where one fails, and run first what is new.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import host, null_gpu

ROOT = Path(__file__).parents[2]
without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.version.cuda is None or shutil.which("cc") is None,
    reason="of machines with PyTorch for CUDA and a C compiler, and no GPU",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of eager steps, measured in turns with themselves."""
    path = tmp_path_factory.mktemp("host") / "results" / "host.csv"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            host, "STEPS", {host.GRADIENT: ("ours", "naive", "empty op", "wrong"), host.MODULE: ("ours", "naive")}
        )
        patched.setattr(host, "version", lambda checkout: f"version {len(seen)}")
        patched.setattr(host, "CALLS", 5)
        seen: list[int] = []
        start = host.Package.__init__

        def named(self, checkout):
            seen.append(1)
            start(self, checkout)

        patched.setattr(host.Package, "__init__", named)
        host.measure([8], [500], ROOT, 10, path)
    return pd.read_csv(path, keep_default_na=False, na_values={"launches": [""], "queued_50": [""], "replay_50": [""]})


@without_a_gpu
def test_each_step_of_each_package_is_a_row(rows):
    found = rows.set_index(["what", "provider", "package"])
    assert list(found.index) == [
        (host.GRADIENT, "ours", "version 1"),
        (host.GRADIENT, "ours", "version 2"),
        (host.GRADIENT, "naive", "version 1"),
        (host.GRADIENT, "empty op", "version 1"),
        (host.GRADIENT, "wrong", "version 1"),
        (host.MODULE, "ours", "version 1"),
        (host.MODULE, "ours", "version 2"),
        (host.MODULE, "naive", "version 1"),
    ]
    assert set(rows.machine[rows.why == ""]) == {"no GPU"}
    assert rows.replay_50.isna().all()


@without_a_gpu
def test_a_step_is_queued_before_it_is_done(rows):
    ran = rows[rows.why == ""]
    assert (ran.queued_50 > 10e-6).all()
    assert (ran.queued_50.astype(float) < ran.done_50.astype(float)).all()
    assert (ran.queued_20.astype(float) <= ran.queued_50).all()


@without_a_gpu
def test_launches_and_operators_are_counted(rows):
    launches = rows.set_index(["what", "provider", "package"]).launches
    assert launches[host.GRADIENT, "ours", "version 1"] == launches[host.GRADIENT, "ours", "version 2"]
    assert 3 <= launches[host.GRADIENT, "ours", "version 1"] < launches[host.GRADIENT, "naive", "version 1"]
    assert (rows.operators[rows.why == ""].astype(float) > 3).all()


@without_a_gpu
def test_a_step_that_fails_is_a_row_and_the_next_ones_run(rows):
    failed = rows[rows.why != ""]
    assert list(failed.provider) == ["wrong"]
    assert failed.why.str.startswith("ValueError: wrong").all()


@without_a_gpu
def test_kernels_are_named_and_copies_are_made():
    code = """
import os
import torch
from benchmarks import null_gpu
assert null_gpu.is_here()
x = torch.arange(5.0)
there = x.cuda()
before = null_gpu.launches()
names = null_gpu.kernels_of(lambda: there.add(1).sum())
assert null_gpu.launches() == before + 2
assert len(names) == 2 and "add" in names[0].lower() and "reduce" in names[1], names
assert (there + 1).cpu().eq(0).all()  # of no kernel
assert there.cpu().equal(x)
y = torch.ones(3, device="cuda", requires_grad=True)
torch.autograd.grad((y * y).sum(), y)
os._exit(0)  # autograd's thread may still hold Python objects, and ends the process where the interpreter is gone
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | null_gpu.environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@without_a_gpu
def test_a_graph_launches_what_was_captured_and_a_capture_forbids_waiting():
    code = """
import os
import torch
from benchmarks import null_gpu
x = torch.ones(5).cuda()
side = torch.cuda.Stream()
graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
def capture():
    with torch.cuda.graph(graph, stream=side):
        assert torch.cuda.is_current_stream_capturing()
        x.add(1).sum()
seen = null_gpu.kernels_of(capture)
assert not any("reduce" in name for name in seen), seen
names = null_gpu.kernels_of(graph.replay)
assert len(names) == 2 and "add" in names[0].lower() and "reduce" in names[1], names
assert null_gpu.kernels_of(lambda: x.add(1).sum()) == names
for wait in (x.cpu, torch.cuda.synchronize, side.query, lambda: torch.empty(9, pin_memory=True)):
    try:
        with torch.cuda.graph(other, stream=side):
            wait()
    except RuntimeError as error:
        pass
    else:
        raise AssertionError(wait)
    assert not torch.cuda.is_current_stream_capturing()
with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
    torch.empty(1 << 26, device="cuda").zero_()  # PyTorch's pool may take memory
os._exit(0)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | null_gpu.environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@without_a_gpu
def test_a_process_that_ends_or_is_silent_is_begun_anew(monkeypatch):
    with host.Package(ROOT) as package:
        assert package.ask(calls=1).keys() == {"queued", "done"}
        package.process.kill()
        assert package.ask(calls=1) == {"why": "its process ended"}
        monkeypatch.setattr(host, "LONGEST", 0)
        assert package.ask(calls=1) == {"why": "no answer in 0 s"}
        monkeypatch.undo()
        assert len(package.ask(calls=2)["queued"]) == 2


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"null_gpu\.c: needs cc"):
        null_gpu.environment()
    with pytest.raises(RuntimeError, match=r"update_bank_cuda\.cu: needs nvcc"):
        null_gpu.update_kernel(ROOT)


def test_aims_hold_and_do_not(capsys):
    def row(what, provider, queued, launches=math.nan, replay=math.nan):
        times = {"queued_50": 1e-6 * queued, "done_50": 1e-6 * (queued + 50), "replay_50": 1e-6 * replay}
        return (
            {"what": what, "B": 256, "N": 10**4, "provider": provider, "package": "a"} | times | {"launches": launches}
        )

    found = [row(host.GRADIENT, "ours", 150, replay=31), row(host.GRADIENT, "ours, compiled", 300)]
    found += [row(host.GRADIENT, "naive", 450), row(host.MODULE, "ours", 301, 10), row(host.MODULE, "naive", 300)]
    found += [row(host.GRADIENT, "empty op", 30), row(host.GRADIENT, "empty op, compiled", 190)]
    found += [row(host.ENCODER, "ours", 500), row(host.ENCODER, "ours, compiled", 400)]
    host.print_aims(pd.DataFrame(found, columns=host.COLUMNS))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(cells[0], *cells[4:]) for cells in lines] == [
        (f"{host.GRADIENT}: queued at most 200", "150 µs", "yes"),
        (f"{host.GRADIENT}: time over naive's at most 1", "0.4 ×", "yes"),
        (f"{host.GRADIENT}: graph's replay at most 30", "31 µs", "**no**"),
        (f"{host.GRADIENT}: compiled over eager at most 1", "2 ×", "**no**"),
        (f"{host.GRADIENT}: compiling adds, as to an empty op, at most 160", "150 µs", "yes"),
        (f"{host.MODULE}: queued at most 300", "301 µs", "**no**"),
        (f"{host.MODULE}: time over naive's at most 1", "1 ×", "**no**"),
        (f"{host.MODULE}: launches at most 10", "10 launches", "yes"),
        (f"{host.ENCODER}: compiled over eager at most 1", "0.8 ×", "yes"),
    ]


# gpu.sh, on a machine that pretends


@pytest.fixture
def stage(tmp_path):
    """Runs stages with commands that write down how they were called, and fail where told."""
    commands, calls = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()
    for name in ("python3", "nvidia-smi", "compute-sanitizer"):
        script = commands / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\ncase "$*" in *$FAILS*) exit 3 ;; esac\n')
        script.chmod(0o755)

    def run(*stages: str, fails: str = "nothing") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            [ROOT / "benchmarks" / "gpu.sh", *stages],
            env=environment | {"FAILS": fails, "TORCH_CUDA_ARCH_LIST": "9.0"},
            capture_output=True,
            text=True,
        )
        return done, calls.read_text().splitlines()

    run.out = tmp_path / "out"  # type: ignore[attr-defined]
    return run


def test_check_builds_and_tests_the_kernels_first(stage):
    done, calls = stage("check")
    assert done.stdout.splitlines()[-1] == "== check ended with 0"
    (pip,) = (place for place, call in enumerate(calls) if "pip install" in call)
    (tests,) = (place for place, call in enumerate(calls) if "-m pytest" in call)
    assert pip < tests
    files = [word for word in calls[tests].split() if word.startswith("tests/")]
    first = [file for file in files if "test_hopper" in file or "test_triton" in file]
    assert "tests/ops/test_triton.py" in first
    assert files[: len(first)] == first
    folders = ("tests", "tests/ops", "tests/benchmarks")
    known = {str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).glob("test_*.py")}
    assert set(files) == known - {"tests/benchmarks/test_audit.py", "tests/test_examples.py"}
    assert len(files) == len(set(files))
    assert "-n 14" in calls[tests]


def test_what_cannot_be_built_is_not_tested(stage):
    done, calls = stage("check", fails="pip")
    assert done.stdout.splitlines()[-1] == "== check ended with 3"
    assert not any("pytest" in call for call in calls)


def test_a_stage_that_fails_does_not_stop_the_next(stage):
    done, calls = stage("targets", "tune", fails="benchmarks")
    assert [line for line in done.stdout.splitlines() if line.startswith("==")] == [
        "== targets ended with 3",
        "== tune ended with 3",
    ]
    assert sum("measure --device cuda" in call for call in calls) == 3  # what broke the GPU is left out of the next try
    assert any("-m benchmarks host" in call for call in calls)
    assert sum("benchmarks.tune time" in call for call in calls) == 3
    assert (stage.out / "tune.log").exists()


def test_each_sanitizer_looks_at_small_tests(stage):
    _, calls = stage("sanitize")
    tools = [call for call in calls if call.startswith("compute-sanitizer")]
    assert [call.split()[2] for call in tools] == ["memcheck", "racecheck"]
    assert all("not (two_to_the_31" in call and "tests/ops/test_triton.py" in call for call in tools)
