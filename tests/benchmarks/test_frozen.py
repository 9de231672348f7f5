"""The benchmark on frozen features: its problems, its grid, and its tables, checked by hand."""

import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.frozen import plan, training
from benchmarks.frozen.__main__ import main
from benchmarks.frozen.losses import AUDITED, COMPARED, TUNED
from benchmarks.frozen.problem import Column, Source, audited, make_problem
from benchmarks.frozen.results import COLUMNS, Run, append, read
from ntdne_kernels.experiments import noise
from ntdne_kernels.experiments.splits import split

C, PER_CLASS, F = 30, 20, 12
NAMES = sorted(noise._maps()["AID"])
LABELS = torch.arange(C).repeat_interleave(PER_CLASS)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """Features (600, 12) of 30 classes with the names of AID's, around a centre for each class."""
    folder = tmp_path_factory.mktemp("archive")
    random = np.random.default_rng(0)
    labels = np.arange(C).repeat(PER_CLASS)
    centres = random.normal(size=(C, F))
    np.save(folder / "features.npy", (centres[labels] + random.normal(0, 0.5, (len(labels), F))).astype(np.float16))
    np.save(folder / "labels.npy", np.array(NAMES)[labels])
    return Source(folder / "features.npy", folder / "labels.npy")


@pytest.fixture
def command(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which saves imports: its exit status, output and errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks.frozen", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run


def row(noise: str, rate: float, seed: int, method: str, lr: float, **metrics: float) -> dict:
    """A row of results whose metrics are all 0.5 but for those given."""
    values = dict.fromkeys(COLUMNS[7:-2], 0.5) | {"archive": "made", "epochs": 30, "torch": "2"} | metrics
    return Run(noise, rate, seed, method, lr)._asdict() | values


def table_line(printed: str, title: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`, in the table below a title."""
    below = printed[printed.index(title) :].splitlines()
    (line, *_) = (line for line in below if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# The problem


def test_rows_are_the_principal_components_of_the_training_rows(source):
    problem = make_problem(source, Column("uniform", 0.5), seed=1)
    parts = split(LABELS, "seeded", 1)
    features = np.load(source.features).astype(np.float64)
    train = features[parts.train]
    left, singular, _ = np.linalg.svd(train - train.mean(axis=0), full_matrices=False)
    expected = (left * singular)[:, ::-1]  # up to the sign of each column
    expected /= np.sqrt((expected**2).mean())
    assert np.allclose(problem.train.abs().numpy(), np.abs(expected), atol=1e-3)
    assert [len(part) for part in problem[:3]] == [len(part) for part in parts]


@pytest.mark.parametrize("column", [Column("uniform", 0.5), Column("label-dependent", 0.5)])
def test_training_and_validation_labels_are_wrong_and_test_labels_right(source, column):
    problem = make_problem(source, column, seed=0)
    parts = split(LABELS, "seeded", 0)
    assert torch.equal(problem.train_labels, LABELS[parts.train])
    assert torch.equal(problem.test_labels, LABELS[parts.test])
    matrix = noise.authors_map(NAMES, 0.5) if column.noise == "label-dependent" else noise.uniform(C, 0.5)
    for part, given in ((parts.train, problem.train_given), (parts.validation, problem.validation_given)):
        assert 0.3 < float((given != LABELS[part]).float().mean()) < 0.6
        assert bool((matrix[LABELS[part], given] > 0).all())


def test_an_audit_leaves_out_or_corrects_wrong_labels(source):
    problem = make_problem(source, Column("uniform", 0.3), seed=0)
    wrong = problem.train_given != problem.train_labels
    assert 0.2 < float(wrong.float().mean()) < 0.4
    (rows, labels), (all_rows, corrected) = (audited(problem, treatment) for treatment in ("left out", "corrected"))
    assert all_rows is problem.train
    assert float((corrected == problem.train_labels).float().mean()) > 0.9
    places = (problem.train[:, None] == rows).all(dim=2).float().argmax(dim=0)  # of the rows that are left
    assert torch.equal(labels, problem.train_given[places])
    assert torch.equal(labels, corrected[places])
    assert float(wrong[places].float().mean()) < 0.05


# Training


@pytest.mark.parametrize("method", [*COMPARED, *TUNED, *AUDITED])
def test_every_loss_trains_a_head_that_separates_the_classes(method, source):
    problem = make_problem(source, Column("uniform", 0.0), seed=0)
    found = training.train(problem, method, 0.03, epochs=30, seed=0)
    assert found["knn"] > 0.7
    assert found["knn_given"] == found["knn"]  # no label is wrong
    assert set(found) | {"archive", "epochs", "torch", "failure", *Run._fields} == set(COLUMNS)


def test_the_same_run_has_the_same_numbers(source):
    problem = make_problem(source, Column("uniform", 0.5), seed=0)
    first, second = (training.train(problem, "NTDNE", 0.1, epochs=2, seed=0) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_training_that_diverges_is_a_row_with_its_reason(source):
    found = training.carry_out(source, 3, Run("uniform", 0.5, 0, "cross-entropy", 1e30))
    assert "lr 1e+30: the loss is" in found["failure"]
    assert found["method"] == "cross-entropy"


# The grid


def test_the_learning_rate_is_the_best_on_held_out_labels():
    at = plan.CHOSEN_AT["uniform"]
    tried = {0.003: 0.2, 0.01: 0.4, 0.03: 0.4, 0.1: 0.3, 0.3: math.nan}
    rows = pd.DataFrame([row(*at, 0, "GCE", lr, held_out=value, knn=lr) for lr, value in reversed(tried.items())])
    elsewhere = [row("uniform", 0.7, 0, "GCE", 0.1, held_out=0.9), row(*at, 1, "GCE", 0.1, held_out=0.9)]
    rows = pd.concat([rows, pd.DataFrame(elsewhere)])
    assert plan.chosen(rows, "GCE", "uniform") == 0.01
    assert plan.chosen(rows, "SNCA", "uniform") is None


def test_beyond_the_end_of_the_learning_rates_one_more_is_tried():
    scope = plan.Scope(["GCE", "SNCA", "MAE"], [plan.CHOSEN_AT["uniform"]])
    best = {"GCE": 0.003, "SNCA": 0.1, "MAE": 0.3}
    rows = pd.DataFrame([row(*plan.CHOSEN_AT["uniform"], 0, name, lr) for name, lr in best.items()])
    assert [(run.method, run.lr) for run in plan.beyond(scope, rows)] == [("GCE", 0.001), ("MAE", 1.0)]


def test_own_and_common_learning_rates_make_all_cells_seed_by_seed():
    scope = plan.Scope(["GCE", "NTDNE"], [Column("uniform", 0.5), Column("uniform", 0.7)], range(2))
    rows = pd.DataFrame([row("uniform", 0.5, 0, "GCE", 0.1), row("uniform", 0.5, 0, "NTDNE", 0.3)])
    expected = [
        Run("uniform", rate, seed, *loss)
        for losses in ([("GCE", 0.1), ("NTDNE", 0.01), ("NTDNE", 0.3)], [("GCE", 0.01), ("NTDNE", 0.01)])
        for seed in (0, 1)
        for rate in (0.5, 0.7)
        for loss in losses
    ]
    assert list(plan.grid(scope, rows)) == expected


def test_after_an_audit_each_loss_trains_beside_itself_without_one():
    scope = plan.Scope(["GCE", "NTDNE"], [Column("uniform", 0.5)], range(1))
    methods = ["NTDNE", "NTDNE, suspects left out", "NTDNE", "NTDNE, suspects corrected"]
    assert list(plan.audited(scope, pd.DataFrame())) == [Run("uniform", 0.5, 0, method, 0.01) for method in methods]


def test_a_grid_runs_to_its_end_and_what_is_there_is_left(source, tmp_path, command, monkeypatch):
    monkeypatch.setattr(plan, "LEARNING_RATES", (0.01, 0.1))
    file, figure = tmp_path / "new" / "found.csv", tmp_path / "new" / "figure.png"
    asked = ("--methods", "GCE", "NTDNE", "--noise", "uniform", "--seeds", "2", "--epochs", "2", "--jobs", "2")
    arguments = ("run", source.features, source.labels, "--output", file, *asked, "--stages", "rates", "grid")
    status, printed, errors = command(*arguments)
    assert status == 0, errors
    assert "rates: 4 runs to do" in printed
    rows = read(file)
    for seed in (0, 1):
        for rate in (0.1, 0.3, 0.5, 0.7):
            there = rows[(rows.seed == seed) & (rows.rate == rate)]
            for method in ("GCE", "NTDNE"):
                assert set(there.lr[there.method == method]) >= {0.01, plan.chosen(rows, method, "uniform")}

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]))  # as if it had been killed
    status, printed, errors = command(*arguments)
    assert status == 0, errors
    assert "rates: 0 runs to do" in printed
    assert sum(int(line.split()[1]) for line in printed.splitlines() if line.endswith("runs to do")) == 2
    assert file.read_text().startswith("".join(lines[:-2]))
    again = read(file)
    pd.testing.assert_frame_equal(
        *(x.drop(columns="seconds").sort_values(list(Run._fields), ignore_index=True) for x in (rows, again))
    )

    status, printed, errors = command("table", file)
    assert status == 0, errors
    assert "± " in table_line(printed, "**K-NN accuracy by right labels, all losses", "NTDNE")[0]
    status, printed, errors = command("plot", figure, file)
    assert status == 0, errors
    assert figure.read_bytes().startswith(b"\x89PNG")


# Tables


def test_standard_errors_and_paired_differences_are_those_by_hand(tmp_path, command):
    file = tmp_path / "found.csv"
    at = ("uniform", 0.5)
    values = {
        "NTDNE": (0.80, 0.82, 0.84),
        "GCE": (0.79, 0.80, 0.84),
        "SNCA": (0.70, 0.78, 0.71),
        "MAE": (0.81, 0.81, 0.83),
    }
    for method, found in values.items():
        for seed, knn in enumerate(found):
            append(file, row(*at, seed, method, 0.01, knn=knn))
    append(file, row(*at, 3, "NTDNE", 0.01, knn=0.1))  # a seed that the others lack does not count
    append(file, row("uniform", 0.1, 0, "NTDNE", 0.01, knn=0.9))
    status, printed, errors = command("table", file)
    assert status == 0, errors
    title = "**K-NN accuracy by right labels, all losses with learning rate 0.01"
    # Standard deviation of 80, 82, 84 is 2; 2/√3 = 1.15. 80/90 is 88.9 %.
    assert table_line(printed, title, "NTDNE") == ["**90.0**", "**82.0 ± 1.2**", "88.9", "–"]
    # MAE is behind by −1, 1, 1: mean 0.33, standard error 1.15/√3 = 0.67. GCE by 1, 2, 0: 1 ± 0.58.
    assert table_line(printed, title, "MAE")[1] == "*81.7 ± 0.7*"
    assert table_line(printed, title, "GCE")[1] == "81.0 ± 1.5"
    title = "**NTDNE − best other loss, seed by seed, in points; all losses"
    assert table_line(printed, title, "K-NN accuracy by right labels")[1] == "+0.3 ± 0.7 (MAE)"


def test_the_default_is_compared_with_the_best_setting_by_hand(tmp_path, command):
    file = tmp_path / "found.csv"
    for seed, (default, tuned, worse) in enumerate([(0.80, 0.81, 0.70), (0.82, 0.84, 0.70)]):
        append(file, row("uniform", 0.0, seed, "NTDNE", 0.01, knn=default))
        append(file, row("uniform", 0.0, seed, "NTDNE, k = auto, warm-up 20", 0.1, knn=tuned))
        append(file, row("uniform", 0.0, seed, "NTDNE, k = 0.3, warm-up 20", 0.3, knn=worse))
    _, printed, _ = command("table", file)
    found = table_line(printed, "**NTDNE's default, learning rate 0.01", "U 0")
    assert found == ["81.0 ± 1.0", "82.5 ± 1.5", "k = auto, warm-up 20, lr 0.1", "-1.5 ± 0.5"]


def test_what_an_audit_changes_is_counted_seed_by_seed(tmp_path, command):
    file = tmp_path / "found.csv"
    for seed, (given, left_out) in enumerate([(0.80, 0.81), (0.82, 0.85)]):
        append(file, row("uniform", 0.5, seed, "NTDNE", 0.01, knn=given))
        append(file, row("uniform", 0.5, seed, "NTDNE, suspects left out", 0.01, knn=left_out))
    append(file, row("uniform", 0.5, 2, "NTDNE", 0.01, knn=0.1))  # a seed that the audit's row lacks
    _, printed, _ = command("table", file)
    title = "**K-NN accuracy by right labels, learning rate 0.01; after an audit"
    assert table_line(printed, title, "NTDNE, suspects left out") == ["+2.0 ± 1.0"]
    assert table_line(printed, title, "NTDNE, suspects corrected") == ["–"]


# What cannot be


def test_bad_files_are_refused_by_name(source, tmp_path, command):
    def errors_of(features: Path, *more: str | Path, output: Path = tmp_path / "new.csv") -> str:
        status, _, errors = command("run", features, source.labels, "--output", output, *more)
        assert status == 2
        assert not (tmp_path / "new.csv").exists()
        return errors

    features = np.load(source.features)
    bad = tmp_path / "bad.npy"
    np.save(bad, features[:-1])
    assert "features, labels: expected (N, F) numbers and (N,) names or whole numbers, got (599, 12)" in errors_of(bad)
    features[7, 3] = np.nan
    np.save(bad, features)
    assert "features: expected finite numbers, got others in row 7" in errors_of(bad)
    other = tmp_path / "other.csv"
    append(other, row("uniform", 0.5, 0, "NTDNE", 0.01))
    assert "output: expected a file of archive " in errors_of(source.features, output=other)
    other.write_text("a,b\n1,2\n")
    assert "has other columns" in errors_of(source.features, output=other)
    assert "--jobs" in errors_of(source.features, "--jobs", "0")
