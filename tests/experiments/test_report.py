"""The report, from made-up runs: its numbers are those of the runs and of the paper, and its figures show them."""

import base64
import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ntdne_kernels.experiments import figures
from ntdne_kernels.experiments.finished import Run, read_runs
from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.report import write_report
from ntdne_kernels.experiments.settings import read_preset
from ntdne_kernels.experiments.tables import METRICS, Table, metric_table, missing_cells, run_table, unlike_the_paper

CLASSES = ["Airport", "Beach", "$Café_1$"]
PAPER = read_preset("paper")
RECIPE = {"weights": "imagenet"} | {name: value for name, value in PAPER.items() if name != "losses"}
NBSP = "\N{NO-BREAK SPACE}"


def write_run(
    root: Path,
    loss: str = "NTDNE",
    rate: float = 0.5,
    *,
    variant: str = "",
    noise: str = "uniform",
    seed: int = 0,
    dataset: str = "AID",
    metrics: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
    D: int = 8,
) -> Path:
    """Write the files of a run whose numbers are random but plausible; those given replace them."""
    random = np.random.default_rng([seed, len(loss), len(variant), round(10 * rate)])
    folder = root / f"{dataset} {noise} {rate}".replace("/", "") / f"{loss} {variant}" / f"seed-{seed}"
    folder.mkdir(parents=True)
    epochs = (settings or {}).get("epochs", 2)
    names = ("knn", "knn_given", "knn_distance", "knn_softmax", "nmi", "acc")
    names += ("map20_total", "map20_hits", "map20_min", "flip_auroc")
    history: list[dict[str, float]] = [
        {"epoch": epoch, "loss": 1.0, "lr": 0.1, "val_knn": 0.2 + 0.1 * epoch, "val_knn_given": 0.1}
        for epoch in range(epochs)
    ]
    if loss.startswith("NTDNE"):
        for row in history:
            row |= {"p10": 0.1, "p25": 0.2, "p50": 0.4, "p75": 0.5, "p90": 0.7, "threshold": 0.3, "pruned_share": 0.25}
    N, M = 40, 12
    flipped = random.random(N) < rate
    flipped[:2] = False, True
    results = {
        "settings": {"epochs": epochs, "image_size": 64, "seed": seed, "noise": noise, "rate": rate, "loss": loss}
        | {"loss_options": {}}
        | (settings or {}),
        "dataset": dataset,
        "loss": loss,
        "variant": variant,
        "noise": noise,
        "rate": rate,
        "seed": seed,
        "epochs": epochs,
        "classes": CLASSES,
        "counts": {"train": N, "validation": 6, "test": M, "flipped": int(flipped.sum()), "skipped": 0},
        "metrics": dict(zip(names, random.random(len(names)), strict=True)) if metrics is None else metrics,
        "history": history,
        "seconds": 61.0,
        "versions": {"torch": "2.14.1"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    labels = np.arange(M) % len(CLASSES)
    np.savez(
        folder / "figures.npz",
        **{
            "test_features": random.normal(size=(M, D)).astype(np.float32),
            "test_labels": labels,
            "scores": random.random(N).astype(np.float32),
            "flipped": flipped,
            "pr_recall": np.linspace(0, 1, 101),
            "pr_precision": np.linspace(1, random.random(), 101),
            "retrieval_images": random.integers(256, size=(4, 6, 8, 8, 3), dtype=np.uint8),
            "retrieval_labels": random.integers(len(CLASSES), size=(4, 6)),
        }
        | (arrays or {}),
    )
    return folder


def table_of(key: str, runs: list[Run]) -> Table:
    table = metric_table(next(metric for metric in METRICS if metric.key == key), runs)
    assert table is not None
    return table


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.header, table.rows[row].cells, strict=True))


def bold(table: Table, row: int) -> set[str]:
    return {table.header[place] for place in table.rows[row].best}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two losses × two rates, a sweep of k at one of them, and a Siamese run of D = 2."""
    root = tmp_path_factory.mktemp("runs")
    for rate in (0.1, 0.5):
        write_run(root, "SNCA", rate)
        write_run(root, "NTDNE", rate, settings={"loss_options": {"k": 0.3}})
    for k in ("0.1", "0.2", "0.4", "auto", "none"):
        write_run(root, "NTDNE", 0.5, variant=f"k={k}")
    write_run(
        root, "Contrastive", 0.5, noise="none", dataset="digits", D=2, arrays={"untrained_features": np.eye(12, 2)}
    )
    return root


@pytest.fixture(scope="module")
def report(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    output = tmp_path_factory.mktemp("report") / "of" / "runs"
    return output, write_report(grid, output)


# Tables


def test_each_metric_has_a_table_of_the_runs_numbers_in_percent(grid):
    runs = read_runs(grid)
    places = {("AID", "uniform", 0.1): "0.1", ("AID", "uniform", 0.5): "0.5", ("digits", "none", 0.0): ""}
    for metric in METRICS[:10]:
        table = table_of(metric.key, runs)
        rows = [row.cells for row in table.rows if not row.paper]
        assert [row[:4] for row in rows] == [[*cell[:2], rate, "ours"] for cell, rate in places.items()]
        for cell, row in zip(places, rows, strict=True):
            values = {run.name: run.metrics[metric.key] for run in runs if run.cell == cell}
            for name, shown in zip(table.header[4:], row[4:], strict=True):
                assert shown == (f"{100 * values[name]:.{metric.decimals}f}" if name in values else "–")


def test_columns_are_the_papers_losses_in_its_order_then_variants_and_others(tmp_path):
    for loss in ("Contrastive", *reversed(METHODS)):
        write_run(tmp_path, loss)
    write_run(tmp_path, "SNCA", variant="sigma=0.2")
    write_run(tmp_path, "NTDNE", variant="k=auto")
    header = table_of("knn", read_runs(tmp_path)).header
    assert header[4:] == [*METHODS, "SNCA sigma=0.2", "NTDNE k=auto", "Contrastive"]


def test_rows_go_by_dataset_noise_and_rate(tmp_path):
    places = [
        ("AID", "none", 0.5, ""),
        ("AID", "uniform", 0.1, "0.1"),
        ("AID", "uniform", 0.7, "0.7"),
        ("AID", "label-dependent", 0.3, "0.3"),
        ("AID", "matrix", 0.5, ""),
        ("digits", "uniform", 0.5, "0.5"),
    ]
    for dataset, noise, rate, _ in reversed(places):
        write_run(tmp_path, dataset=dataset, noise=noise, rate=rate)
    rows = [row.cells[:3] for row in table_of("knn_given", read_runs(tmp_path)).rows]
    assert rows == [[dataset, noise, shown] for dataset, noise, _, shown in places]


def test_seeds_are_averaged_with_their_deviation_and_number(tmp_path):
    values = [0.5, 0.61, 0.57]
    for seed, value in enumerate(values):
        write_run(tmp_path, seed=seed, metrics={"knn": value})
    mean, spread = 100 * sum(values) / 3, 100 * statistics.stdev(values)
    cell = cells(table_of("knn", read_runs(tmp_path)), 0)["NTDNE"]
    assert cell.replace(NBSP, " ") == f"{mean:.1f} ± {spread:.1f} (n = 3)" == "56.0 ± 5.6 (n = 3)"


def test_the_best_of_ours_is_bold_also_if_the_paper_is_better_and_equal_ones_both(tmp_path):
    for loss, rate, knn in (("NSL", 0.1, 0.5), ("SNCA", 0.1, 0.6), ("NSL", 0.5, 0.4), ("SNCA", 0.5, 0.39999)):
        write_run(tmp_path, loss, rate, metrics={"knn": knn})
    table = table_of("knn", read_runs(tmp_path))
    assert [row.paper for row in table.rows] == [False, True, False, True]
    assert [bold(table, row) for row in range(4)] == [{"SNCA"}, set(), {"NSL", "SNCA"}, set()]


def test_the_papers_numbers_stand_below_ours(tmp_path):
    for loss in ("SNCA", "NTDNE", "Contrastive"):
        write_run(tmp_path, loss)
    runs = read_runs(tmp_path)
    theirs = cells(table_of("knn", runs), 1)
    assert (theirs["SNCA"], theirs["NTDNE"], theirs["Contrastive"]) == ("64.55", "90.25", "")
    assert cells(table_of("nmi", runs), 1)["NTDNE"] == "86.82"
    assert cells(table_of("acc", runs), 1)["NTDNE"] == "89.45"
    for key in ("knn_given", "flip_auroc", "map20_total"):
        assert not any(row.paper for row in table_of(key, runs).rows)


def test_the_papers_map_is_compared_under_a_doubt(tmp_path):
    write_run(tmp_path, "SNCA", settings=RECIPE)
    runs = read_runs(tmp_path)
    for normaliser in ("hits", "min"):
        theirs = cells(table_of(f"map20_{normaliser}", runs), 1)
        assert (theirs["SNCA"], theirs["whose"]) == ("68.92", "paper (convention not stated)")
    assert all("normaliser" in table_of(f"map20_{name}", runs).title for name in ("total", "hits", "min"))


def test_settings_other_than_the_papers_are_told(tmp_path):
    for loss in ("NTDNE", "SNCA"):
        write_run(tmp_path / "same", loss, settings=RECIPE | {"loss_options": PAPER["losses"][loss]})
    runs = read_runs(tmp_path / "same")
    assert cells(table_of("knn", runs), 1)["whose"] == "paper"
    assert unlike_the_paper(runs, {"NTDNE", "SNCA"}) == []

    changes = {"epochs": 3, "weights": "", "loss_options": PAPER["losses"]["NTDNE"] | {"k": "auto"}}
    write_run(tmp_path / "other", "NTDNE", settings=RECIPE | changes)
    write_run(tmp_path / "other", "SNCA", settings=RECIPE | {"epochs": 2})
    runs = read_runs(tmp_path / "other")
    assert cells(table_of("knn", runs), 1)["whose"] == "paper (other settings)"
    assert set(unlike_the_paper(runs, {"NTDNE", "SNCA"})) == {
        "epochs 2 or 3 (paper: 100)",
        "weights none (paper: imagenet)",
        "NTDNE k auto (paper: 0.3)",
    }


def test_of_a_losss_variants_the_one_most_like_the_papers_is_compared(tmp_path):
    for k in (0.1, 0.3, "auto"):
        write_run(tmp_path, variant=f"k={k}", settings={"loss_options": {"k": k}})
    theirs = cells(table_of("knn", read_runs(tmp_path)), 1)
    assert {name: cell for name, cell in theirs.items() if name.startswith("NTDNE")} == {
        "NTDNE k=0.1": "",
        "NTDNE k=0.3": "90.25",
        "NTDNE k=auto": "",
    }


def test_few_shot_accuracy_comes_with_its_interval_or_the_seeds_deviation(tmp_path):
    write_run(tmp_path, "NSL", metrics={"few_shot_5": 0.8123, "few_shot_5_ci": 0.0061})
    for seed, value in enumerate((0.7, 0.8)):
        write_run(tmp_path, "SNCA", seed=seed, metrics={"few_shot_5": value, "few_shot_5_ci": 0.0061})
    row = {
        name: cell.replace(NBSP, " ") for name, cell in cells(table_of("few_shot_5", read_runs(tmp_path)), 0).items()
    }
    assert (row["NSL"], row["SNCA"]) == ("81.2 ± 0.6", "75.0 ± 7.1 (n = 2)")


def test_runs_of_one_cell_with_other_settings_are_columns_of_their_own(tmp_path):
    for epochs in (2, 3):
        write_run(tmp_path / str(epochs), settings={"epochs": epochs}, metrics={"nmi": epochs / 10}, dataset="mine")
    write_run(tmp_path, rate=0.1, settings={"epochs": 3}, metrics={"nmi": 0.9}, dataset="mine")
    table = table_of("nmi", read_runs(tmp_path))
    assert table.header[4:] == ["NTDNE epochs=2", "NTDNE epochs=3"]
    assert [row.cells[4:] for row in table.rows] == [["–", "90.0"], ["20.0", "30.0"]]


def test_options_of_the_loss_also_set_runs_apart(tmp_path):
    for sigma in (0.1, 0.05):
        write_run(tmp_path / str(sigma), settings={"loss_options": {"sigma": sigma}})
    assert [run.name for run in read_runs(tmp_path)] == ["NTDNE loss sigma=0.05", "NTDNE loss sigma=0.1"]


def test_the_table_of_runs_has_the_settings_that_differ_and_no_others(tmp_path):
    write_run(tmp_path, "NSL", settings={"lr": 0.1, "batch_size": 8})
    write_run(tmp_path, "SNCA", settings={"lr": 0.2, "batch_size": 8, "loss_options": {"sigma": 0.1}})
    table = run_table(read_runs(tmp_path))
    assert "batch_size" not in table.header
    shown = [(cells(table, row)["loss"], cells(table, row)["lr"]) for row in range(2)]
    assert shown == [("NSL", "0.1"), ("SNCA", "0.2")]
    assert cells(table, 1)["options of the loss"] == "sigma=0.1"


def test_missing_cells_are_told_by_dataset_and_sweeps_of_k_are_not_missed(grid):
    assert missing_cells(read_runs(grid)) == [
        "AID, uniform, 0.1: NTDNE k=auto, NTDNE k=none",
        "everywhere, of the paper's losses: D-CNN, Triplet, NSL, ArcFace, MAE, SCE, t-RNSL",
    ]


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


# Figures


def drawn(draw: Any, runs: list[Run]) -> Figure:
    figure = draw(runs, figures.line_styles(runs))
    assert figure is not None
    return figure


def labelled(axis: Any) -> dict[str, Any]:
    return {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}


def points(axis: Any) -> np.ndarray:
    return np.concatenate([np.asarray(cloud.get_offsets()) for cloud in axis.collections])


def test_knn_by_rate_shows_means_and_deviations_and_the_papers_curves(tmp_path):
    for rate, seeds in ((0.1, (0.8, 0.9)), (0.3, (0.6,))):
        for seed, knn in enumerate(seeds):
            write_run(tmp_path, "SNCA", rate, seed=seed, metrics={"knn": knn})
    ours, theirs = drawn(figures.knn_by_rate, read_runs(tmp_path)).axes
    (line, _, (bars,)) = labelled(ours)["SNCA"]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 85], [0.3, 60]])
    spread = 100 * statistics.stdev([0.8, 0.9])
    np.testing.assert_allclose([np.ptp(each[:, 1]) for each in bars.get_segments()], [2 * spread, 0], atol=1e-9)
    assert set(labelled(theirs)) == set(METHODS)
    np.testing.assert_allclose(labelled(theirs)["SNCA"].get_xydata(), [[0.1, 90.65], [0.3, 82.70]])


def test_a_loss_has_one_colour_in_all_figures_and_variants_other_lines(tmp_path):
    losses = [*METHODS, "NTDNE-broadcast"]
    for loss in losses:
        for rate in (0.1, 0.3):
            write_run(tmp_path, loss, rate)
    write_run(tmp_path, "NTDNE", 0.3, variant="k=auto")
    runs = read_runs(tmp_path)
    expected = {loss: colour.lower() for loss, colour in figures.COLOURS.items()}
    assert len(set(expected.values())) == len(losses)
    for draw in (figures.precision_recall, figures.training_curves):
        lines = labelled(drawn(draw, runs).axes[1])
        colours = {name: matplotlib.colors.to_hex(line.get_color()) for name, line in lines.items()}
        assert colours == expected | {"NTDNE k=auto": expected["NTDNE"]}
        assert lines["NTDNE"].get_linestyle() != lines["NTDNE k=auto"].get_linestyle()


def test_precision_is_the_mean_over_seeds(tmp_path):
    for seed, height in enumerate((0.2, 0.6)):
        write_run(tmp_path, seed=seed, arrays={"pr_precision": np.full(101, height)})
    line = labelled(drawn(figures.precision_recall, read_runs(tmp_path)).axes[0])["NTDNE"]
    np.testing.assert_allclose(line.get_ydata(), 0.4)


def test_sensitivity_to_k_has_numbers_on_the_axis_and_words_as_lines(tmp_path):
    for variant, seed, knn in (
        ("k=0.1", 0, 0.4),
        ("k=0.1", 1, 0.6),
        ("k=0.5", 0, 0.3),
        ("k=auto", 0, 0.8),
        ("k=none", 0, 0.2),
    ):
        write_run(tmp_path, variant=variant, seed=seed, metrics={"knn": knn})
    write_run(tmp_path, metrics={"knn": 0.7}, settings={"loss_options": {"k": 0.3}})
    write_run(tmp_path, variant="k=0.3, q=0.5", metrics={"knn": 0.1})
    (axis,) = drawn(figures.sensitivity_to_k, read_runs(tmp_path)).axes
    lines = labelled(axis)
    np.testing.assert_allclose(lines["NTDNE, k a number"].get_xydata(), [[0.1, 50], [0.3, 70], [0.5, 30]])
    np.testing.assert_allclose(lines["NTDNE, k = auto"].get_ydata(), 80)
    np.testing.assert_allclose(lines["NTDNE, k = none (never pruned)"].get_ydata(), 20)
    assert len(lines) == 3


def test_a_sweep_over_k_is_drawn_in_its_own_figure_alone(grid):
    runs = [run for run in read_runs(grid) if run.dataset == "AID"]
    for draw in (figures.precision_recall, figures.training_curves):
        assert set(labelled(drawn(draw, runs).axes[1])) == {"SNCA", "NTDNE", "NTDNE k=auto", "NTDNE k=none"}


def test_training_curves_are_the_history_in_percent_by_epochs_from_1(tmp_path):
    write_run(tmp_path, "NTDNE", settings={"epochs": 3})
    write_run(tmp_path, "NSL", settings={"epochs": 1})
    accuracy, pruned, score = drawn(figures.training_curves, read_runs(tmp_path)).axes
    np.testing.assert_allclose(labelled(accuracy)["NTDNE"].get_xydata(), [[1, 20], [2, 30], [3, 40]])
    assert labelled(accuracy)["NSL"].get_marker() == "o"  # a line of one point would not be seen
    np.testing.assert_allclose(labelled(pruned)["NTDNE"].get_ydata(), 25)
    np.testing.assert_allclose(labelled(score)["NTDNE"].get_ydata(), 40)
    assert set(labelled(pruned)) == set(labelled(score)) == {"NTDNE"}


def test_histograms_are_shares_of_right_and_of_wrong_labels(tmp_path):
    scores = np.array([0.99, 0.99, 0.99, 0.5, 0.01, 0.5])
    flipped = np.array([False, False, False, False, True, True])
    write_run(tmp_path, arrays={"scores": scores, "flipped": flipped})
    (axis,) = drawn(figures.score_histograms, read_runs(tmp_path)).axes
    right, wrong = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert {place: height for place, height in enumerate(right) if height} == {12: 25, 24: 75}
    assert {place: height for place, height in enumerate(wrong) if height} == {0: 50, 12: 50}


def test_maps_have_a_panel_for_each_loss_and_rate_and_say_what_was_not_run(tmp_path):
    for loss, rate in (("NSL", 0.1), ("NSL", 0.3), ("SNCA", 0.3)):
        write_run(tmp_path, loss, rate)
    axes = drawn(figures.feature_maps, read_runs(tmp_path)).axes
    assert [[text.get_text() for text in axis.texts] for axis in axes] == [[], [], ["not run"], []]
    assert [len(points(axis)) for axis in axes if axis.collections] == [12, 12, 12]
    assert [axis.get_ylabel() for axis in axes] == ["NSL", "", "SNCA", ""]


def test_maps_repeat_and_keep_clusters_together(tmp_path):
    labels = np.repeat([0, 1], 10)
    features = np.eye(8)[labels] + np.random.default_rng(0).normal(scale=0.05, size=(20, 8))
    write_run(tmp_path, arrays={"test_features": features.astype(np.float32), "test_labels": labels})
    first, again = (drawn(figures.feature_maps, read_runs(tmp_path)).axes[0] for _ in range(2))
    np.testing.assert_array_equal(points(first), points(again))
    a, b = (np.asarray(cloud.get_offsets()) for cloud in first.collections)
    spread = max(np.linalg.norm(each - each.mean(0), axis=1).max() for each in (a, b))
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * spread


@pytest.mark.parametrize(
    "features",
    [np.arange(24.0).reshape(12, 2), np.arange(12.0)[:, None], np.ones((12, 8))],
    ids=["two numbers", "one number", "all the same"],
)
def test_features_that_t_sne_has_no_use_for_are_shown_as_they_are(tmp_path, features):
    write_run(tmp_path, arrays={"test_features": features, "test_labels": np.zeros(12, int)})
    shown = points(drawn(figures.feature_maps, read_runs(tmp_path)).axes[0])
    np.testing.assert_array_equal(shown[:, : features.shape[1]], features[:, :2])


@pytest.mark.parametrize("M", [2, 3, 5])
def test_maps_of_few_points_are_drawn(tmp_path, M):
    arrays = {"test_features": np.eye(M, 8, dtype=np.float32), "test_labels": np.arange(M) % 3}
    write_run(tmp_path, arrays=arrays)
    assert np.isfinite(points(drawn(figures.feature_maps, read_runs(tmp_path)).axes[0])).all()


def test_many_points_are_thinned_over_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "POINTS", 6)
    labels = np.repeat([0, 1, 2], 10)
    write_run(tmp_path, arrays={"test_features": np.eye(30, 2), "test_labels": labels})
    (axis,) = drawn(figures.feature_maps, read_runs(tmp_path)).axes
    assert [len(cloud.get_offsets()) for cloud in axis.collections] == [2, 2, 2]


def test_before_and_after_stand_side_by_side(tmp_path):
    before, after, labels = np.full((4, 2), 1.0), np.full((4, 2), 5.0), np.array([0, 0, 1, 1])
    arrays = {"untrained_features": before, "test_features": after, "test_labels": labels}
    write_run(tmp_path, "Contrastive", noise="none", arrays=arrays)
    write_run(tmp_path, "NSL", noise="none")
    left, right = drawn(figures.before_and_after, read_runs(tmp_path)).axes
    assert (left.get_title(), right.get_title()) == ("Contrastive: before training", "Contrastive: after training")
    np.testing.assert_array_equal(points(left), before)
    np.testing.assert_array_equal(points(right), after)
    assert list(labelled(left)) == CLASSES[:2]


def test_retrieved_images_are_framed_by_whether_they_are_right(tmp_path):
    labels = np.array([[0, 0, 1, 0, 2, 0], [1, 1, 1, 1, 1, 0]])
    images = np.random.default_rng(0).integers(256, size=(2, 6, 8, 8, 3), dtype=np.uint8)
    write_run(tmp_path, arrays={"retrieval_images": images, "retrieval_labels": labels})
    axes = drawn(figures.retrieval_sheet, read_runs(tmp_path)).axes
    for place, axis in enumerate(axes):
        row, column = divmod(place, 6)
        np.testing.assert_array_equal(axis.images[0].get_array(), images[row, column])
        sign, colour = ("✓", figures.RIGHT) if labels[row, column] == labels[row, 0] else ("✗", figures.WRONG)
        if column == 0:
            sign, colour = "query:", figures.QUERY
        assert axis.get_xlabel() == f"{sign} {CLASSES[labels[row, column]]}"
        assert matplotlib.colors.to_hex(axis.spines["top"].get_edgecolor()) == colour.lower()
    assert len(axes) == 12


def test_the_sheet_shows_the_papers_three_losses_and_few_others(tmp_path):
    for loss in METHODS:
        write_run(tmp_path, loss)
    axes = drawn(figures.retrieval_sheet, read_runs(tmp_path)).axes
    assert [axis.get_ylabel() for axis in axes[: 4 * 6 : 6]] == ["D-CNN", "SNCA", "t-RNSL", "NTDNE"]


def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    write_run(tmp_path / "runs", dataset="a $\\frac$ b")
    assert len(write_report(tmp_path / "runs", tmp_path / "out")) > 3
