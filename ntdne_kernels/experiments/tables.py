"""The report's tables: our numbers, and the paper's where it has some."""

from collections.abc import Callable
from statistics import mean, stdev
from typing import NamedTuple

from ntdne_kernels.experiments.finished import (
    Run,
    as_text,
    columns,
    differing,
    flat_settings,
    grouped,
    loss_settings,
    row_labels,
    without_sweeps,
)
from ntdne_kernels.experiments.paper import METHODS, published
from ntdne_kernels.experiments.settings import read_preset


class Row(NamedTuple):
    """A row of a table; `best` are the columns in bold."""

    cells: list[str]
    best: frozenset[int] = frozenset()
    paper: bool = False


class Table(NamedTuple):
    """A table of text, ready for a template."""

    title: str
    caption: str
    header: list[str]
    rows: list[Row]
    text_columns: int
    """How many of the first columns hold text rather than numbers."""


class Metric(NamedTuple):
    """A metric of results.json, and how the report explains it."""

    key: str
    title: str
    caption: str
    paper: str = ""
    """As `paper.published` calls it."""
    doubt: str = ""
    """Why the paper's number may not be comparable."""
    decimals: int = 1


KNN = "Share of the test images whose class is the commonest among their 10 nearest training images, by "
AP = (
    "Each test image retrieves its 20 nearest training images. Its average precision is the sum, over those of its "
    "class, of the precision up to there, divided by "
)
NO_NORMALISER = " The paper's Table IV does not say what it divides by."
NBSP = "\N{NO-BREAK SPACE}"
GUESSING = " 50 is guessing."

METRICS = (
    Metric("knn", "K-NN accuracy", KNN + "the true labels of these. (The paper's Table I.)", "knn"),
    Metric(
        "knn_given",
        "K-NN accuracy by given labels",
        KNN + "the labels that these were given, wrong ones included: what one gets without clean labels.",
    ),
    *(
        Metric(
            f"knn_{weights}",
            f"K-NN accuracy, {weights} weights",
            f"As K-NN accuracy by true labels, but a neighbour's vote counts {weight}.",
        )
        for weights, weight in (
            ("distance", "1/distance, as in the authors' code"),
            ("softmax", "exp(cosine/0.1)"),
        )
    ),
    Metric(
        "nmi",
        "NMI of clusters",
        "Normalised mutual information (eq. 16) of the test images' true classes and k-means clusters of their "
        "features, as many as there are classes. (The paper's Table II.)",
        "nmi",
    ),
    Metric(
        "acc",
        "ACC of clusters",
        "Share of the test images in the right one of these clusters (eq. 17), with clusters matched to classes as "
        "well as can be. (The paper's Table III.)",
        "acc",
    ),
    Metric(
        "map20_total",
        "MAP@20, normaliser total",
        AP + "the number Q of all training images of its class: eq. 18 as printed. It is at most 20/Q.",
        decimals=2,
    ),
    Metric(
        "map20_hits",
        "MAP@20, normaliser hits",
        AP + "the number of these." + NO_NORMALISER,
        "map20",
        "convention not stated",
    ),
    Metric(
        "map20_min",
        "MAP@20, normaliser min",
        AP + "the number of all training images of its class, at most 20." + NO_NORMALISER,
        "map20",
        "convention not stated",
    ),
    Metric(
        "flip_auroc",
        "Finding wrong labels",
        "AUROC of low leave-one-out scores p (eq. 4) of the given labels: the chance that of a wrong and a right "
        "training label the wrong one scores lower." + GUESSING,
    ),
    *(
        Metric(
            f"few_shot_{shots}",
            f"Few-shot accuracy, {examples} of each class",
            f"Images of classes that were kept out of training, five classes at a time, named after {examples} of "
            "each. Of a single run ± is half the width of the 95 % interval of the mean over draws.",
        )
        for shots, examples in ((1, "1 example"), (5, "5 examples"))
    ),
    Metric(
        "unknown_auroc_agreement",
        "Finding unknown classes by agreement",
        "AUROC of low agreement of an image's neighbours on one class, images of classes that were kept out of "
        "training against test images." + GUESSING,
    ),
    Metric(
        "unknown_auroc_similarity",
        "Finding unknown classes by similarity",
        "AUROC of a low mean cosine of an image and its 10 nearest training images, images of classes that were kept "
        "out of training against test images." + GUESSING,
    ),
)


COUNTS: dict[str, Callable[[Run], float]] = {
    "classes": lambda run: len(run.classes),
    "training images": lambda run: run.counts["train"],
    "wrong labels": lambda run: run.counts["flipped"],
    "% wrong": lambda run: round(100 * run.counts["flipped"] / max(run.counts["train"], 1), 1),
    "validation images": lambda run: run.counts["validation"],
    "test images": lambda run: run.counts["test"],
    "unreadable": lambda run: run.counts.get("skipped", 0),
    "epochs": lambda run: run.epochs,
}


def metric_table(metric: Metric, runs: list[Run]) -> Table | None:
    """A metric by dataset, noise and rate, a column for each loss; the paper's numbers below ours.

    None where no run has the metric.
    """
    compared = beside_the_paper(runs)
    runs = [run for run in runs if metric.key in run.metrics]
    losses = columns(runs)
    rows = []
    for cell, in_cell in grouped(runs, lambda run: run.cell).items():
        by_name = grouped(in_cell, lambda run: run.name)
        means = {name: round(_mean(metric, same), metric.decimals) for name, same in by_name.items()}
        best = frozenset(i for i, run in enumerate(losses, start=4) if means.get(run.name) == max(means.values()))
        ours = [_mean_and_spread(metric, by_name[run.name]) if run.name in by_name else "–" for run in losses]
        rows.append(Row([*row_labels(cell), "ours", *ours], best))
        theirs = [published(metric.paper, *cell, run.loss) if run.name in compared else None for run in losses]
        if any(theirs):
            doubts = ["other settings" if differences_from_paper(in_cell, compared) else "", metric.doubt]
            doubt = ", ".join(filter(None, doubts))
            numbers = [f"{100 * share:.2f}" if share else "" for share in theirs]
            rows.append(Row(["", "", "", f"paper ({doubt})" if doubt else "paper", *numbers], paper=True))
    header = ["dataset", "noise", "rate η", "whose", *(run.name for run in losses)]
    return Table(f"{metric.title} (%)", metric.caption, header, rows, text_columns=4) if rows else None


def data_table(runs: list[Run]) -> Table:
    """The images of each row, and how many of their labels were wrong."""
    rows = [
        Row(
            [
                *row_labels(cell),
                *(_range_text([count(run) for run in same]) for count in COUNTS.values()),
                str(len(same)),
            ]
        )
        for cell, same in grouped(runs, lambda run: run.cell).items()
    ]
    caption = "Ranges are over runs: a seed draws its own split and its own wrong labels."
    return Table("Data", caption, ["dataset", "noise", "rate η", *COUNTS, "runs"], rows, text_columns=3)


def run_table(runs: list[Run]) -> Table:
    """All runs, with the settings that are not the same in all."""
    settings = [_general_settings(run) for run in runs]
    names = differing(settings)
    rows = [
        Row(
            [
                *(*row_labels(run.cell), run.name, str(run.seed), as_text(run.options) if run.options else "defaults"),
                *(each.get(name, "–") for name in names),
                f"{run.seconds / 60:.0f}" if run.seconds else "–",
            ]
        )
        for run, each in zip(runs, settings, strict=True)
    ]
    header = ["dataset", "noise", "rate η", "loss", "seed", "options of the loss", *names, "minutes"]
    return Table(
        "Runs", "Each run, with the settings that are not the same in all.", header, rows, text_columns=len(header)
    )


def common_settings(runs: list[Run]) -> str:
    """The settings that are the same in all runs."""
    settings = [_general_settings(run) for run in runs]
    names = differing(settings)
    return "; ".join(f"{name} {value}" for name, value in settings[0].items() if name not in names)


def missing_cells(runs: list[Run]) -> list[str]:
    """The runs that a dataset's grid of losses and noise lacks, a line for each row, and the paper's losses not run."""
    lines = []
    for in_dataset in grouped(without_sweeps(runs), lambda run: run.dataset).values():
        names = [run.name for run in columns(in_dataset)]
        for cell, same in grouped(in_dataset, lambda run: run.cell).items():
            if absent := [name for name in names if name not in {run.name for run in same}]:
                lines.append(f"{', '.join(filter(None, row_labels(cell)))}: {', '.join(absent)}")
    losses = {run.loss for run in runs}
    if never := [method for method in METHODS if method not in losses]:
        lines.append(f"everywhere, of the paper's losses: {', '.join(never)}")
    return lines


def beside_the_paper(runs: list[Run]) -> set[str]:
    """Names of the columns that show the paper's numbers: of each loss the one closest to the paper's recipe."""
    losses = grouped(columns(runs), lambda run: run.loss).values()
    return {min(same, key=lambda run: len(_differences(run))).name for same in losses}


def differences_from_paper(runs: list[Run], compared: set[str]) -> list[str]:
    """How the runs that are compared with the paper differ from its recipe, as "epochs 12 (paper: 100)"."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        if run.name in compared and any(published(metric.paper, *run.cell, run.loss) for metric in METRICS):
            for setting, ours, theirs in _differences(run):
                found.setdefault((setting.replace("loss ", f"{run.loss} "), theirs), {})[ours] = None
    return [f"{setting} {' or '.join(ours)} (paper: {theirs})" for (setting, theirs), ours in found.items()]


def _differences(run: Run) -> list[tuple[str, str, str]]:
    """(setting, ours, the paper's) where a run does not follow the paper's recipe."""
    recipe = read_preset("paper") | {"weights": "imagenet"}  # open in the paper; its authors' code has these
    recipe |= loss_settings(recipe.pop("losses").get(run.loss, {}))
    ours = flat_settings(run)
    theirs = {name: as_text(value) for name, value in recipe.items()}
    return [(name, ours[name], value) for name, value in theirs.items() if ours.get(name, value) != value]


def _mean(metric: Metric, runs: list[Run]) -> float:
    return 100 * mean(run.metrics[metric.key] for run in runs)


def _mean_and_spread(metric: Metric, runs: list[Run]) -> str:
    """Mean ± standard deviation over seeds; for a single run ± its own interval where it has one."""
    value = f"{_mean(metric, runs):.{metric.decimals}f}"
    interval = runs[0].metrics.get(f"{metric.key}_ci")
    if len(runs) > 1:
        spread = 100 * stdev(run.metrics[metric.key] for run in runs)
        return f"{value}{NBSP}±{NBSP}{spread:.{metric.decimals}f} (n{NBSP}={NBSP}{len(runs)})"
    return value if interval is None else f"{value}{NBSP}±{NBSP}{100 * interval:.{metric.decimals}f}"


def _range_text(values: list[float]) -> str:
    return "–".join(dict.fromkeys(f"{end:,}" for end in (min(values), max(values))))


def _general_settings(run: Run) -> dict[str, str]:
    return {name: value for name, value in flat_settings(run).items() if not name.startswith("loss ")}
