"""Markdown tables of the results on frozen features.

Numbers are in %, the mean over seeds ± its standard error. Two losses are compared by their differences seed by seed:
split, wrong labels and batches of a seed are the same for all.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.frozen.losses import AUDITED, COMPARED, OURS, TUNED
from benchmarks.frozen.plan import CHOSEN_AT, COLUMNS, COMMON, chosen
from benchmarks.frozen.problem import Column
from benchmarks.frozen.results import read
from benchmarks.markdown import print_head, print_row

TITLES = {
    "knn": "K-NN accuracy by right labels",
    "map20_hits": "MAP@20 (hits)",
    "nmi": "NMI",
    "acc": "ACC of clusters",
    "knn_given": "K-NN accuracy by given labels",
}
SHORT = {"uniform": "U", "label-dependent": "LD"}
ORDER = sorted(COLUMNS, key=lambda column: (column.noise != "uniform", column.rate))
UNTUNED = f"{OURS}, lr {COMMON:g}"  # beside losses that have learning rates of their own
ROWS = [*COMPARED, UNTUNED]
OTHERS = [method for method in COMPARED if not method.startswith(OURS)]

Cells = dict[tuple[Column, str], pd.Series]
"""By column and method, a metric in % by seed, of the seeds that all methods of the column have."""
LearningRate = Callable[[str, str], float | None]
"""Of a method, under a kind of noise."""
Found = dict[tuple[str, float, str, float], pd.DataFrame]
"""The rows of a noise, rate, method and learning rate, by seed."""
NONE = pd.Series(dtype=float)


def print_tables(path: Path) -> None:
    """Print all tables of a file of results."""
    rows = read(path)
    found = by_run(rows)
    print_learning_rates(rows, found)
    ways: dict[str, LearningRate] = {
        "each loss with its own learning rate": partial(own, rows),
        f"all losses with learning rate {COMMON:g}": lambda method, noise: COMMON if method in COMPARED else None,
    }
    for way, lr in ways.items():
        for ours in (UNTUNED, OURS):
            if lr(ours, "uniform") is not None:
                print_differences(found, ours, lr, way)
        for metric, title in TITLES.items():
            print_metric(cells_of(found, metric, lr), f"{title}, {way}", kept=metric == "knn")
        print_pruned(cells_of(found, "pruned", lr), way)
    print_by_hand(found)
    for metric in ("knn", "map20_hits"):
        print_audited(found, metric)
    print_seconds(rows)


def own(rows: pd.DataFrame, method: str, noise: str) -> float | None:
    """The learning rate that was chosen for a loss; `UNTUNED` has the common one."""
    return COMMON if method == UNTUNED else chosen(rows, method, noise)


def by_run(rows: pd.DataFrame) -> Found:
    """The rows of each run but for the seed."""
    groups = rows.set_index("seed").sort_index().groupby(["noise", "rate", "method", "lr"])
    return {key: group for key, group in groups}


def cells_of(found: Found, metric: str, lr: LearningRate) -> Cells:
    """The cells of the rows, with their learning rates."""
    cells: Cells = {}
    for column in ORDER:
        of_method = {method: by_seed(found, column, method, lr(method, column.noise), metric) for method in ROWS}
        of_method = {method: values for method, values in of_method.items() if len(values)}
        if of_method:
            seeds = set.intersection(*(set(values.index) for values in of_method.values()))
            cells |= {(column, method): values[sorted(seeds)] for method, values in of_method.items()}
    return cells


def by_seed(found: Found, column: Column, method: str, lr: float | None, metric: str) -> pd.Series:
    """A metric in %, by seed."""
    runs = found.get((*column, OURS if method == UNTUNED else method, lr)) if lr is not None else None
    return NONE if runs is None else 100 * runs[metric].dropna()


def standard_error(values: pd.Series) -> float:
    """Of the mean; NaN of one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def written(values: pd.Series, sign: str = "") -> str:
    """Mean ± standard error."""
    mean = f"{values.mean():{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {standard_error(values):.1f}"


def columns_of(cells: Cells) -> list[Column]:
    """In the order of the tables."""
    return list(dict.fromkeys(column for column, _ in cells))


def seeds_of(cells: Cells) -> list[str]:
    """How many seeds each column's numbers are of."""
    seeds = {column: len(values) for (column, _), values in cells.items()}
    return [str(seeds[column]) for column in columns_of(cells)]


def name(column: Column) -> str:
    """At the head of a table."""
    return f"{SHORT[column.noise]} {column.rate:g}"


def best_of(cells: Cells, column: Column, methods: list[str]) -> str | None:
    """The method of the highest mean; None where there is none."""
    there = [method for method in methods if len(cells.get((column, method), ()))]
    return max(there, key=lambda method: cells[column, method].mean(), default=None)


def print_metric(cells: Cells, title: str, kept: bool) -> None:
    """A row for each loss. The best is bold, what is within one standard error of it, seed by seed, in italics.

    `kept` adds what is left of the accuracy at 0.1 when half of the labels are wrong.
    """
    columns = columns_of(cells)
    print(f"\n**{title}**\n")
    pairs = {noise: (Column(noise, 0.1), Column(noise, 0.5)) for noise in SHORT} if kept else {}
    print_head(["", *map(name, columns), *(f"{SHORT[noise]} 0.5 / 0.1" for noise in pairs)])
    for method in (method for method in ROWS if any(of == method for _, of in cells)):
        line = [method]
        for column in columns:
            values = cells.get((column, method), NONE)
            best = best_of(cells, column, ROWS)
            if len(values) == 0 or best is None:
                line.append("–")
                continue
            behind = cells[column, best] - values
            mark = "**" if method == best else "*" if behind.mean() <= standard_error(behind) else ""
            line.append(f"{mark}{written(values)}{mark}")
        for low, high in pairs.values():
            there = (low, method) in cells and (high, method) in cells
            share = (100 * cells[high, method] / cells[low, method]).dropna() if there else NONE
            line.append(written(share) if len(share) else "–")
        print_row(line)
    print_row(["seeds", *seeds_of(cells), *("" for _ in pairs)])


def print_differences(found: Found, ours: str, lr: LearningRate, way: str) -> None:
    """How far a row of NTDNE's is ahead of the best other loss, in points."""
    print(f"\n**{ours} − best other loss, seed by seed, in points; {way}**\n")
    columns = columns_of(cells_of(found, "knn", lr))
    print_head(["", *map(name, columns)])
    for metric, title in TITLES.items():
        cells, line = cells_of(found, metric, lr), [title]
        for column in columns:
            best = best_of(cells, column, OTHERS)
            if best is None or (column, ours) not in cells:
                line.append("–")
            else:
                line.append(f"{written(cells[column, ours] - cells[column, best], '+')} ({best})")
        print_row(line)
    print_row(["seeds", *seeds_of(cells_of(found, "knn", lr))])


def print_pruned(cells: Cells, way: str) -> None:
    """The share of training images that a loss prunes or truncates in the end."""
    print(f"\n**Training images without a gradient in the last epoch; {way}**\n")
    print_head(["", *map(name, columns_of(cells))])
    for method in ROWS:
        shares = [cells.get((column, method), NONE) for column in columns_of(cells)]
        if any(values.any() for values in shares):
            print_row([method, *(f"{values.mean():.0f}" if len(values) else "–" for values in shares)])


def print_learning_rates(rows: pd.DataFrame, found: Found) -> None:
    """Held-out accuracy by learning rate, the chosen one bold, and beside it the accuracy by right labels."""
    for noise, at in CHOSEN_AT.items():
        rates = sorted({lr for noise, rate, method, lr in found if Column(noise, rate) == at and method in COMPARED})
        if not rates:
            continue
        print(f"\n**Learning rates: held-out accuracy by wrong labels / K-NN by right ones, {noise} {at.rate:g}**\n")
        print_head(["", *(f"{lr:g}" for lr in rates)])
        for method in COMPARED:
            line = [method]
            for lr in rates:
                held_out, right = (by_seed(found, at, method, lr, metric) for metric in ("held_out", "knn"))
                mark = "**" if lr == chosen(rows, method, noise) else ""
                line.append(f"{mark}{held_out[0]:.1f} / {right[0]:.1f}{mark}" if 0 in held_out else "–")
            print_row(line)


def print_by_hand(found: Found) -> None:
    """The default with the common learning rate beside the best of the settings that one would try by hand."""
    tried = sorted({(method, lr) for _, _, method, lr in found if method in TUNED})
    if not tried:
        return
    print(f"\n**{OURS}'s default, learning rate {COMMON:g}, beside the best setting found by hand; K-NN**\n")
    print_head(["", "default", "best by hand", "", "default − best"])
    for column in [Column("uniform", 0.0), *ORDER]:
        default = by_seed(found, column, OURS, COMMON, "knn")
        settings = {setting: by_seed(found, column, *setting, "knn") for setting in tried}
        settings = {setting: values for setting, values in settings.items() if len(values)}
        if len(default) and settings:
            seeds = sorted(set(default.index).intersection(*(values.index for values in settings.values())))
            method, lr = max(settings, key=lambda setting: settings[setting][seeds].mean())
            ours, theirs = default[seeds], settings[method, lr][seeds]
            how = f"{method.removeprefix('NTDNE, ')}, lr {lr:g}"
            print_row([name(column), written(ours), written(theirs), how, written(ours - theirs, "+")])


def print_audited(found: Found, metric: str) -> None:
    """What an audit of the training images changes: each loss as the labels are given, and differences from that."""
    columns = [column for column in ORDER if any((*column, after, COMMON) in found for after in AUDITED)]
    if not columns:
        return
    print(f"\n**{TITLES[metric]}, learning rate {COMMON:g}; after an audit the difference, seed by seed, in points**\n")
    print_head(["", *map(name, columns)])
    for method, treated in groupby(AUDITED, key=lambda after: AUDITED[after][0]):
        of_method = {column: by_seed(found, column, method, COMMON, metric) for column in columns}
        print_row([method, *(written(values) if len(values) else "–" for values in of_method.values())])
        for after in treated:
            changes = [by_seed(found, column, after, COMMON, metric) - of_method[column] for column in columns]
            print_row([after, *(written(change, "+") if len(change := each.dropna()) else "–" for each in changes)])


def print_seconds(rows: pd.DataFrame) -> None:
    """The median time of a training by loss."""
    print("\n**Seconds of a training on one core, median over all runs**\n")
    seconds = rows.groupby("method").seconds.median()
    methods = [method for method in COMPARED if method in seconds]
    print_head(methods)
    print_row([f"{seconds[method]:.0f}" for method in methods])
