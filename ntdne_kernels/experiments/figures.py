"""The report's figures. Each draws runs of one dataset and one noise, with a column of panels for each noise rate.

A loss has one colour in all figures; its variants have other line styles. Of several seeds the first is shown, where a
figure does not say otherwise.

Shapes: N training images, M test images, D features.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ntdne_kernels.experiments.finished import Run, column_key, columns, grouped, without_sweeps
from ntdne_kernels.experiments.paper import METHODS, published
from ntdne_kernels.experiments.settings import RATELESS

POINTS = 600  # of a t-SNE map
BINS = np.linspace(0, 1, 26).tolist()  # of the scores
SHEET_LOSSES = ("SNCA", "t-RNSL", "NTDNE")  # as in the paper's fig. 5
SHEET_ROWS = 4  # losses
SHEET_QUERIES = 3
RIGHT, WRONG, QUERY = "#009E73", "#D55E00", "#777777"  # frames; Okabe and Ito's green and red
COLOURS = {  # Paul Tol's "muted", made for the colour-blind, and black
    "D-CNN": "#999933",
    "Triplet": "#DDCC77",
    "NSL": "#88CCEE",
    "SNCA": "#332288",
    "ArcFace": "#117733",
    "MAE": "#AA4499",
    "SCE": "#CC6677",
    "t-RNSL": "#44AA99",
    "NTDNE": "#000000",
    "NTDNE-broadcast": "#882255",
}
OTHER = "#777777"
MARKERS = dict(zip(METHODS, "o^sDv<>Ph", strict=True))
DASHES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
FEW_CLASSES = ("#332288", "#DDCC77", "#CC6677", "#44AA99", "#882255", "#88CCEE", "#117733", "#AA4499", "#999933")
MANY_CLASSES = [matplotlib.colormaps[name](i) for name in ("tab20", "tab20b", "tab20c") for i in range(20)]

Array = NDArray[Any]
Styles = dict[str, dict[str, Any]]
"""matplotlib's arguments for the lines of each name."""


def line_styles(runs: Iterable[Run]) -> Styles:
    """One style for each name, in its loss's colour."""
    styles: Styles = {}
    for same in grouped(columns(without_sweeps(runs)), lambda run: run.loss).values():
        for i, run in enumerate(same):
            variant = {"linestyle": DASHES[i % len(DASHES)], "markerfacecolor": "white"} if i else {}
            styles[run.name] = _style(run.loss) | variant
    return styles


def knn_by_rate(runs: list[Run], styles: Styles) -> Figure | None:
    """K-NN accuracy over the noise rate, mean and deviation of seeds; beside it the paper's, where there is one."""
    runs = [run for run in without_sweeps(runs) if "knn" in run.metrics]
    rates = _rates(runs)
    if len(rates) < 2:
        return None
    dataset, noise, _ = runs[0].cell
    theirs = {(method, rate): published("knn", dataset, noise, rate, method) for method in METHODS for rate in rates}
    theirs = {curve: 100 * share for curve, share in theirs.items() if share}
    figure, axes = _panels(1, 2 if theirs else 1, 4.6, 4.0, sharey="row")
    for name, same in grouped(runs, lambda run: run.name).items():
        by_rate = {rate: _percent_knn(seeds) for rate, seeds in grouped(same, lambda run: run.rate).items()}
        means = [np.mean(percent) for percent in by_rate.values()]
        spreads = [np.std(percent, ddof=1) if len(percent) > 1 else 0 for percent in by_rate.values()]
        marker = MARKERS.get(same[0].loss, "x")
        axes[0, 0].errorbar(list(by_rate), means, spreads, label=name, marker=marker, capsize=3, **styles[name])
    for method in dict.fromkeys(method for method, _ in theirs):
        curve = [(rate, percent) for (of, rate), percent in theirs.items() if of == method]
        axes[0, 1].plot(*zip(*curve, strict=True), label=method, marker=MARKERS[method], **_style(method))
    for axis, title in zip(axes[0], ("these runs", "the paper, with its own settings"), strict=False):
        axis.set(title=title, xlabel="noise rate η", xticks=rates)
    axes[0, 0].set_ylabel("K-NN accuracy (%)")
    return _finish(figure, axes, runs)


def precision_recall(runs: list[Run], styles: Styles) -> Figure | None:
    """Precision over recall, the mean over seeds."""
    found = _with_arrays(without_sweeps(runs), "pr_recall", "pr_precision")
    if not found:
        return None
    runs = [run for run, *_ in found]
    rates = _rates(runs)
    figure, axes = _panels(1, len(rates), 3.1, 3.2, sharex=True, sharey=True)
    curves: dict[tuple[str, float], list[Array]] = {}
    for run, recall, precision in found:
        curves.setdefault((run.name, run.rate), []).append(np.stack([recall, precision]))
    for (name, rate), seeds in curves.items():
        axes[0, rates.index(rate)].plot(*np.mean(seeds, axis=0), label=name, **styles[name])
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1.01), ylabel="precision")
    for axis in axes[0]:
        axis.set_xlabel("recall")
    _title_rates(axes, runs)
    return _finish(figure, axes, runs)


def sensitivity_to_k(runs: list[Run], styles: Styles) -> Figure | None:
    """K-NN accuracy over the threshold k, the mean over seeds; "auto" and "none" as horizontal lines."""
    runs = [run for run in runs if run.k is not None and "knn" in run.metrics]
    sweeps = {
        (rate, name): by_k
        for (rate, name), same in grouped(runs, lambda run: (run.rate, f"{run.loss} {run.distinction}".strip())).items()
        if len(by_k := grouped(same, lambda run: run.k)) > 1
    }
    if not sweeps:
        return None
    rates = sorted({rate for rate, _ in sweeps})
    figure, axes = _panels(1, len(rates), 3.6, 3.4, sharex=True, sharey=True)
    for (rate, name), by_k in sweeps.items():
        axis, loss = axes[0, rates.index(rate)], next(iter(by_k.values()))[0].loss
        style = _style(loss) | {"marker": MARKERS.get(loss, "x")}
        means = {k: np.mean(_percent_knn(seeds)) for k, seeds in by_k.items()}
        numeric = sorted(k for k in means if isinstance(k, float))
        axis.plot(numeric, [means[k] for k in numeric], label=f"{name}, k a number", **style)
        for word, dash, meaning in (("auto", "--", "k = auto"), ("none", ":", "k = none (never pruned)")):
            if word in means:
                axis.axhline(means[word], label=f"{name}, {meaning}", **_style(loss) | {"linestyle": dash})
        axis.set_xlabel("threshold k")
    numeric = sorted({k for by_k in sweeps.values() for k in by_k if isinstance(k, float)})
    axes[0, 0].set(ylabel="K-NN accuracy (%)", xticks=numeric)
    _title_rates(axes, [run for run in runs if run.rate in rates])
    return _finish(figure, axes, runs)


def training_curves(runs: list[Run], styles: Styles) -> Figure | None:
    """Validation accuracy, pruned share and scores by epoch."""
    runs = _first_seeds(without_sweeps(runs))
    labels = {
        "val_knn": "K-NN accuracy on\nvalidation images (%)",
        "pruned_share": "pruned training\nimages (%)",
        "p50": "score p (%): median\nand middle half",
    }
    labels = {key: label for key, label in labels.items() if any(key in row for run in runs for row in run.history)}
    if not labels:
        return None
    rates = _rates(runs)
    figure, axes = _panels(len(labels), len(rates), 3.1, 2.4, sharex=True, sharey="row")
    for run in runs:
        for axis, key in zip(axes[:, rates.index(run.rate)], labels, strict=True):
            epochs, percent = _curve(run, key)
            if len(epochs):
                axis.plot(epochs, percent, label=run.name, marker="o" if len(epochs) == 1 else "", **styles[run.name])
            if key == "p50":
                (epochs, low), (_, high) = _curve(run, "p25"), _curve(run, "p75")
                axis.fill_between(epochs, low, high, color=styles[run.name]["color"], alpha=0.12, linewidth=0)
    for axis, label in zip(axes[:, 0], labels.values(), strict=True):
        axis.set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("epochs trained")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _title_rates(axes, runs)
    return _finish(figure, axes, runs)


def score_histograms(runs: list[Run], styles: Styles) -> Figure | None:
    """Leave-one-out scores of right and of wrong labels, a row for each loss."""

    def draw(axis: Axes, run: Run, scores: Array, flipped: Array) -> None:
        for chosen, label, colour in ((~flipped, "right labels", "#0072B2"), (flipped, "wrong labels", "#E69F00")):
            share = np.full(chosen.sum(), 100 / max(chosen.sum(), 1))
            axis.hist(scores[chosen], BINS, weights=share, color=colour, alpha=0.6, label=label)
        if "flip_auroc" in run.metrics:
            text = f"AUROC {100 * run.metrics['flip_auroc']:.1f} %"
            axis.text(0.5, 0.85, text, ha="center", fontsize="small", transform=axis.transAxes)
        axis.set_xlim(0, 1)

    return _by_loss_and_rate(
        runs, ("scores", "flipped"), draw, 1.6, "score p of the given label", "% of labels", sharex=True, sharey="row"
    )


def feature_maps(runs: list[Run], styles: Styles) -> Figure | None:
    """Test features in the plane, a row for each loss: by t-SNE, or as they are where D is at most 2."""

    def draw(axis: Axes, run: Run, features: Array, labels: Array) -> None:
        shown = np.linspace(0, len(labels) - 1, min(POINTS, len(labels))).astype(int)  # images come class by class
        _scatter(axis, _in_plane(features[shown]), labels[shown], run.classes, size=5)
        if "knn" in run.metrics:
            axis.set_title(f"K-NN {100 * run.metrics['knn']:.1f} %", fontsize="small", loc="right", pad=2)

    return _by_loss_and_rate(runs, ("test_features", "test_labels"), draw, 2.6)


def before_and_after(runs: list[Run], styles: Styles) -> Figure | None:
    """Test features of D = 2 before and after training, side by side, a row for each run."""
    found = _with_arrays(_first_seeds(runs), "untrained_features", "test_features", "test_labels")
    if not found:
        return None
    figure, axes = _panels(len(found), 2, 4.6, 4.0)
    for row, (run, before, after, labels) in zip(axes, found, strict=True):
        for axis, features, moment in zip(row, (before, after), ("before", "after"), strict=True):
            _scatter(axis, features, labels, run.classes, size=14)
            axis.set_aspect("equal", "datalim")
            axis.set(
                title=f"{run.name}{_rate_text(run, ', ')}: {moment} training", xlabel="feature 1", ylabel="feature 2"
            )
    return _finish(figure, axes, runs)


def retrieval_sheet(runs: list[Run], styles: Styles) -> Figure | None:
    """Queries with their five nearest training images, a row for each of a few losses. From runs of one rate."""
    runs = sorted(_first_seeds(without_sweeps(runs)), key=lambda run: run.loss not in SHEET_LOSSES)[:SHEET_ROWS]
    found = _with_arrays(sorted(runs, key=column_key), "retrieval_images", "retrieval_labels")
    if not found:
        return None
    queries = min(SHEET_QUERIES, *(len(images) for _, images, _ in found))
    shape = (len(found), found[0][1].shape[1])
    figure = Figure(figsize=(1.1 * shape[1], queries * (1.2 * shape[0] + 0.4) + 0.4), layout="constrained")
    for query, part in enumerate(figure.subfigures(queries, 1, squeeze=False)[:, 0]):
        axes = part.subplots(*shape, squeeze=False)
        part.suptitle(f"query {query + 1}", fontsize="medium")
        for row, (run, images, labels) in zip(axes, found, strict=True):
            row[0].set_ylabel(run.name)
            wanted = labels[query, 0]
            for axis, image, label in zip(row, images[query], labels[query], strict=True):
                sign, colour = ("✓", RIGHT) if label == wanted else ("✗", WRONG)
                if axis is row[0]:
                    sign, colour = "query:", QUERY
                axis.imshow(image)
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(f"{sign} {run.classes[label]}", fontsize="x-small", color=colour)
                axis.spines[:].set(color=colour, linewidth=3)
    figure.suptitle(_title(runs) + _rate_text(runs[0], ", "))
    return figure


class FigureKind(NamedTuple):
    """A kind of figure, and how the page explains it."""

    slug: str
    title: str
    caption: str
    draw: Callable[[list[Run], Styles], Figure | None]
    """Draws runs of one dataset and noise, with the styles of all names; None where there is nothing to draw."""
    one_rate: bool = False
    """Whether it draws runs of one rate only."""


FIGURE_KINDS = (
    FigureKind(
        "knn",
        "K-NN accuracy by noise rate",
        "Share of the test images whose class their 10 nearest training images name, over the share of training labels "
        "made wrong. Points are means over seeds, bars their standard deviation. A loss that bears noise stays level.",
        knn_by_rate,
    ),
    FigureKind(
        "pr",
        "Precision and recall",
        "Each test image searches the training images. Recall is the share of the images of its class that are found, "
        "precision the share of those found that are of its class; means over test images and seeds. The higher a "
        "curve lies, the better. (The paper's fig. 4.)",
        precision_recall,
    ),
    FigureKind(
        "k",
        "Sensitivity to the threshold k",
        "Once pruning has begun, images whose score is k or less are not learned from. Means over seeds. Horizontal "
        "lines: a threshold that follows the scores (auto), or none. (The paper's fig. 6.)",
        sensitivity_to_k,
    ),
    FigureKind(
        "training",
        "Training by epoch",
        "From above: K-NN accuracy on validation images by true labels; the share of the training images that are not "
        "learned from, their score being at or below the threshold; the scores p themselves, the share of an image's "
        "neighbourhood that has its given label. Losses without scores have only the first.",
        training_curves,
    ),
    FigureKind(
        "scores",
        "Scores of right and wrong labels",
        "The score p of each training image's given label after training: the share of its neighbourhood, itself left "
        "out, that has the same label. Bars are percent of all right, or of all wrong, labels. The further the wrong "
        "ones lie to the left, the better a low score tells a wrong label; AUROC is the chance that of a wrong and a "
        "right label the wrong one scores lower.",
        score_histograms,
    ),
    FigureKind(
        "maps",
        "Maps of the test features",
        f"Each point is a test image, its colour its true class; at most {POINTS} images. t-SNE lays images of similar "
        "features side by side; its axes have no unit. Features of two numbers are shown as they are. Good features "
        "make islands of one colour. (The paper's fig. 3.)",
        feature_maps,
    ),
    FigureKind(
        "before-after",
        "Features before and after training",
        "The two features of each test image, from the untrained encoder on the left and from the trained one on the "
        "right. Colours are true classes.",
        before_and_after,
    ),
    FigureKind(
        "retrieval",
        "Retrieved images",
        "Test images drawn at random, and the five training images nearest to each, the nearest first. Below each its "
        "true class; ✓ and a green frame: the query's class, ✗ and a red frame: another. (The paper's fig. 5.)",
        retrieval_sheet,
        one_rate=True,
    ),
)


def _style(loss: str) -> dict[str, Any]:
    return {"color": COLOURS.get(loss, OTHER), "linewidth": 2.2 if loss == "NTDNE" else 1.4}


def _percent_knn(runs: list[Run]) -> list[float]:
    return [100 * run.metrics["knn"] for run in runs]


def _rates(runs: Iterable[Run]) -> list[float]:
    return sorted({run.rate for run in runs})


def _rate_text(run: Run, separator: str = "") -> str:
    return "" if run.noise in RATELESS else f"{separator}η = {run.rate:g}"


def _title(runs: list[Run]) -> str:
    dataset, noise, _ = runs[0].cell
    return f"{dataset}, {'no' if noise == 'none' else noise} noise"


def _first_seeds(runs: Iterable[Run]) -> list[Run]:
    return [same[0] for same in grouped(runs, lambda run: (run.name, run.rate)).values()]


def _with_arrays(runs: Iterable[Run], *names: str) -> list[tuple[Any, ...]]:
    """(run, array, ...) of the runs that have all the arrays."""
    found = [(run, *map(run.array, names)) for run in runs]
    return [each for each in found if all(part is not None for part in each)]


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Epochs trained, from 1, and the value after each in percent, where there is one."""
    rows = [row for row in run.history if key in row]
    return [row["epoch"] + 1 for row in rows], [100 * row[key] for row in rows]


def _in_plane(features: Array) -> Array:
    """Points (M, 2) of features (M, D): by t-SNE, or as they are where D is at most 2."""
    M, D = features.shape
    if D <= 2 or not np.ptp(features, axis=0).any():  # t-SNE divides by the spread: equal features crash it
        return np.pad(features[:, :2], ((0, 0), (0, max(2 - D, 0))))
    with threadpool_limits(1):  # its many short steps are no faster on several threads
        points: Array = TSNE(perplexity=min(30, (M - 1) / 3), random_state=0).fit_transform(features)
    return points


def _scatter(axis: Axes, points: Array, labels: Array, classes: list[str], size: float) -> None:
    colours = FEW_CLASSES if len(classes) <= len(FEW_CLASSES) else MANY_CLASSES
    for label in np.unique(labels):
        colour = colours[label % len(colours)]
        x, y = points[labels == label].T
        axis.scatter(x, y, s=size, color=colour, linewidths=0, label=classes[label])


def _panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, Array]:
    """A figure with panels (rows, columns) of that size in inches; a single column is wider."""
    width = max(width, 5.0 / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _title_rates(axes: Array, runs: list[Run]) -> None:
    for axis, same in zip(axes[0], sorted(grouped(runs, lambda run: run.rate).items()), strict=True):
        axis.set_title(_rate_text(same[1][0]))


def _by_loss_and_rate(
    runs: list[Run],
    names: tuple[str, ...],
    draw: Callable[..., None],
    height: float,
    xlabel: str = "",
    ylabel: str = "",
    **shared: Any,
) -> Figure | None:
    """Panels with a row for each name and a column for each rate, drawn from the arrays of the runs that have them."""
    found = _with_arrays(_first_seeds(without_sweeps(runs)), *names)
    if not found:
        return None
    runs = [run for run, *_ in found]
    rows, rates = [run.name for run in columns(runs)], _rates(runs)
    figure, axes = _panels(len(rows), len(rates), 2.6, height, **shared)
    _title_rates(axes, runs)
    for row, name in zip(axes, rows, strict=True):
        row[0].set_ylabel(f"{name}\n{ylabel}".strip())
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    for run, *arrays in found:
        draw(axes[rows.index(run.name), rates.index(run.rate)], run, *arrays)
    for axis in axes.flat:
        if not axis.has_data():
            axis.text(0.5, 0.5, "not run", ha="center", color=OTHER, transform=axis.transAxes)
        if not xlabel:
            axis.set(xticks=[], yticks=[])
    return _finish(figure, axes, runs)


def _finish(figure: Figure, axes: Array, runs: list[Run]) -> Figure:
    """Add the title, and below the panels one legend for all."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(entries, key=lambda label: METHODS.index(label) if label in METHODS else len(METHODS))
    handles = [entries[label] for label in labels]
    per_row = max(1, int(figure.get_figwidth() / 1.7))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=per_row, fontsize="small", frameon=False)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):  # points of a map are too small to show their colour
            handle.set_sizes([25])
    figure.suptitle(_title(runs))
    return figure
