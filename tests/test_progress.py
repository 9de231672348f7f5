"""Progress: a line per tenth elsewhere than on a terminal, a bar there."""

import sys
from collections.abc import Iterator

import pytest

from ntdne_kernels.progress import with_progress


def test_a_line_is_printed_for_each_tenth(capsys):
    assert list(with_progress(range(30), "Filling the bank")) == list(range(30))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"Filling the bank: {done} of 30 batches" for done in range(3, 31, 3)]


def test_nothing_is_printed_where_the_length_is_unknown(capsys):
    assert list(with_progress(iter("abc"), "Reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    pretend_terminal(monkeypatch)
    assert list(with_progress(range(3), "Reading")) == [0, 1, 2]
    assert "Reading:   0%" in capsys.readouterr().err


def test_a_terminal_without_tqdm_gets_lines(capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(with_progress([7], "Reading")) == [7]
    assert capsys.readouterr().err == "Reading: 1 of 1 batches\n"


def test_an_import_error_of_the_loader_is_not_taken_for_a_missing_tqdm(monkeypatch):
    def loader() -> Iterator[int]:
        yield 1
        raise ImportError("no codec")

    pretend_terminal(monkeypatch)
    with pytest.raises(ImportError, match="no codec"):
        list(with_progress(loader(), "Reading"))
