"""Tables and the figure of `benchmarks.audit review`: wrong labels found by n decisions, and the estimated rate."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.markdown import print_head, print_row

STYLES: dict[str, dict[str, Any]] = {  # ours black; the others in Paul Tol's "muted", made for the colour-blind
    "ours": {"color": "#000000", "linewidth": 2.5, "marker": "o"},
    "by quality": {"color": "#882255", "linestyle": "--", "marker": "s"},
    "fixed": {"color": "#44AA99", "marker": "^"},
    "random": {"color": "#777777", "linestyle": ":", "marker": "x"},
}
SHOWN = (200, 500, 1000, 1500, 2000)
Runs = dict[tuple[str, str], dict[str, dict[tuple[int, str], float]]]
"""By noise and order, then by seed, then by decisions and metric."""


def print_review(path: Path) -> None:
    """The tables of each archive; orders that were not finished for all noises are left out."""
    for dataset, runs in _read(path).items():
        shown = [n for n in SHOWN if (n, "found") in next(iter(next(iter(runs.values())).values()))]
        _print_found(dataset, runs, shown)
        _print_rates(dataset, runs, shown)


def _print_found(dataset: str, runs: Runs, shown: list[int]) -> None:
    """Wrong labels found, and how many more than by the fixed ranking."""
    print(f"**{dataset}: wrong labels found by so many decisions, and their share of all: mean of the seeds**\n")
    print_head(["noise", "order", "seeds", "wrong", *(f"{n:,}" for n in shown)])
    for (noise, order), found in _by_noise(runs).items():
        total = mean(run[0, "wrong"] for run in found.values())
        cells = [mean(run[n, "found"] for run in found.values()) for n in shown]
        shares = [f"{cell:.0f} ({100 * cell / total:.1f} %)" for cell in cells]
        print_row([noise, order, str(len(found)), f"{total:.0f}", *shares])
    print(f"\n**{dataset}: wrong labels found more than by the fixed ranking: mean, and the least of the seeds**\n")
    print_head(["noise", "order", *(f"{n:,}" for n in shown)])
    for (noise, order), found in _by_noise(runs).items():
        if order not in ("fixed", "random"):
            more = [
                [run[n, "found"] - runs[noise, "fixed"][seed][n, "found"] for seed, run in found.items()] for n in shown
            ]
            print_row([noise, order, *(f"{mean(each):+.1f} ({min(each):+.0f})" for each in more)])


def _print_rates(dataset: str, runs: Runs, shown: list[int]) -> None:
    """The estimated share of wrong labels."""
    print(f"\n**{dataset}: estimated share of wrong labels in %, without / with calibration by the decisions**\n")
    print_head(["noise", "wrong", "0", *(f"{n:,}" for n in shown)])
    for (noise, order), found in _by_noise(runs).items():
        if order != "ours":
            continue

        def rate(n: int, metric: str, found: dict[str, dict[tuple[int, str], float]] = found) -> float:
            """Of the images, the mean of all runs."""
            return mean(run[n, metric] / run[0, "images"] for run in found.values())

        rates = [f"{100 * rate(0, 'estimated'):.1f}"]
        for n in shown:
            named = sum(run[n, "calibrated"] for run in found.values())
            without = f"{100 * rate(n, 'estimated without calibration'):.1f}"
            rates.append(f"{without} / {100 * rate(n, 'estimated'):.1f}" if named == len(found) else f"{without} / –")
        print_row([noise, f"{100 * rate(0, 'wrong'):.1f}", *rates])
    print()


def plot(path: Path, file: Path) -> None:
    """Draw the first archive: of each noise the share of wrong labels found, and how many more than by the ranking."""
    runs = next(iter(_read(path).values()))
    noises = list(dict.fromkeys(noise for noise, _ in runs))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, len(noises), sharex=True, sharey="row", squeeze=False)
    for column, noise in enumerate(noises):
        for order, style in STYLES.items():
            if (noise, order) not in runs:
                continue
            found = runs[noise, order]
            places = sorted({n for n, metric in next(iter(found.values())) if metric == "found"})
            share = [100 * mean(run[n, "found"] / run[0, "wrong"] for run in found.values()) for n in places]
            axes[0, column].plot(places, share, label=order, markersize=4, **style)
            if order != "random":
                fixed = runs[noise, "fixed"]
                more = [mean(run[n, "found"] - fixed[seed][n, "found"] for seed, run in found.items()) for n in places]
                axes[1, column].plot(places, more, markersize=4, **style)
        axes[0, column].set_title(noise)
        axes[1, column].set_xlabel("decisions")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("wrong labels found, %")
    axes[1, 0].set_ylabel("more than by the fixed ranking")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _by_noise(runs: Runs) -> Runs:
    """In the order of the noises."""
    noises = list(dict.fromkeys(noise for noise, _ in runs))
    return {key: found for noise in noises for key, found in runs.items() if key[0] == noise}


def _read(path: Path) -> dict[str, Runs]:
    """By archive, the runs of orders of which every noise is there with the same seeds."""
    archives: dict[str, Runs] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    with path.open() as file:
        for row in csv.DictReader(file):
            run = archives[row["dataset"]][f"{row['noise']} {row['rate']}", row["order"]][row["seed"]]
            run[int(row["decisions"]), row["metric"]] = float(row["value"])
    return {dataset: _whole(runs) for dataset, runs in archives.items()}


def _whole(runs: Runs) -> Runs:
    noises, orders = ({key[part] for key in runs} for part in range(2))

    def seeds(noise: str, order: str) -> frozenset[str]:
        return frozenset(runs.get((noise, order), ()))

    whole = {order for order in orders if len({seeds(noise, order) for noise in noises}) == 1}
    return {key: found for key, found in runs.items() if key[1] in whole}
