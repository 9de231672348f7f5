"""Tables, targets and figures say what the rows hold, and those in the README are drawn from the data."""

import math
import re
from pathlib import Path

import pytest

from benchmarks import figures, providers, rates, rows, tables, targets
from benchmarks.grid import GRADIENT, PRODUCTS, UPDATE
from tests.benchmarks.made import made_rows, timed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_rates_and_shares_are_of_the_device_time():
    B, N = 1000, 10**6
    rows = rates.with_rates(made_rows(timed("triton", B, N, 1.0), timed("triton", 1, N, 1e-2)))
    large, small = rows.iloc[2], rows.iloc[3]
    assert large.seconds == 1
    assert large.flops == pytest.approx(4 * B * N * 128)
    assert large.flops_share == large.share == pytest.approx(0.512)
    assert small.bandwidth == pytest.approx(2 * N * 128 / 1e-2)
    assert small.share == small.bandwidth_share == pytest.approx(0.256)


def test_a_machine_that_multiplies_faster_in_float32_is_judged_by_that():
    size, flops = {"B": 1000, "N": 1000, "D": 1000}, 2e12
    faster = {"what": PRODUCTS, **size, "provider": "product", "dtype": "float32", "wall_50": 2e9 / flops}
    found = [timed("triton", 1000, 10**6, 1.0, dtype=dtype) for dtype in ("bfloat16", "float32")]
    shares = rates.with_rates(made_rows(faster, *found)).flops_share
    assert list(shares[3:]) == pytest.approx([0.256, 0.256])


def found_of(*rows: dict) -> dict[tuple[str, int, int], tuple[float, bool]]:
    judged = targets.targets(rates.with_rates(made_rows(*rows)))
    return {
        (target.says, target.case.B, target.case.N): (round(target.found, 6), target.held)
        for target in judged
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
    targets.print_targets(made_rows(*wrong))
    printed = capsys.readouterr().out
    assert printed.startswith("0 of 30 hold")
    assert printed.count("| not measured | **no** |") == 30


def test_ours_stands_beside_the_fastest_attention(capsys):
    rows = [timed("triton", 256, 10**6, 0.2), timed("naive", 256, 10**6, 3.0), timed("SDPA flash", 256, 10**6, 0.4)]
    rows += [timed("SDPA cuDNN, folded", 256, 10**6, 0.16), timed("SDPA flash", 64, 10**6, 0.1)]
    rows += [timed("triton", 8, 10**6, 0.1), timed("SDPA flash", 8, 10**6, 0.01, outcome="wrong")]
    tables.print_against_attention(rates.with_rates(made_rows(*rows)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 3  # only where both ran
    assert lines[2].startswith("| 256 | 1,000,000 | 200 ms | 160 ms | 1.25 | 15 × | 655 GFLOP/s | ")


def test_rows_of_elsewhere_take_the_place_of_the_same_case_and_provider(command, tmp_path):
    here, elsewhere = tmp_path / "here.csv", tmp_path / "elsewhere.csv"
    rows.write(made_rows(timed("triton", 256, 10**6, 0.2), timed("naive", 256, 10**6, 3.0)), here)
    rows.write(made_rows(timed("triton", 256, 10**6, 0.1), timed("triton", 8, 10**6, 0.3))[2:], elsewhere)
    assert command("merge", "--rows", str(elsewhere), "--file", str(here)) == (0, "", "")
    merged = rows.read(here)
    assert list(merged.provider) == ["product", "reading", "naive", "triton", "triton"]
    assert list(merged.device_50[2:]) == [3.0, 0.1, 0.3]
    rows.merge(rows.read(elsewhere), tmp_path / "new.csv")
    assert list(rows.read(tmp_path / "new.csv").device_50) == [0.1, 0.3]


def test_every_provider_of_the_loss_has_a_line_in_the_figures():
    assert list(figures.STYLES.keys() - providers.PROVIDERS.keys()) == []
    assert list(providers.PROVIDERS.keys() - figures.STYLES.keys()) == []


@pytest.mark.parametrize(("name", "count"), [("amd-epyc-avx2", 46), ("amd-epyc", 46), ("nvidia-h200", 30)])
def test_results_can_be_read_and_judged(name, count, capsys):
    targets.print_targets(rows.read(RESULTS / f"{name}.csv"))
    assert re.match(rf"\d+ of {count} hold", capsys.readouterr().out)


# A CPU, and busy processes


def of_cpu(provider: str, B: int, N: int, seconds: float, **more) -> dict:
    """A row of `made_rows` without a device's clock."""
    return timed(provider, B, N, seconds, **{"dtype": "bfloat16", "wall_50": seconds, "device_50": None} | more)


def test_targets_of_a_cpu_hold_and_do_not(capsys):
    size = 256, 5 * 10**5
    work = 4 * 256 * 5 * 10**5 * 128 / 1e12  # seconds at the matrix rate
    found = [of_cpu("streaming", *size, work / 0.74), of_cpu("naive", *size, work / 0.5)]
    found += [of_cpu("streaming", *size, 2.1 * work / 0.74, busy=2), of_cpu("naive", *size, work, busy=2)]
    found += [of_cpu("streaming", 1, 10**4, 2e-3), of_cpu("naive", 1, 10**4, 1e-3)]
    targets.print_targets(made_rows(*found))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 of 46 hold"
    assert [line for line in lines if line.endswith(("yes |", "× | **no** |", "% | **no** |"))] == [
        "| no slower than naive | 1 | 10,000 | 45 | bfloat16 | 0.5 × | **no** |",
        "| no slower than naive | 256 | 500,000 | 45 | bfloat16 | 1.48 × | yes |",
        "| at least 75 % of the matrix rate | 256 | 500,000 | 45 | bfloat16 | 74 % | **no** |",
        "| at most 2.2 × as long, beside 2 busy processes | 256 | 500,000 | 45 | bfloat16 | 2.1 × | yes |",
        "| at most 64 MB of memory | 256 | 500,000 | 45 | bfloat16 | 1 MB | yes |",
    ]


def test_a_case_under_load_stands_beside_the_idle_one(command, tmp_path):
    more = {"wall_20": 0.1, "wall_80": 9.0, "peak_bytes": 0}
    found = [of_cpu("streaming", 8, 10**5, 0.5, **more), of_cpu("naive", 8, 10**5, 1.0, **more)]
    found += [of_cpu("streaming", 8, 10**5, 2.0, busy=2, **more), of_cpu("naive", 8, 10**5, 3.0, busy=2, **more)]
    found.append(of_cpu("Liger", 8, 10**5, 0.0, busy=2, outcome="out of memory"))
    rows.write(made_rows(*found), tmp_path / "here.csv")
    status, printed, errors = command("table", "--file", str(tmp_path / "here.csv"))
    assert status == 0, errors
    assert "45 classes, bfloat16: ours, and how many" in printed
    assert "45 classes, bfloat16, beside 2 busy processes: ours, and how many" in printed
    assert "| 8 | 2.00 s, 1.5 × |" in printed
    _, _, loaded = printed.partition(f"**{GRADIENT}, B = 8, N = 100,000, D = 128, 45 classes, bfloat16, beside 2 busy")
    assert loaded.splitlines()[2:] == [
        "|  | idle | 20 to 80 % | over ours | busy | 20 to 80 % | over ours | busy / idle |",
        "|---|---|---|---|---|---|---|---|",
        "| streaming | 500 ms | 100 ms to 9.00 s | 1.00 × | 2.00 s | 100 ms to 9.00 s | 1.00 × | 4.00 × |",
        "| naive | 1.00 s | 100 ms to 9.00 s | 2.00 × | 3.00 s | 100 ms to 9.00 s | 1.50 × | 3.00 × |",
        "",
        "Liger: out of memory",
    ]
    _, printed, _ = command("table", "--file", str(tmp_path / "here.csv"), "--busy", "2")
    assert printed.count("beside 2 busy processes") == printed.count("**") / 2 == 2


def test_figures_are_of_the_idle_machine(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda axis, rows, *_: drawn.extend(rows.busy))
    figures.plot(made_rows(of_cpu("naive", 8, 10**5, 1.0), of_cpu("naive", 8, 10**5, 3.0, busy=2)), tmp_path, "made")
    assert set(drawn) == {0}


def test_rows_of_idle_and_busy_machines_stand_beside_each_other_in_a_file(tmp_path):
    path = tmp_path / "here.csv"
    rows.write(made_rows(of_cpu("naive", 8, 10**5, 1.0)), path)
    assert "busy" not in path.read_text().split("\n")[0].split(",")  # files of idle machines stay as they were
    assert set(rows.read(path).busy) == {0}
    rows.merge(made_rows(of_cpu("naive", 8, 10**5, 3.0, busy=2), of_cpu("naive", 8, 10**5, 2.0, busy=4))[2:], path)
    rows.merge(made_rows(of_cpu("naive", 8, 10**5, 5.0, busy=2))[2:], path)
    found = rows.read(path)
    assert list(found) == rows.COLUMNS
    assert sorted(zip(found.busy[2:], found.wall_50[2:], strict=True)) == [(0, 1.0), (2, 5.0), (4, 2.0)]
