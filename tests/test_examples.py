"""The examples run as a user runs them, and tables of the README are drawn from the data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import audit, scale

ROOT = Path(__file__).parent.parent


# As examples/train_distributed.py says.
ENVIRONMENT = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    """Standard error goes to a file beside the checkpoints: nobody reads it while the processes run."""
    launcher = f"-m torch.distributed.run --standalone --max-restarts 1 --nproc-per-node {processes}".split()
    return subprocess.Popen(
        [sys.executable, *launcher, "examples/train_distributed.py", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=Path(f"{arguments[0]}.stderr").open("w"),
        text=True,
    )


def test_drop_in_learns_the_digits():
    result = run("examples/drop_in.py")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("test accuracy ")[1].rstrip("%\n")) > 95


def test_train_distributed_survives_a_killed_process_and_gives_what_it_would_have_given(tmp_path):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    expected = torchrun(2, whole, "--epochs", "4").communicate(timeout=300)[0].splitlines()
    assert [line.split("loss")[0] for line in expected[:-1]] == [f"epoch {epoch:2}  " for epoch in (1, 2, 3, 4)]
    assert expected[-1].startswith("test accuracy")

    process = torchrun(2, killed, "--epochs", "4")
    seen = []
    for line in process.stdout:
        seen.append(line.rstrip())
        if seen == expected[:2]:  # the third epoch has begun
            children = Path(f"/proc/{process.pid}/task").glob("*/children")
            workers = [int(pid) for of_thread in children for pid in of_thread.read_text().split()]
            os.kill(max(workers), signal.SIGKILL)
    assert process.wait(timeout=300) == 0, Path(f"{killed}.stderr").read_text()
    assert "Signal 9" in Path(f"{killed}.stderr").read_text() or "exitcode: -9" in Path(f"{killed}.stderr").read_text()
    assert seen == expected  # also the loss of each epoch, and the accuracy
    # Four epochs are done: the same folder on one process gives the result alone.
    assert torchrun(1, killed, "--epochs", "4").communicate(timeout=300)[0].splitlines() == expected[-1:]


def test_digits_writes_its_figures_and_results(tmp_path):
    result = run("examples/digits.py", "--epochs", "1", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"features.png", "scores.png", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["metrics"]) == ["cross-entropy", "SNCA", "NTDNE"]
    for cost in results["costs"]:
        assert cost["streamed_peak_megabytes"] < 64
        assert cost["gradient_difference"] < 1e-4
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    "arguments", [("--noise", "2"), ("--epochs", "none"), ("--seed", "-1"), ("--output", "/dev/null")]
)
def test_digits_names_a_bad_argument_in_one_line(arguments):
    result = run("examples/digits.py", *arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_tables_of_scale_in_the_readme_are_drawn_from_the_data(capsys):
    scale.table(ROOT / "benchmarks" / "results" / "scale.json")
    printed = capsys.readouterr().out.splitlines()
    section = (ROOT / "README.md").read_text().split("### What it costs")[1].split("## Audit")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 10 + 5 + 5 + 6
    assert [row for row in rows if row not in printed] == []


def test_the_tables_of_the_audit_in_the_readme_are_drawn_from_the_data(capsys):
    audit.table(audit.EVIDENCE, audit.SPEED, audit.CALIBRATION)
    printed = capsys.readouterr().out.splitlines()
    section = (ROOT / "README.md").read_text().split("### How well it finds wrong labels")[1].split("## Experiments")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 15 + 15 + 9 + 6
    assert [row for row in rows if row not in printed] == []
