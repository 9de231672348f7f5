"""What the README, CONTRIBUTING and docs/ say holds: code runs, commands parse, tables and links are right.

How a page is written for it:

- A ```python block runs, after those before it on the page and in one namespace with them, in an empty folder, on the
  CPU. `<!-- setup: ... -->` right before a block holds lines that readers need not see and that run before it.
  `<!-- needs: ... -->` names what a test has not, two processes say: then the block is compiled only.
- A ```text block right after it is what it prints. Warnings of the package are part of it, and an error ends it, as
  Python shows them: `UserWarning: ...`, `ValueError: ...`. `...` stands for anything; line breaks do not count.
- A ```console block is run too: `$ ntdne ...`, and what that prints.
- Options of commands in ```sh blocks, and of commands in `code` that have any, are checked by the program's parser.
- `<!-- table: COMMAND -->` before a table: its rows are among those that the command prints.
"""

import argparse
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest
import torch

from ntdne_kernels.experiments import main

for package in ("cleanlab", "datasets", "lightning", "pytorch_metric_learning"):
    pytest.importorskip(package)

# A module that another test has imported is run here as a program.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
FENCE = re.compile(
    r"(?:^<!-- (?P<kind>setup|needs):(?P<note>(?:(?!-->).)*)-->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TABLE = re.compile(r"^<!-- table: (.*) -->\n+((?:\|.*\n)+)", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MEASURED = ("speed.md", "memory.md", "scale-out.md", "audit.md")  # pages all of whose tables come from a command
PROGRAMS = ("ntdne", "python", "torchrun", "make", "pip", "benchmarks/gpu.sh")
ELSEWHERE = ("git", "cd", "export")  # programs whose options are not ours to check


class Block(NamedTuple):
    language: str
    text: str
    setup: str
    compiled_only: bool
    line: int
    """Of its first line on the page."""
    printed: str
    """What the page says that it prints."""


class Parsed(Exception):
    """A command line was understood; its program ends here."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(text: str) -> list[Block]:
    found, blocks = list(FENCE.finditer(text)), []
    for place, match in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        shown = after is not None and after["language"] == "text" and not text[match.end() : after.start()].strip()
        setup = match["note"] if match["kind"] == "setup" else ""
        line = text[: match.start("text")].count("\n") + 1
        printed = after["text"] if after is not None and shown else ""
        blocks.append(Block(match["language"], match["text"], setup, match["kind"] == "needs", line, printed))
    return blocks


def run(block: Block, page: str, scope: dict[str, Any]) -> str:
    """What the block prints, the package's warnings and an error included."""
    printed = io.StringIO()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename == page:  # the package warns of the user's line
            print(f"{category.__name__}: {message}", file=printed)

    code = compile("\n" * (block.line - 1) + block.text, page, "exec")
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            exec(code, scope)
        except Exception as error:
            print(traceback.format_exception_only(error)[-1], file=printed)
            if not block.printed:
                raise
    return printed.getvalue()


def run_commands(text: str, patched: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What a console block says that its commands print, and what they do print."""
    for entry in text.removeprefix("$ ").split("\n$ "):
        command, _, expected = entry.partition("\n")
        printed = io.StringIO()
        with patched.context() as here, redirect_stdout(printed), redirect_stderr(printed):
            here.setattr(sys, "argv", shlex.split(command))
            assert sys.argv[0] == "ntdne"
            main()
        yield expected, printed.getvalue()


def matches(expected: str, printed: str) -> bool:
    parts = [re.escape(" ".join(part.split())) for part in f" {expected} ".split("...")]
    return re.fullmatch(r" ?.*? ?".join(parts), " ".join(printed.split())) is not None


def commands_of(text: str) -> Iterator[str]:
    """Commands of sh blocks, and of code in the text that has options."""
    for block in blocks_of(text):
        if block.language == "sh":
            yield from (
                line for line in block.text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)
            )
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if code.startswith("make ") or (code.startswith(PROGRAMS) and " -" in code):
            yield " ".join(code.split())


def check_command(command: str, patched: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    while "&&" in words:
        check_command(shlex.join(words[: words.index("&&")]), patched)
        words = words[words.index("&&") + 1 :]
    while re.fullmatch(r"\w+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    program, *arguments = words
    if program == "pip":
        extras = ",".join(re.findall(r"\[(.*)\]", " ".join(arguments))).split(",")
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras) <= {"", *known}
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "benchmarks/gpu.sh":
        assert set(arguments) <= set(re.findall(r"^(\w+)\(\)", (ROOT / program).read_text(), re.MULTILINE))
    elif program == "ntdne":
        parse(words, patched)
    elif program in ("python", "torchrun"):
        parse(arguments if program == "python" else ["-m", "torch.distributed.run", *arguments], patched)
    else:
        assert program in ELSEWHERE, f"what is {program}?"


def parse(words: list[str], patched: pytest.MonkeyPatch) -> None:
    """Let a program read its arguments, but no more; fails where it does not understand them."""
    program, source, argv = program_of(words)
    if source is not None and "argparse" not in source.read_text():
        return
    original = argparse.ArgumentParser.parse_args
    given: list[argparse.Namespace] = []

    def parse_args(self: argparse.ArgumentParser, *arguments: Any) -> None:
        given.append(original(self, *arguments))
        raise Parsed

    with patched.context() as here:
        here.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        here.setattr(sys, "argv", argv)
        if words[0] not in ("ntdne", "-m") and source is not None:
            here.syspath_prepend(source.parent)
        with pytest.raises(Parsed):
            program()
    if "torch.distributed.run" in words:
        parse([given[0].training_script, *given[0].training_script_args], patched)


def program_of(words: list[str]) -> tuple[Callable[[], Any], Path | None, list[str]]:
    """How to start `ntdne`, `-m module` or a script; the file with its arguments, but for ntdne; and its sys.argv."""
    if words[0] == "ntdne":
        return main, None, words
    if words[0] != "-m":
        return partial(runpy.run_path, str(ROOT / words[0]), run_name="__main__"), ROOT / words[0], words
    module = words[1]
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None, f"there is no {module}"
    assert spec.origin is not None
    return partial(runpy.run_module, module, run_name="__main__"), Path(spec.origin), words[1:]


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def printed_by(command: str) -> set[str]:
    """The lines that `python -m MODULE ...` prints, in this process: much of it is imported already."""
    module, *arguments = shlex.split(command)[2:]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed):
        patched.chdir(ROOT)
        patched.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")
    return set(printed.getvalue().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_of_a_page_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        place = f"{name_of(page)}, line {block.line}"
        exec(compile(block.setup, name_of(page), "exec"), scope)
        if block.language == "console":
            for expected, printed in run_commands(block.text, monkeypatch):
                assert matches(expected, printed), f"{place} printed:\n{printed}"
        elif block.language == "python":
            if block.compiled_only:
                compile(block.text, place, "exec")
                continue
            printed = run(block, name_of(page), scope)
            assert matches(block.printed, printed), f"{place} printed:\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_have_no_unknown_option(page, monkeypatch):
    for command in commands_of(page.read_text()):
        try:
            check_command(command, monkeypatch)
        except (SystemExit, AssertionError) as error:
            raise AssertionError(f"{name_of(page)}: {command}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_of_a_page_are_drawn_from_the_data(page):
    text = page.read_text()
    if page.name in MEASURED:
        assert len(TABLE.findall(text)) == len(re.findall(r"^\|[-|:]+\|$", text, re.MULTILINE))
    for command, table in TABLE.findall(text):
        missing = [row for row in table.splitlines() if row not in printed_by(command)]
        assert missing == [], f"{name_of(page)}: {command} does not print these rows"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{name_of(page)}: {target}"


def test_readme_stays_short_and_leads_to_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 250
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(readme.read_text())}
    assert [name_of(page) for page in PAGES if page != readme and page.resolve() not in linked] == []
