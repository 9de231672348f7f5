"""The report's files, from made-up runs: page, Markdown, values and pictures; and what is wrong with runs."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from ntdne_kernels.experiments import report as made
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.finished import read_runs
from ntdne_kernels.experiments.report import write_report
from tests.experiments.helpers import write_run

# Files


def test_the_values_are_tidy(grid, report):
    output, _ = report
    with (output / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = read_runs(grid)
    assert len(rows) == sum(len(run.metrics) for run in runs)
    keys = ("dataset", "noise", "rate", "loss", "variant", "seed", "epochs", "metric")
    found = {tuple(row[key] for key in keys): row for row in rows}
    for run in runs:
        for metric, value in run.metrics.items():
            rate = "" if run.noise == "none" else str(run.rate)
            row = found[run.dataset, run.noise, rate, run.loss, run.variant, "0", "2", metric]
            assert float(row["value"]) == value
    place = ("AID", "uniform", "0.5")
    assert float(found[*place, "SNCA", "", "0", "2", "knn"]["paper_value"]) == pytest.approx(0.6455)
    assert float(found[*place, "SNCA", "", "0", "2", "map20_hits"]["paper_value"]) == pytest.approx(0.6892)
    assert found[*place, "SNCA", "", "0", "2", "map20_total"]["paper_value"] == ""
    assert found[*place, "NTDNE", "k=auto", "0", "2", "knn"]["paper_value"] == ""


@pytest.mark.parametrize("full", ["report.html", "tables.md", "results.csv", ".png"])
def test_a_full_disk_leaves_no_part_of_a_file_and_what_was_there(tmp_path, monkeypatch, full):
    write_run(tmp_path / "runs")
    output = tmp_path / "report"
    output.mkdir()
    for name in ("report.html", "tables.md", "results.csv"):
        (output / name).write_text("earlier")

    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    def writing(path: Path, write: Callable[[BinaryIO], Any]) -> None:
        write_whole(path, fill if path.name.endswith(full) else write)

    monkeypatch.setattr(made, "write_whole", writing)
    monkeypatch.setattr(made, "FIGURE_KINDS", [kind for kind in made.FIGURE_KINDS if kind.slug == made.LEADING])
    with pytest.raises(OSError, match=f"No space left on device: .*{re.escape(full)}"):
        write_report(tmp_path / "runs", output)
    assert (output / "report.html").read_text() == "earlier"  # the page, which holds all, is the last one
    assert not list(output.glob("*.partial"))
    assert full == ".png" or (output / full).read_text() == "earlier"


def test_markdown_has_the_tables_with_the_best_in_bold(grid, report):
    output, _ = report
    text = (output / "tables.md").read_text(encoding="utf-8")
    section = text.split("## K-NN accuracy (%)")[1].split("\n## ")[0]
    header, rule, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert header.startswith("| dataset | noise | rate η | whose | SNCA | NTDNE |")
    assert rule.count("|") == header.count("|")
    first = {run.name: run.metrics["knn"] for run in read_runs(grid) if run.cell == ("AID", "uniform", 0.1)}
    best = max(first, key=first.__getitem__)
    shown = [f"**{100 * knn:.1f}**" if name == best else f"{100 * knn:.1f}" for name, knn in first.items()]
    assert rows[0].startswith(f"| AID | uniform | 0.1 | ours | {' | '.join(shown)} | –")
    assert rows[1].startswith("|  |  |  | paper (other settings) | 90.65 | 93.40 |")


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers what the tests ask for."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_all_and_needs_nothing_else(report):
    output, files = report
    text = (output / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == 2 + 10
    assert not {"script", "link", "iframe"} & set(names)
    assert "url(" not in text
    assert "@import" not in text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in images if source]
    assert embedded == [path.read_bytes() for path in files if path.suffix == ".png"]
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert anchors == {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert "epochs 2 (paper: 100)" in page.words
    assert "AID, uniform, 0.1: NTDNE k=auto, NTDNE k=none" in page.words


def test_names_are_escaped(tmp_path):
    dataset = "<script>alert('x')</script> a|b"
    folder = write_run(tmp_path / "runs", dataset=dataset, variant="<i>", settings={"classes": ["<b>"]})
    (folder / "figures.npz").unlink()
    write_report(tmp_path / "runs", tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "i", "b"} & {tag for tag, _ in page.tags}
    assert dataset in page.words
    assert "classes <b>" in page.words
    markdown = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "<" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert sum(r"a\|b" in row for row in rows) == sum("a|b" in row.replace("\\", "") for row in rows) > 0


def test_figures_are_files_with_something_in_them(report):
    output, files = report
    assert [path.name for path in files[:3]] == ["report.html", "tables.md", "results.csv"]
    assert sorted(output.iterdir()) == sorted(files)
    assert [path.name for path in files[3:]] == [
        "knn-AID-uniform.png",
        "pr-AID-uniform.png",
        "pr-digits-none.png",
        "k-AID-uniform.png",
        "training-AID-uniform.png",
        "training-digits-none.png",
        "scores-AID-uniform.png",
        "scores-digits-none.png",
        "maps-AID-uniform.png",
        "maps-digits-none.png",
        "before-after-digits-none.png",
        "retrieval-AID-uniform-0.1.png",
        "retrieval-AID-uniform-0.5.png",
        "retrieval-digits-none.png",
    ]
    for path in files[3:]:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors() or []) > 20


def test_a_run_with_the_least_there_can_be_is_reported(tmp_path):
    folder = write_run(tmp_path / "runs", metrics={"knn": 0.5}, dataset="mine")
    (folder / "figures.npz").unlink()
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"], results["versions"]
    (folder / "results.json").write_text(json.dumps(results | {"history": []}))
    files = write_report(tmp_path / "runs", tmp_path / "out")
    assert [path.name for path in files] == ["report.html", "tables.md", "results.csv"]
    assert "50.0" in Page(files[0].read_text(encoding="utf-8")).words


# Errors


def test_no_finished_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"^runs: no results.json in .*missing"):
        write_report(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_run_is_named(tmp_path):
    write_run(tmp_path, "NSL")
    path = write_run(tmp_path, "SNCA") / "results.json"
    good = json.loads(path.read_text())
    broken = {
        "cannot be read": "{",
        "expected the results of a run": "[]",
        "expected metrics of type dict": json.dumps(good | {"metrics": None}),
        "expected rate of type number": json.dumps(good | {"rate": "0.5"}),
        "expected a number as knn in metrics": json.dumps(good | {"metrics": {"knn": "high"}}),
        "expected flipped in counts": json.dumps(good | {"counts": {"train": 1, "validation": 1, "test": 1}}),
        "expected an epoch in each row of history": json.dumps(good | {"history": [{"loss": 1}]}),
        "is trained for 1 of its 2 epochs": json.dumps(good | {"history": good["history"][:1]}),
        "expected noise to be one of": json.dumps(good | {"noise": "loud"}),
    }
    for message, text in broken.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            write_report(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 half of one"])
def test_broken_arrays_are_named(tmp_path, content):
    path = write_run(tmp_path) / "figures.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read"):
        write_report(tmp_path, tmp_path / "out")


def test_the_same_run_twice_is_refused(tmp_path):
    folders = [write_run(tmp_path / copy) for copy in ("a", "b")]
    with pytest.raises(ValueError, match=f"{re.escape(str(folders[0]))} and {re.escape(str(folders[1]))}"):
        read_runs(tmp_path)
