"""Training steps are measured beside the workers of a DataLoader, with packages and losses in turns."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import checkout, loader_step, problems, steps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`python -m benchmarks.loader_step` in this process: the rows of its file, and what it printed."""

    def run(*arguments: str) -> tuple[pd.DataFrame, list[str]]:
        path = tmp_path / "results" / "loader.csv"
        monkeypatch.setattr(sys, "argv", ["loader_step", *arguments, "--file", str(path)])
        loader_step.main()
        return pd.read_csv(path), capsys.readouterr().out.splitlines()

    return run


def test_each_loss_is_measured_beside_two_workers(command):
    found, printed = command("--N", "600", "--B", "4", "--rounds", "1", "--steps", "1")
    assert list(found.provider) == ["cross-entropy", "naive", "ours"]
    assert (found[["N", "B", "D", "C", "workers", "steps"]] == [600, 4, 128, 45, 2, 1]).all(axis=None)
    assert (found.loss_50 > 0).all()
    assert (found.loss_50 + found.waiting_50 < found.step_50).all()
    assert found.workers_50.sum() > 0
    assert set(found.torch) == {torch.__version__}
    assert len(printed) == 2 + 3
    assert printed[3].startswith("| 600 | naive | ")


def test_table_prints_what_the_file_holds_and_measures_nothing(command, monkeypatch):
    _, printed = command("--N", "600", "--B", "4", "--rounds", "1", "--steps", "1")
    monkeypatch.delattr(loader_step, "run")
    assert command("--table")[1] == printed


def test_packages_take_turns_and_each_has_its_rows(command, monkeypatch, tmp_path):
    called = []

    def run(checkout, N, B, count):
        called.append((checkout, N))
        second = float(len(called))
        return {name: {which: [second] * count for which in loader_step.TIMES} for name in steps.OBJECTIVES}

    monkeypatch.setattr(loader_step, "run", run)
    monkeypatch.setattr(loader_step, "version", lambda checkout: checkout.name)
    found, _ = command("--against", str(tmp_path / "other"), "--N", "10", "20", "--rounds", "2", "--steps", "3")
    here, other = ROOT, tmp_path / "other"
    assert called == [(checkout, N) for N in (10, 20) for checkout in (here, other, other, here)]
    ours = found[found.provider == "ours"].set_index(["N", "package"])
    assert list(ours.index) == [(10, here.name), (10, "other"), (20, here.name), (20, "other")]
    assert set(ours.steps) == {6}
    assert list(ours.loss_50) == [2.5, 2.5, 6.5, 6.5]  # of the first and fourth process, the second and third, ...
    assert ours.loss_20[10, "other"] == 2


def test_the_package_of_the_other_checkout_is_measured_with_these_benchmarks(tmp_path):
    for name in ("ntdne_kernels", "benchmarks"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "__init__.py").write_text("LABEL = 'other'")
    statements = "from benchmarks import checkout; print(ntdne_kernels.LABEL, checkout.__file__)"
    done = subprocess.run(
        checkout.program(tmp_path / "other", statements), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["other", str(ROOT / "benchmarks" / "checkout.py")], done.stderr


def test_a_process_that_fails_ends_the_measurement(tmp_path, capfd):
    (tmp_path / "ntdne_kernels.py").write_text("raise ValueError('not built')")
    with pytest.raises(SystemExit, match="the process that measures it failed"):
        loader_step.run(tmp_path, 7, 5, 3)
    assert "not built" in capfd.readouterr().err


def test_a_step_in_parts_is_a_step(monkeypatch):
    """The loss's gradient is handed to the encoder, and the bank's rows of the batch are updated."""
    monkeypatch.setattr(loader_step, "processor_seconds", float)
    images, index = torch.rand(4, 3, 8, 8), torch.tensor([5, 2, 9, 11])
    problem = problems.make(4, 20, 8, 3, torch.float32)
    trained = []
    for in_parts in (True, False):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8))
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        objective = steps.OBJECTIVES["ours"](problem)
        if in_parts:
            loader_step.step(iter([(images, index)]), objective, encoder, optimizer)
        else:
            features = encoder(images)
            objective.loss(features, index).backward()
            optimizer.step()
            objective.after(features.detach(), index)
        trained.append([*encoder.parameters(), objective.loss(encoder(images), index)])
    for first, second in zip(*trained, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
