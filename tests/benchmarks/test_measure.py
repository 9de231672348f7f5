"""Calls take turns, every outcome is a row, and a measurement that was stopped goes on."""

import os
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import grid, machine, measure, memory, problems, rows, timing
from benchmarks.contract import NotSupported, Provider
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC, UPDATE, Case
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).parents[2]


# The clock, the memory, the grid


def test_calls_take_turns_until_each_had_its_time(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    called = []
    calls = {
        "slow": lambda: (called.append("slow"), time.sleep(0.05)),
        "quick": lambda: (called.append("quick"), time.sleep(0.005)),
    }
    found, failed = timing.in_turns(calls, "cpu", seconds=0.1, most=6)
    assert failed == {}
    assert len(found["slow"].wall) == timing.LEAST_CALLS
    assert len(found["quick"].wall) == 6
    assert sorted(called[:2]) == sorted(called[2:4]) == sorted(called[4:6]) == ["quick", "slow"]
    assert called[0] != called[2]  # nobody is always first
    assert min(found["slow"].wall) >= 0.05
    assert found["slow"].device == []


def test_a_call_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    fails = iter([0, 0]).__next__
    found, failed = timing.in_turns({"right": lambda: 0, "fails": fails}, "cpu", seconds=0.0)
    assert list(found) == ["right"]
    assert len(found["right"].wall) == timing.LEAST_CALLS
    assert isinstance(failed["fails"], StopIteration)
    assert timing.in_turns({}, "cpu", seconds=0.0) == ({}, {})


def test_quantiles():
    assert timing.quantiles([float(x) for x in range(11)]) == (2, 5, 8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's memory")
def test_added_memory_is_the_peak_of_a_call():
    def call():
        torch.ones(1 << 26)  # 256 MB, and gone
        return torch.ones(1 << 24)

    assert 250 << 20 < memory.added_by(call) < 262 << 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_grid_is_whole_and_begins_with_what_matters_most(device):
    cases = grid.cases(device)
    assert len(set(cases)) == len(cases)
    providers = [case for case in cases if case.what in (LOSS, GRADIENT)]
    dtypes = grid.ARITHMETIC[device]
    assert len(providers) == 2 * 5 * 5 * 4 * 3 * len(dtypes)
    assert {(case.D, case.dtype, case.C) for case in providers[:50]} <= {(128, "bfloat16", 45), (128, "bfloat16", 2)}
    first = len(dtypes) + 1
    assert {case.what for case in cases[:first]} == {PRODUCTS, TRAFFIC}
    if device == "cuda":
        assert cases[first:][: len(grid.targets())] == grid.targets()
    assert Case(UPDATE, 256, 10**8, 128, 45, "bfloat16") in cases


def test_axes_of_ones_own():
    cases = grid.cases("cpu", batches=[100, 6000], rows=[5000], widths=[96], arithmetic=["float32"], classes=[3, None])
    shapes = {case[1:6] for case in cases if case.what in (LOSS, GRADIENT)}
    assert shapes == {
        (100, 5000, 96, 3, "float32"),
        (100, 5000, 96, 2500, "float32"),
    }  # 6000 queries are no rows of 5000


def test_each_case_stands_beside_each_number_of_busy_processes_in_turn():
    cases = grid.cases(
        "cpu", batches=[64], rows=[5000], widths=[128], arithmetic=["bfloat16"], classes=[45], busy=[0, 2]
    )
    assert [case.busy for case in cases if case.what in (LOSS, GRADIENT)] == [0, 0, 2, 2]
    assert {case.busy for case in cases if case.what in (PRODUCTS, TRAFFIC)} == {0}


# Measuring


CASE = Case(GRADIENT, 4, 60, 8, 3, "float32")


def nothing(problem, gradient):
    return lambda: (torch.zeros(()), torch.zeros_like(problem.features))


def raises(error):
    def prepare(problem, gradient):
        raise error

    return Provider("loss", prepare)


@pytest.fixture
def few(monkeypatch):
    """Some providers, and a small cache to empty."""
    providers = {
        "naive": PROVIDERS["naive"],
        "streaming": PROVIDERS["streaming"],
        "chunked": raises(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
        "Liger": raises(NotSupported("needs a GPU")),
        "flex attention": raises(ZeroDivisionError("no\nway")),
        "SDPA flash": Provider("loss", nothing),
    }
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    monkeypatch.setitem(measure.PROVIDERS, GRADIENT, providers)
    return providers


def run(path, cases=(CASE,), chosen=measure.NAMES, minutes=10.0, longest=10.0, again=False):
    limits = measure.Limits(minutes, seconds=0.01, longest=longest)
    measure.measure(cases, chosen, "cpu", path, limits, again=again)
    return rows.read(path).set_index("provider")


def test_every_outcome_is_a_row(few, tmp_path, capsys):
    found = run(tmp_path / "results" / "here.csv")
    assert dict(found.outcome) == {
        "naive": "ok",
        "streaming": "ok",
        "chunked": "out of memory",
        "Liger": "not supported",
        "flex attention": "failed",
        "SDPA flash": "wrong",
    }
    assert found.error["SDPA flash"] == 1  # zeros
    assert found.why["SDPA flash"] == "error 1.0e+00"
    assert found.why["Liger"] == "needs a GPU"
    assert found.why["flex attention"] == "ZeroDivisionError: no way"
    ran = found.loc[["naive", "streaming"]]
    assert (ran.wall_20 <= ran.wall_50).all()
    assert (ran.wall_50 <= ran.wall_80).all()
    assert (ran.calls >= timing.LEAST_CALLS).all()
    assert (ran.error < 1e-6).all()
    assert (found[["B", "N", "D", "C"]] == [4, 60, 8, 3]).all(axis=None)
    assert set(found.torch) == {torch.__version__}
    assert found.measured.str.match(r"\d{4}-\d\d-\d\dT").all()
    assert re.search(r"ms of 2, 1 out of memory, 1 not supported, 1 failed, 1 wrong; \d s", capsys.readouterr().out)
    path = tmp_path / "results" / "here.csv"
    assert path.read_text().count("\n") == 7
    rows.write(rows.read(path), path)
    assert rows.read(path).set_index("provider").equals(found)


def test_a_stopped_measurement_goes_on_and_failures_are_not_run_again(few, tmp_path, monkeypatch, capsys):
    path = tmp_path / "here.csv"
    first = run(path)
    other = CASE._replace(B=5)
    both = run(path, (CASE, other))
    assert list(both.measured[both.B == 4]) == list(first.measured)
    assert len(both) == 2 * len(first)
    assert run(path, (CASE, CASE._replace(B=6)), minutes=0.0).equals(both)
    assert "0 minutes are over; the same command goes on with loss and gradient, B = 6" in capsys.readouterr().out

    few["flex attention"] = PROVIDERS["naive"]
    few["triton"] = PROVIDERS["streaming"]  # new: the case is measured as a whole, without what failed
    again = run(path, chosen=["triton"])
    of_case = again[again.B == 4]
    assert len(of_case) == 7
    assert of_case.outcome["flex attention"] == "failed"
    assert of_case.wall_50["streaming"] != first.wall_50["streaming"]
    assert of_case.outcome["triton"] == "ok"

    assert run(path).outcome["flex attention"].tolist() == ["failed"] * 2
    again = run(path, again=True)
    assert again.outcome[again.B == 4]["flex attention"] == "ok"
    assert again.outcome[again.B == 5]["flex attention"] == "failed"


def test_the_calls_alone_are_beside_busy_processes(few, tmp_path, monkeypatch):
    seen, here = [], []

    @contextmanager
    def busy(count):
        here.append(count)
        yield
        here.clear()

    def sees(problem, gradient):
        call = PROVIDERS["naive"].prepare(problem, gradient)
        return lambda: (seen.append([*here]), call())[1]

    few["naive"] = Provider("loss", sees)
    monkeypatch.setattr(measure, "busy", busy)
    run(tmp_path / "here.csv", (CASE._replace(busy=2),))
    assert seen[:2] == [[], []]  # the check, and the memory
    assert len(seen) >= 2 + timing.LEAST_CALLS
    assert all(count == [2] for count in seen[2:])


def test_a_case_beside_busy_processes_is_another_case(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "busy", lambda count: nullcontext())
    path, loaded = tmp_path / "here.csv", CASE._replace(busy=2)
    idle = run(path)
    both = run(path, (CASE, loaded))
    assert list(both.busy) == [0] * len(idle) + [2] * len(idle)
    assert both[both.busy == 0].equals(idle)
    assert "float32, beside 2 busy processes: " in capsys.readouterr().out
    again = run(path, (loaded,), again=True)
    assert again[again.busy == 0].equals(idle)
    assert list(again.busy) == list(both.busy)
    assert again.wall_50[again.busy == 2]["naive"] != both.wall_50[both.busy == 2]["naive"]


def test_how_long_a_call_takes_is_expected_from_cases_of_the_same_load(few, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "busy", lambda count: nullcontext())
    larger = CASE._replace(N=6000, busy=2)
    assert run(tmp_path / "here.csv", (CASE, larger), longest=1e-9).outcome["naive"].tolist() == ["ok", "ok"]


def test_a_fault_of_the_gpu_is_kept_and_left_out_of_the_next_run(few, tmp_path, monkeypatch, capsys):
    few["fault"] = few.pop("flex attention")
    few["after"] = PROVIDERS["naive"]
    seen = []

    def synchronize(device):
        seen.append(device)
        return len(seen) == 3  # chunked, Liger, then the fault

    monkeypatch.setattr(measure, "_is_broken", synchronize)
    monkeypatch.setattr(measure, "NAMES", [*measure.NAMES, "fault", "after"])
    few["SDPA flash"] = few.pop("SDPA flash")
    with pytest.raises(SystemExit, match=r"B = 4, .*: fault broke the GPU's context; start the command again"):
        run(tmp_path / "here.csv", chosen=[*few])
    found = rows.read(tmp_path / "here.csv")
    assert list(found.provider) == ["fault"]
    assert list(found.outcome) == ["failed"]
    found = run(tmp_path / "here.csv", chosen=[*few])
    assert dict(found.outcome)["after"] == "ok"
    assert len(found) == len(few)


def test_a_provider_that_fails_as_it_is_timed_is_a_row(few, tmp_path, monkeypatch):
    calls = []

    def fails_later(problem, gradient):
        right = PROVIDERS["naive"].prepare(problem, gradient)

        def call():
            calls.append(0)
            if len(calls) > 2:  # the check, and the memory
                raise MemoryError
            return right()

        return call

    few["naive"] = Provider("loss", fails_later)
    found = run(tmp_path / "here.csv")
    assert found.outcome["naive"] == "out of memory"
    assert found.outcome["streaming"] == "ok"


def test_a_file_of_another_machine_is_refused(few, tmp_path, monkeypatch):
    run(tmp_path / "here.csv")
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"here.csv: measured with torch '2.*', here it is '1.0'"):
        run(tmp_path / "here.csv")


def test_other_peers_beside_the_same_torch_are_no_other_machine(few, tmp_path, monkeypatch):
    here = machine.describe("cpu")
    run(tmp_path / "here.csv")
    for peers in ("Liger 1.0", "Liger 2.0"):
        monkeypatch.setattr(machine, "describe", lambda device, peers=peers: here | {"libraries": peers})
        run(tmp_path / "here.csv", again=True)
    found = run(tmp_path / "here.csv", (CASE._replace(B=5),))
    assert set(found.libraries[found.B == 5]) == {"Liger 2.0"}


def test_a_bank_that_does_not_fit_is_out_of_memory(few, tmp_path, monkeypatch):
    def too_large(*shape):
        raise MemoryError

    monkeypatch.setattr(problems, "make", too_large)
    found = run(tmp_path / "here.csv")
    assert set(found.outcome) == {"out of memory"}
    assert set(found.why) == {"the bank"}


def test_what_would_take_too_long_is_left_out(few, tmp_path):
    found = run(tmp_path / "here.csv", (CASE, CASE._replace(N=6000)), longest=1e-9)
    of_larger = found[found.N == 6000]
    assert of_larger.outcome["naive"] == "not run"
    assert re.fullmatch(r"some [\d.e-]+ s", of_larger.why["naive"])
    assert of_larger.outcome["Liger"] == "not supported"


def test_the_command_measures_and_reports(command, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(grid, "SIDE", {"cpu": 64})
    monkeypatch.setattr(grid, "TRAFFIC_ROWS", 100)
    path = str(tmp_path / "here.csv")
    shape = ["--B", "50", "--N", "1e3", "--D", "96", "--C", "N/2", "--dtype", "bfloat16", "--device", "cpu"]
    chosen = ["--provider", "naive", "chunked", "streaming", "--without", "chunked", "--what", LOSS, GRADIENT]
    status, _, errors = command("measure", *shape, *chosen, "--seconds", "0.01", "--file", path)
    assert status == 0, errors
    found = rows.read(Path(path))
    losses = found[found.what.isin([LOSS, GRADIENT])]
    assert list(losses.provider) == ["naive", "streaming"] * 2
    assert set(found.outcome) == {"ok"}

    status, printed, errors = command("table", "--file", path)
    assert status == 0, errors
    lines = [line for line in printed.splitlines() if line.startswith("| streaming | all | ")]
    assert len(lines) == 2
    assert all(re.search(r"\| \d+% \| [\d,]+ MB \| \d\.\de-\d\d \|$", line) for line in lines)
    status, printed, errors = command("plot", "--file", path, "--output", str(tmp_path / "figures"))
    assert status == 0, errors
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"here-time.png", "here-memory.png", "here-share.png"}

    # In a process of its own, as it is called.
    run = [sys.executable, "-m", "benchmarks", "targets", "--file", path]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0 of 46 hold")


def test_the_process_is_limited_to_what_is_free(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append((which, limit)))
    used = memory.status("VmSize")
    main.limit_memory()
    ((which, (soft, hard)),) = limits
    assert which == resource.RLIMIT_AS
    assert used < soft < used + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + (1 << 30)
    assert hard == resource.getrlimit(resource.RLIMIT_AS)[1]


def test_results_are_named_after_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda device: {"machine": "AMD EPYC 7B13 (64), 2 threads"})
    assert main.default_file("cpu") == ROOT / "benchmarks" / "results" / "amd-epyc-7b13-64.csv"


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "--file", "nowhere.csv"),
        ("measure", "--B", "many"),
        ("measure", "--N", "-3"),
        ("measure", "--dtype", "int8"),
        ("measure", "--busy", "-2"),
        ("draw",),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(command, arguments):
    status, _, errors = command(*arguments)
    assert status != 0
    assert arguments[-1] in errors.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_gpu_that_is_not_there_is_no_choice(command):
    status, _, errors = command("targets", "--device", "cuda")
    assert status == 2
    assert "--device: invalid choice: 'cuda'" in errors.splitlines()[-1]


@pytest.mark.gpu
def test_a_gpu_is_measured_by_both_clocks(tmp_path):
    cases = [Case(GRADIENT, 64, 10**4, 64, 9, "bfloat16"), Case(UPDATE, 64, 10**4, 64, 9, "bfloat16")]
    path = tmp_path / "gpu.csv"
    measure.measure(cases, measure.NAMES, "cuda", path, measure.Limits(minutes=10, seconds=0.1, longest=10))
    found = rows.read(path)
    assert "failed" not in set(found.outcome), found[["provider", "why"]].to_string()
    ran = found[found.outcome == "ok"]
    assert {"naive", "triton", "flex attention", "ours"} <= set(ran.provider)
    assert (ran.device_50 > 0).all()
