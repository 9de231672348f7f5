"""The benchmark of a head on many features."""

import csv
import math

import pytest

from benchmarks import head


def test_an_epoch_is_extrapolated_from_some_steps_against_all_rows(tmp_path, monkeypatch):
    arguments = [
        "--rows",
        "600",
        "--values",
        "16",
        "--batch",
        "64",
        "--steps",
        "2",
        "--file",
        str(tmp_path / "head.csv"),
    ]
    monkeypatch.setattr("sys.argv", ["head", *arguments])
    for _ in range(2):
        head.main()
    first, second = csv.DictReader((tmp_path / "head.csv").open())
    assert first.keys() == second.keys()
    assert (first["rows"], first["steps"], first["bank"]) == ("600", "2", "bfloat16")
    expected = math.ceil(600 / 64) * float(first["step_50"]) / 60
    assert float(first["epoch_minutes"]) == pytest.approx(expected, rel=0.01)
