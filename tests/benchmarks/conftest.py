"""The command `python -m benchmarks` in the process of a test."""

import sys
from collections.abc import Callable

import pytest

from benchmarks import __main__ as main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m benchmarks` in this process, which saves the imports: its exit status, output and errors."""
    monkeypatch.setattr(main, "limit_memory", lambda: None)  # would limit the tests after it

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        capsys.readouterr()
        status, message = 0, ""
        try:
            main.main()
        except SystemExit as end:
            status, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        output, errors = capsys.readouterr()
        return status, output, errors + message

    return run
