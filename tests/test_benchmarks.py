"""The benchmarks measure what they say: every provider computes its part of the loss, wrong numbers are seen, every
outcome stands in the table, and a measurement that was stopped goes on.
"""

import math
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from triton.runtime.errors import OutOfResources

from benchmarks import checks, grid, measure, memory, problems, providers, report, steps, timing, tune
from benchmarks.__main__ import default_file
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC, UPDATE, Case
from benchmarks.providers import PROVIDERS, NotSupported, Provider
from ntdne_kernels.ops.gpu.configs import Config, Device

ROOT = Path(__file__).parent.parent
# What the arithmetic of the bank leaves; "naive in 16 bits" has a softmax and sums of 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


def made(dtype: str, B: int = 48, N: int = 1000, D: int = 24, C: int = 7) -> problems.Problem:
    return problems.make(B, N, D, C, providers.DTYPES[dtype])


def cross_entropy(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(features @ weight.t(), target)


# Providers


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize("name", [name for name in PROVIDERS if "compiled" not in name])
def test_every_provider_computes_its_part(name, gradient, dtype):
    problem = made(dtype)
    try:
        call = PROVIDERS[name].prepare(problem, gradient)
    except NotSupported as reason:
        pytest.skip(str(reason))
    error = checks.error(PROVIDERS[name].result, call(), problem)
    assert error is not None
    assert error < TOLERANCE[dtype]


def test_the_compiled_loss_is_the_loss():
    problem = made("float32")
    call = PROVIDERS["naive, compiled"].prepare(problem, True)
    assert checks.error("loss", call(), problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize(("B", "N", "C"), [(48, 1000, 7), (300, 3000, 2), (5, 1300, 650), (30, 60, 30)])
def test_flex_attention_gives_the_loss(B, N, C, gradient, dtype):
    """Not compiled, which for a CPU it cannot be."""
    problem = made(dtype, B, N, 16, C)
    call = providers.flex(problem, gradient, flex_attention)
    assert checks.error("loss", call(), problem) < TOLERANCE[dtype]


@pytest.mark.parametrize(("B", "N", "C"), [(300, 20_000, 9), (200, 20_000, 2), (20, 12_000, 500)])
def test_flex_attention_leaves_out_blocks_that_hold_nothing(B, N, C):
    """What is not compiled looks at all of them."""
    problem = made("float32", B, N, 64, C)
    looked_at = []

    def attention(queries, keys, values, *, block_mask, **rest):
        _, heads, length, _ = keys.shape
        rows = 128 * math.ceil(length / 128)
        allowed = torch.zeros(heads, 128 * math.ceil(B / 128), rows, dtype=torch.bool)
        places = torch.meshgrid(torch.arange(heads), torch.arange(B), torch.arange(length), indexing="ij")
        allowed[:, :B, :length] = block_mask.mask_mod(0, *places)
        allowed = allowed.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))  # (H, blocks, 128, blocks, 128)
        listed = block_mask.to_dense()[0].bool()
        assert not (allowed.any(dim=4).any(dim=2) & ~listed).any()
        if block_mask.full_kv_num_blocks is not None:
            padded = torch.zeros_like(allowed.flatten(3).flatten(1, 2))
            padded[:, :B, :length] = True
            whole = (allowed | ~padded.view_as(allowed)).all(dim=4).all(dim=2)
            places = torch.arange(listed.size(2)).expand_as(listed)
            taken = places < block_mask.full_kv_num_blocks[0].unsqueeze(2)
            full = torch.zeros_like(listed).scatter(2, block_mask.full_kv_indices[0].long(), taken)
            assert not (full & ~whole).any()
        looked_at.append(float(listed.float().mean()))
        return flex_attention(queries, keys, values, block_mask=block_mask, **rest)

    error = checks.error("loss", providers.flex(problem, True, attention)(), problem)
    assert error < 2 * checks.error("loss", PROVIDERS["naive"].prepare(problem, True)(), problem) + 1e-6
    assert looked_at[0] == 1
    assert looked_at[1] < 1


@pytest.mark.parametrize("name", ["naive", "chunked", "streaming", "flex attention"])
def test_a_query_without_others_of_its_class_has_no_gradient(name):
    problem = made("float32", B=30, N=60, C=30)
    alone = (problem.labels.unsqueeze(1) == problem.bank_labels).sum(dim=1) == 1
    assert 0 < alone[: checks.QUERIES].sum() < checks.QUERIES
    prepare = PROVIDERS[name].prepare if name != "flex attention" else partial(providers.flex, attention=flex_attention)
    outputs = prepare(problem, True)()
    assert (outputs[1][alone] == 0).all()
    assert checks.error("loss", outputs, problem) < TOLERANCE["float32"]
    assert checks.error("loss", outputs[:1], problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("heads", range(1, 5))
def test_heads_divide_the_rows_and_come_near_what_is_wanted(heads):
    device = torch.device("cpu")
    found = providers._heads(1, 10**6, device, rounds=heads)
    assert 10**6 % found == 0
    assert found <= 2 * heads * torch.get_num_threads()
    assert providers._heads(1, 10**6, device, heads, least=1000) >= 1000
    assert providers._heads(1, 997, device, heads, most=1) == 1


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
def test_a_cross_entropy_whose_last_layer_is_the_bank_gives_the_log_sum(gradient):
    """As those of language models do, which need a GPU."""
    problem = made("float32")
    call = providers.log_sum(cross_entropy, problem, gradient)
    assert checks.error("log sum", call(), problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", steps.UPDATES)
def test_updates_are_equation_15(name, dtype):
    problem = made(dtype)
    before = problem.bank[problem.index]
    steps.UPDATES[name].prepare(problem, False)()
    assert checks.updated(before, problem.bank[problem.index], problem.features.detach()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", steps.TRAINING)
def test_training_steps_train(name):
    losses = training_losses(name)
    assert losses[-1] < 0.9 * losses[0]
    if name == "ours":  # the same encoder, and from the second step on the same rows updated
        assert losses[:3] == pytest.approx(training_losses("naive")[:3], rel=1e-3)


def training_losses(name: str) -> list[float]:
    made("bfloat16")  # the next bank is a new one, which training changes
    call = steps.TRAINING[name].prepare(made("float32", 8, 40, 8, 3), False)
    return [float(call()[0]) for _ in range(6)]


@pytest.mark.parametrize("result", ["loss", "mean", "log sum", "product"])
def test_wrong_numbers_are_seen(result):
    problem = made("float32")
    right = {
        "loss": PROVIDERS["naive"].prepare,
        "mean": PROVIDERS["SDPA flash"].prepare,
        "log sum": partial(providers.log_sum, cross_entropy),
        "product": PROVIDERS["product alone"].prepare,
    }
    for gradient in (True, False) if result in ("loss", "log sum") else (True,):
        outputs = list(right[result](problem, gradient)())
        compared = 0 if result == "product" else -1
        outputs[compared] = 1.01 * outputs[compared]
        assert checks.error(result, tuple(outputs), problem) == pytest.approx(0.01, rel=1e-2)
        outputs[compared] = outputs[compared] * torch.nan
        assert checks.error(result, tuple(outputs), problem) == math.inf


def test_of_folded_means_the_last_are_looked_at():
    problem = made("float32", N=999)
    bank = problem.bank.view(3, 333, -1)
    means = torch.softmax(problem.features.detach() @ bank.transpose(1, 2) / problems.SIGMA, dim=2) @ bank
    assert checks.error("mean", (means,), problem) < TOLERANCE["float32"]
    means[-1, 0, 0] += 0.1
    assert checks.error("mean", (means,), problem) > 1e-2


def test_queries_differ_and_the_archive_is_made_once():
    problem = made("float32")
    assert len(problem.index.unique()) == 48
    assert torch.equal(problem.labels, problem.bank_labels[problem.index])
    assert made("float32", B=5).bank is problem.bank
    assert made("bfloat16").bank is not problem.bank


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
    of_loss = [case for case in cases if case.what in (LOSS, GRADIENT)]
    dtypes = grid.ARITHMETIC[device]
    assert len(of_loss) == 2 * 5 * 5 * 4 * 3 * len(dtypes)
    assert {(case.D, case.dtype, case.C) for case in of_loss[:50]} <= {(128, "bfloat16", 45), (128, "bfloat16", 2)}
    first = len(dtypes) + 1
    assert {case.what for case in cases[:first]} == {PRODUCTS, TRAFFIC}
    if device == "cuda":
        assert cases[first:][: len(grid.targets())] == grid.targets()
    assert Case(UPDATE, 256, 10**8, 128, 45, "bfloat16") in cases


def test_axes_of_ones_own():
    cases = grid.cases("cpu", batches=[100, 6000], rows=[5000], widths=[96], arithmetic=["float32"], classes=[3, None])
    shapes = {case[1:] for case in cases if case.what in (LOSS, GRADIENT)}
    assert shapes == {
        (100, 5000, 96, 3, "float32"),
        (100, 5000, 96, 2500, "float32"),
    }  # 6000 queries are no rows of 5000


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
    of_loss = {
        "naive": PROVIDERS["naive"],
        "streaming": PROVIDERS["streaming"],
        "chunked": raises(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
        "Liger": raises(NotSupported("needs a GPU")),
        "flex attention": raises(ZeroDivisionError("no\nway")),
        "SDPA flash": Provider("loss", nothing),
    }
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    monkeypatch.setitem(measure.PROVIDERS, GRADIENT, of_loss)
    return of_loss


def run(path, cases=(CASE,), chosen=measure.NAMES, minutes=10.0, longest=10.0, again=False):
    measure.measure(cases, chosen, "cpu", path, minutes=minutes, seconds=0.01, longest=longest, again=again)
    return measure.read(path).set_index("provider")


def test_every_outcome_is_a_row(few, tmp_path, capsys):
    rows = run(tmp_path / "results" / "here.csv")
    assert dict(rows.outcome) == {
        "naive": "ok",
        "streaming": "ok",
        "chunked": "out of memory",
        "Liger": "not supported",
        "flex attention": "failed",
        "SDPA flash": "wrong",
    }
    assert rows.error["SDPA flash"] == 1  # zeros
    assert rows.why["SDPA flash"] == "error 1.0e+00"
    assert rows.why["Liger"] == "needs a GPU"
    assert rows.why["flex attention"] == "ZeroDivisionError: no way"
    ran = rows.loc[["naive", "streaming"]]
    assert (ran.wall_20 <= ran.wall_50).all()
    assert (ran.wall_50 <= ran.wall_80).all()
    assert (ran.calls >= timing.LEAST_CALLS).all()
    assert (ran.error < 1e-6).all()
    assert (rows[["B", "N", "D", "C"]] == [4, 60, 8, 3]).all(axis=None)
    assert set(rows.torch) == {torch.__version__}
    assert rows.measured.str.match(r"\d{4}-\d\d-\d\dT").all()
    assert re.search(r"ms of 2, 1 out of memory, 1 not supported, 1 failed, 1 wrong; \d s", capsys.readouterr().out)
    path = tmp_path / "results" / "here.csv"
    assert path.read_text().count("\n") == 7
    measure.write(measure.read(path), path)
    assert measure.read(path).set_index("provider").equals(rows)


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
    rows = measure.read(tmp_path / "here.csv")
    assert list(rows.provider) == ["fault"]
    assert list(rows.outcome) == ["failed"]
    rows = run(tmp_path / "here.csv", chosen=[*few])
    assert dict(rows.outcome)["after"] == "ok"
    assert len(rows) == len(few)


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
    rows = run(tmp_path / "here.csv")
    assert rows.outcome["naive"] == "out of memory"
    assert rows.outcome["streaming"] == "ok"


def test_a_file_of_another_machine_is_refused(few, tmp_path, monkeypatch):
    run(tmp_path / "here.csv")
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"here.csv: measured with torch '2.*', here it is '1.0'"):
        run(tmp_path / "here.csv")


def test_other_peers_beside_the_same_torch_are_no_other_machine(few, tmp_path, monkeypatch):
    here = measure.machine("cpu")
    run(tmp_path / "here.csv")
    for peers in ("Liger 1.0", "Liger 2.0"):
        monkeypatch.setattr(measure, "machine", lambda device, peers=peers: here | {"libraries": peers})
        run(tmp_path / "here.csv", again=True)
    rows = run(tmp_path / "here.csv", (CASE._replace(B=5),))
    assert set(rows.libraries[rows.B == 5]) == {"Liger 2.0"}


def test_a_bank_that_does_not_fit_is_out_of_memory(few, tmp_path, monkeypatch):
    def too_large(*shape):
        raise MemoryError

    monkeypatch.setattr(problems, "make", too_large)
    rows = run(tmp_path / "here.csv")
    assert set(rows.outcome) == {"out of memory"}
    assert set(rows.why) == {"the bank"}


def test_what_would_take_too_long_is_left_out(few, tmp_path):
    rows = run(tmp_path / "here.csv", (CASE, CASE._replace(N=6000)), longest=1e-9)
    of_larger = rows[rows.N == 6000]
    assert of_larger.outcome["naive"] == "not run"
    assert re.fullmatch(r"some [\d.e-]+ s", of_larger.why["naive"])
    assert of_larger.outcome["Liger"] == "not supported"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_measures_and_reports(tmp_path):
    path = str(tmp_path / "here.csv")
    shape = ["--B", "50", "--N", "1e3", "--D", "96", "--C", "N/2", "--dtype", "bfloat16"]
    chosen = [
        "--provider",
        "naive",
        "chunked",
        "streaming",
        "--without",
        "chunked",
        "--what",
        LOSS,
        GRADIENT,
        "--seconds",
        "0.01",
        "--device",
        "cpu",
    ]
    result = command("measure", *shape, *chosen, "--file", path)
    assert result.returncode == 0, result.stderr
    rows = measure.read(Path(path))
    of_loss = rows[rows.what.isin([LOSS, GRADIENT])]
    assert list(of_loss.provider) == ["naive", "streaming"] * 2
    assert set(rows.outcome) == {"ok"}

    result = command("table", "--file", path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| streaming | all | ")]
    assert len(lines) == 2
    assert all(re.search(r"\| \d+% \| [\d,]+ MB \| \d\.\de-\d\d \|$", line) for line in lines)
    result = command("targets", "--file", path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0 of 30 hold")
    result = command("plot", "--file", path, "--output", str(tmp_path / "figures"))
    assert result.returncode == 0, result.stderr
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"here-time.png", "here-memory.png", "here-share.png"}


def test_results_are_named_after_the_machine(monkeypatch):
    monkeypatch.setattr(measure, "machine", lambda device: {"machine": "AMD EPYC 7B13 (64), 2 threads"})
    assert default_file("cpu") == ROOT / "benchmarks" / "results" / "amd-epyc-7b13-64.csv"


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "--file", "nowhere.csv"),
        ("measure", "--B", "many"),
        ("measure", "--N", "-3"),
        ("measure", "--dtype", "int8"),
        ("draw",),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(arguments):
    result = command(*arguments)
    assert result.returncode != 0
    assert arguments[-1] in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_every_tile_shape_sums_the_same():
    """What `benchmarks.tune time` compares."""
    problem = made("float32", 20, 300, 24, 3)
    expected = PROVIDERS["streaming"].prepare(problem, True)()[0]
    for config in (Config(16, 16, 4, 1, 1 << 14), Config(64, 32, 4, 2, 1 << 15)):
        log_p = tune.sum_with(config, problem)[0]
        torch.testing.assert_close(providers.truncated(log_p.exp()), expected)


def test_shapes_of_the_tables_block_are_timed_first():
    device = Device(capability=90, multiprocessors=132, shared=227 << 10)
    chosen = Config(64, 128, 8, 3, 1 << 17)
    found = tune.shapes(device, "16-bit", 128, chosen)
    blocks = [config.block_b for config in found]
    assert set(blocks) == {16, 64, 128}
    assert blocks == sorted(blocks, key=lambda block: block != 64)
    assert chosen[:4] in {config[:4] for config in found}


def test_why_a_shape_does_not_run_is_said(monkeypatch):
    def too_large(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    shape = {"B": 20, "D": 16, "dtype": "float32", "device": "cpu"}
    assert tune.compiles(Config(16, 16, 4, 1, 1 << 14), **shape) is None
    monkeypatch.setattr(tune, "sum_with", too_large)
    assert "300000" in tune.compiles(Config(16, 16, 4, 1, 1 << 14), **shape)


def test_a_shape_is_timed_beside_the_tables(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    ratio, text = tune.beside(partial(time.sleep, 0.01), partial(time.sleep, 0.002), "cpu")
    assert 0.1 < ratio < 0.9
    assert text.startswith(f"{ratio:.3f} of the table's")
    assert tune.beside(partial(time.sleep, 0.01), partial(math.sqrt, -1), "cpu")[0] == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_gpu_that_is_not_there_is_no_choice():
    result = command("targets", "--device", "cuda")
    assert result.returncode == 2
    assert "--device: invalid choice: 'cuda'" in result.stderr.splitlines()[-1]


# Reports


def rows_of(*found: dict) -> pd.DataFrame:
    """Rows of a machine that multiplies at 1 TFLOP/s and reads at 0.1 TB/s."""
    side = 1000
    shared = dict.fromkeys(measure.COLUMNS, "") | dict.fromkeys(measure.TIMES) | {"error": None}
    given = [
        {"what": PRODUCTS, "B": side, "N": side, "D": side, "provider": "product", "wall_50": 2 * side**3 / 1e12},
        {"what": TRAFFIC, "B": 1, "N": 10**6, "D": 100, "provider": "reading", "wall_50": 2e-3},
        *found,
    ]
    of_bank = {"C": 45, "dtype": "bfloat16", "outcome": "ok", "peak_bytes": 1 << 20, "machine": "here"}
    return pd.DataFrame([shared | of_bank | row for row in given]).astype({column: float for column in measure.TIMES})


def timed(provider: str, B: int, N: int, seconds: float, **more) -> dict:
    shape = {"what": GRADIENT, "B": B, "N": N, "D": 128, "provider": provider}
    return shape | {"wall_50": 2 * seconds, "device_50": seconds} | more


def test_rates_and_shares_are_of_the_device_time():
    B, N = 1000, 10**6
    rows = report.derived(rows_of(timed("triton", B, N, 1.0), timed("triton", 1, N, 1e-2)))
    large, small = rows.iloc[2], rows.iloc[3]
    assert large.seconds == 1
    assert large.flops == pytest.approx(4 * B * N * 128)
    assert large.flops_share == large.share == pytest.approx(0.512)
    assert small.bandwidth == pytest.approx(2 * N * 128 / 1e-2)
    assert small.share == small.bandwidth_share == pytest.approx(0.256)


def found_of(*rows: dict) -> dict[tuple[str, int, int], tuple[float, bool]]:
    targets = report.targets(report.derived(rows_of(*rows)))
    return {
        (target.says, target.case.B, target.case.N): (round(target.found, 6), target.held)
        for target in targets
        if not math.isnan(target.found)
    }


def test_targets_hold_and_do_not():
    at_once = [timed("triton", 256, 10**6, 0.1), timed("naive", 256, 10**6, 1.6)]
    at_once += [timed("naive, compiled", 256, 10**6, 0.4), timed("SDPA flash", 256, 10**6, 0.2)]
    at_once += [timed("SDPA cuDNN, folded", 256, 10**6, 0.08)]
    many = [timed("triton", 1024, 10**6, 4 * 1024 * 10**6 * 128 / 1e12 / 0.8)]
    large = [timed("triton", 64, 10**8, 2 * 10**8 * 128 / 1e11 / 0.5, peak_bytes=65 << 20)]
    large.append(timed("triton", 256, 10**8, 0.017))
    small = [timed("triton", 1, 10**4, 1.0), timed("naive", 1, 10**4, 1.5)]
    update = [timed("ours", 256, 10**6, 9e-6, what=UPDATE), timed("PyTorch", 256, 10**6, 3.6e-5, what=UPDATE)]
    assert found_of(*at_once, *many, *large, *small, *update) == {
        ("at most 0.8 × attention's forward", 256, 10**6): (1.25, False),
        ("at least 15 × as fast as naive", 256, 10**6): (16, True),
        ("at least 5 × as fast as naive, compiled", 256, 10**6): (4, False),
        ("at least 70 % of the matrix rate", 1024, 10**6): (80, True),
        ("at least 85 % of bandwidth", 64, 10**8): (50, False),
        ("in at most 18 ms", 256, 10**8): (17, True),
        ("at most 64 MB of memory", 256, 10**8): (1, True),
        ("at most 64 MB of memory", 64, 10**8): (65, False),
        ("no slower than naive, launches included", 1, 10**4): (1.5, True),
        ("update in at most 10 µs", 256, 10**6): (9, True),
        ("update at least 5 × as fast as PyTorch", 256, 10**6): (4, False),
    }


def test_two_classes_may_take_half_as_long_again():
    rows = timed("triton", 256, 10**6, 0.14, C=2), timed("SDPA flash", 256, 10**6, 0.1, C=2)
    assert found_of(*rows) == {("at most 1.5 × attention's forward", 256, 10**6): (1.4, True)}


def test_what_failed_or_was_not_measured_holds_no_target(capsys):
    wrong = timed("triton", 256, 10**6, 0.01, outcome="wrong"), timed("naive", 256, 10**6, 1.6)
    assert found_of(*wrong) == {}
    report.print_targets(rows_of(*wrong))
    printed = capsys.readouterr().out
    assert printed.startswith("0 of 30 hold")
    assert printed.count("| not measured | **no** |") == 30


def test_ours_stands_beside_the_fastest_attention(capsys):
    rows = [timed("triton", 256, 10**6, 0.2), timed("naive", 256, 10**6, 3.0), timed("SDPA flash", 256, 10**6, 0.4)]
    rows += [timed("SDPA cuDNN, folded", 256, 10**6, 0.16), timed("SDPA flash", 64, 10**6, 0.1)]
    rows += [timed("triton", 8, 10**6, 0.1), timed("SDPA flash", 8, 10**6, 0.01, outcome="wrong")]
    report.print_against_attention(report.derived(rows_of(*rows)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 3  # only where both ran
    assert lines[2].startswith("| 256 | 1,000,000 | 200 ms | 160 ms | 1.25 | 15 × | 655 GFLOP/s | ")


def test_rows_of_elsewhere_take_the_place_of_the_same_case_and_provider(tmp_path):
    here, elsewhere = tmp_path / "here.csv", tmp_path / "elsewhere.csv"
    measure.write(rows_of(timed("triton", 256, 10**6, 0.2), timed("naive", 256, 10**6, 3.0)), here)
    measure.write(rows_of(timed("triton", 256, 10**6, 0.1), timed("triton", 8, 10**6, 0.3))[2:], elsewhere)
    result = command("merge", "--rows", str(elsewhere), "--file", str(here))
    assert result.returncode == 0, result.stderr
    merged = measure.read(here)
    assert list(merged.provider) == ["product", "reading", "naive", "triton", "triton"]
    assert list(merged.device_50[2:]) == [3.0, 0.1, 0.3]
    measure.merge(measure.read(elsewhere), tmp_path / "new.csv")
    assert list(measure.read(tmp_path / "new.csv").device_50) == [0.1, 0.3]


@pytest.mark.parametrize("name", ["amd-epyc", "nvidia-h200"])
def test_results_can_be_read_and_judged(name, capsys):
    report.print_targets(measure.read(ROOT / "benchmarks" / "results" / f"{name}.csv"))
    assert re.match(r"\d+ of 30 hold", capsys.readouterr().out)


@pytest.mark.gpu
def test_a_gpu_is_measured_by_both_clocks(tmp_path):
    cases = [Case(GRADIENT, 64, 10**4, 64, 9, "bfloat16"), Case(UPDATE, 64, 10**4, 64, 9, "bfloat16")]
    path = tmp_path / "gpu.csv"
    measure.measure(cases, measure.NAMES, "cuda", path, minutes=10, seconds=0.1, longest=10)
    rows = measure.read(path)
    assert "failed" not in set(rows.outcome), rows[["provider", "why"]].to_string()
    ran = rows[rows.outcome == "ok"]
    assert {"naive", "triton", "flex attention", "ours"} <= set(ran.provider)
    assert (ran.device_50 > 0).all()
