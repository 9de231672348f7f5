"""Tables, targets and figures say what the rows hold, and those in the README are drawn from the data."""

import math
import re
from pathlib import Path

import pytest

from benchmarks import figures, providers, rates, rows, tables, targets
from benchmarks.grid import UPDATE
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


@pytest.mark.parametrize("name", ["amd-epyc", "nvidia-h200"])
def test_results_can_be_read_and_judged(name, capsys):
    targets.print_targets(rows.read(RESULTS / f"{name}.csv"))
    assert re.match(r"\d+ of 30 hold", capsys.readouterr().out)
