"""A report of finished runs: tables and figures beside the paper's numbers, and one page that holds all."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
from tqdm import tqdm

from ntdne_kernels.experiments.features import as_utf8
from ntdne_kernels.experiments.figures import FIGURE_KINDS, line_styles
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.finished import NOISES, Run, as_text, grouped, read_runs, row_labels
from ntdne_kernels.experiments.page import render
from ntdne_kernels.experiments.paper import published
from ntdne_kernels.experiments.tables import (
    METRICS,
    beside_the_paper,
    common_settings,
    data_table,
    differences_from_paper,
    metric_table,
    missing_cells,
    run_table,
)

GUIDE = (
    "All values are in percent, and higher is better. In bold: the best of ours in a row. Of several seeds: mean ± "
    "standard deviation, with their number n. –: not run, or not measured."
)
GUIDE_TO_PAPER = (
    'Rows "paper" hold the numbers that the paper prints. Those marked "other settings" are not like with like: they '
    "show the order of the losses, not a level to be met. What the paper leaves open, as first weights and momentum, "
    "is taken from its authors' code. Where ours differ:"
)
DPI = 110
LEADING = "scores"  # slug of the figure that the report of a single run begins with


def write_report(root: Path, output: Path) -> list[Path]:
    """Write tables, figures and one page of all finished runs in a folder.

    Args:
        root: folder with runs at any depth, each with results.json and, for its figures, figures.npz.
        output: folder that gets report.html (which holds all), tables.md, results.csv (a row for each run and metric,
            values as shares of 1) and a PNG of each figure. Files of those names are replaced.

    Returns:
        The files, the page first.

    Raises:
        ValueError: there is no finished run, or a file of one is broken.
    """
    runs = read_runs(root)
    output.mkdir(parents=True, exist_ok=True)
    page, tables, values = (output / name for name in ("report.html", "tables.md", "results.csv"))
    sections, pictures = _draw(runs, output)
    if len(runs) == 1:
        sections.sort(key=lambda section: section["figure"].slug != LEADING)
    content = {
        "runs": runs,
        "guide": GUIDE,
        "guide_to_paper": GUIDE_TO_PAPER,
        "differences": differences_from_paper(runs, beside_the_paper(runs)),
        "metrics": [table for metric in METRICS if (table := metric_table(metric, runs))],
        "missing": missing_cells(runs),
        "data": data_table(runs),
        "noises": {noise: NOISES[noise] for noise in dict.fromkeys(run.noise for run in runs)},
        "table_of_runs": run_table(runs),
        "settings": common_settings(runs),
        "versions": sorted({f"made with {as_text(run.versions)}" for run in runs if run.versions}),
        "sections": sections,
    }
    _write(as_utf8(render("tables.md", content)).encode(), tables)
    _write(_values(runs).encode(), values)
    _write(as_utf8(render("report.html", content)).encode(), page)
    return [page, tables, values, *pictures]


def _draw(runs: list[Run], output: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Draw all figures into files; returns what the page shows of them, kind by kind, and the files."""
    styles = line_styles(runs)
    sections: list[dict[str, Any]] = []
    paths: list[Path] = []
    for kind in tqdm(FIGURE_KINDS, "Drawing", unit="figure", disable=None):
        pictures = []
        for where, same in _by_dataset_and_noise(runs, parts=3 if kind.one_rate else 2).items():
            with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a name may hold a $
                figure = kind.draw(same, styles)
                if figure is None:
                    continue
                path = output / f"{_file_name('-'.join([kind.slug, *where]))}.png"
                drawn = io.BytesIO()
                figure.savefig(drawn, dpi=DPI)
            _write(drawn.getvalue(), path)
            data = base64.b64encode(drawn.getvalue()).decode()
            pictures.append({"data": data, "name": ", ".join(where), "file": path.name})
            paths.append(path)
        if pictures:
            sections.append({"figure": kind, "pictures": pictures})
    return sections, paths


def _by_dataset_and_noise(runs: list[Run], parts: int) -> dict[tuple[str, ...], list[Run]]:
    """The runs by the first two or three of dataset, noise and rate."""
    return grouped(runs, lambda run: tuple(filter(None, row_labels(run.cell)[:parts])))


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)


def _write(content: bytes, path: Path) -> None:
    write_whole(path, lambda file: file.write(content))


def _values(runs: list[Run]) -> str:
    """A CSV with a row for each run and metric."""
    paper = {metric.key: metric.paper for metric in METRICS}
    compared = beside_the_paper(runs)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["dataset", "noise", "rate", "loss", "variant", "seed", "epochs", "metric", "value", "paper_value"])
    for run in runs:
        variant = ", ".join(filter(None, [run.variant, run.distinction]))
        for key, value in run.metrics.items():
            theirs = published(paper.get(key, ""), *run.cell, run.loss) if run.name in compared else None
            writer.writerow([*row_labels(run.cell), run.loss, variant, run.seed, run.epochs, key, value, theirs])
    return text.getvalue()
