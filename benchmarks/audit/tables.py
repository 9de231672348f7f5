"""Markdown tables of the evidence, the calibration and the speed of the label audit."""

import csv
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean

from benchmarks.audit.methods import METHODS
from benchmarks.markdown import print_head, print_row

RESULTS = Path(__file__).parent.parent / "results"
EVIDENCE, SPEED = RESULTS / "audit.csv", RESULTS / "audit-speed.json"
CALIBRATION = RESULTS / "audit-calibration.csv"

Setting = tuple[str, str, str]
"""Dataset, noise, rate."""
Values = dict[tuple[Setting, str, str, str], float]
"""By setting, method, way to choose suspects (or ""), and metric."""


def table(evidence_path: Path, speed_path: Path, calibration_path: Path) -> None:
    """Print the tables of each file that is there."""
    printers = (evidence_path, print_evidence), (speed_path, print_speed), (calibration_path, print_calibration)
    for path, print_tables in printers:
        if path.exists():
            print_tables(path)
        else:
            print(f"({path.name} is not there)\n")


def print_evidence(path: Path) -> None:
    """How well each method ranks the wrong labels, what its suspects are worth, and what it estimates."""
    by_seed: dict[tuple[Setting, str, str, str], list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            setting = row["dataset"], row["noise"], row["rate"]
            by_seed[setting, row["method"], row["suspects"], row["metric"]].append(float(row["value"]))
    values = {key: mean(found) for key, found in by_seed.items()}
    settings = sorted({key[0] for key in values}, key=lambda setting: (setting[0], setting[1] != "uniform", setting[2]))
    _print_ranking(values, settings)
    _print_suspects(values, settings)
    print("\n**Estimated share of wrong labels, in %**\n")
    print_head(["features", "noise", "wrong", *METHODS])
    for setting in settings:
        rates = [f"{100 * values[setting, method, '', 'noise_rate']:.0f}" for method in METHODS]
        print_row([*_titles(setting, values), *rates])
    print("\n**Seconds, largest over the settings**\n")
    for method in METHODS:
        print(f"- {method}: {max(values[setting, method, '', 'seconds'] for setting in settings):.1f} s")
    print()


def _print_ranking(values: Values, settings: list[Setting]) -> None:
    """The best value of a metric in each setting is bold."""
    print("**Finding wrong labels: AUROC / average precision / precision at the true rate, in %**\n")
    metrics = ("auroc", "average_precision", "precision_at_rate")
    print_head(["features", "noise", "wrong", *METHODS])
    for setting in settings:
        best = {metric: max(_percent(values[setting, m, "", metric]) for m in METHODS) for metric in metrics}
        cells = []
        for method in METHODS:
            rounded = {metric: _percent(values[setting, method, "", metric]) for metric in metrics}
            cells.append(" / ".join(f"**{x:.1f}**" if x == best[m] else f"{x:.1f}" for m, x in rounded.items()))
        print_row([*_titles(setting, values), *cells])
    means = []
    for method in METHODS:
        of_method = [mean(values[setting, method, "", metric] for setting in settings) for metric in metrics]
        means.append(" / ".join(f"{100 * value:.1f}" for value in of_method))
    print_row(["mean", "", "", *means])


def _print_suspects(values: Values, settings: list[Setting]) -> None:
    """Precision and recall for each way to choose suspects, and their mean F1."""
    ways = dict.fromkeys((method, way) for _, method, way, _ in values if way)
    columns = sorted(ways, key=lambda column: list(METHODS).index(column[0]))
    print("\n**Suspects without a clean label: precision / recall, in %**\n")
    print_head(["features", "noise", "wrong", *(f"{method}: {way}" for method, way in columns)])
    f1: dict[tuple[str, str], list[float]] = defaultdict(list)
    for setting in settings:
        cells = []
        for method, way in columns:
            precision, recall = (values[setting, method, way, metric] for metric in ("precision", "recall"))
            cells.append(f"{100 * precision:.0f} / {100 * recall:.0f}")
            f1[method, way].append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        print_row([*_titles(setting, values), *cells])
    print_row(["mean F1", "", "", *(f"{100 * mean(f1[column]):.0f}" for column in columns)])


def _titles(setting: Setting, values: Values) -> list[str]:
    dataset, noise, rate = setting
    return [dataset, f"{noise} {rate}", f"{100 * values[setting, next(iter(METHODS)), '', 'true_rate']:.0f} %"]


def _percent(value: float) -> float:
    """As it is printed: two methods that look alike are both best."""
    return float(f"{100 * value:.1f}")


def print_calibration(path: Path) -> None:
    """The estimated rates, in brackets where the audit does not name them, and how far off both kinds are."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    noises = list(dict.fromkeys((row["noise"], row["share"]) for row in rows))
    print("**Estimated noise rates in %, in brackets where the audit says that the features cannot carry one**\n")
    print_head(["images", "features", *(f"{noise} {share}" for noise, share in noises)])
    by_cell = {(row["archive"], row["features"], row["noise"], row["share"]): row for row in rows}
    for archive, features in dict.fromkeys((row["archive"], row["features"]) for row in rows):
        cells = []
        for noise in noises:
            row = by_cell[archive, features, *noise]
            percent = f"{100 * float(row['estimated_rate']):.0f}"
            cells.append(f"({percent})" if row["doubt"] else percent)
        print_row([archive, features, *cells])
    print()
    print_head(["error of the estimated rate, in points", "cases", "rate named", "not named"])
    errors = [abs(float(row["estimated_rate"]) - float(row["true_rate"])) for row in rows]
    for least, most in pairwise([0.0, 0.05, 0.1, 0.2, 1.0]):
        within = [row for row, error in zip(rows, errors, strict=True) if least <= error < most]
        named = sum(not row["doubt"] for row in within)
        title = f"{100 * least:.0f} to {100 * most:.0f}" if most < 1 else f"{100 * least:.0f} and more"
        print_row([title, str(len(within)), str(named), str(len(within) - named)])
    print()


def print_speed(path: Path) -> None:
    """The time and memory of an audit."""
    run = json.loads(path.read_text())
    m = run["machine"]
    print(f"{m['cpu']}, {m['threads']} threads, {m['vector_instructions']}; torch {m['torch']}; {m['date']}.\n")
    print_head(["N", "classes", "copy", "seconds", "images/s", "memory beyond the features", "of it the copy"])
    for row in run["rows"]:
        seconds = f"{row['seconds']:,.1f}" if row["seconds"] < 100 else f"{row['seconds']:,.0f}"
        print_row(
            [
                f"{row['N']:,}",
                f"{row['C']:,}",
                row["dtype"],
                seconds + (" (extrapolated)" if row["extrapolated"] else ""),
                f"{row['N'] / row['seconds']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f} MB",
                f"{row['copy_bytes'] / 2**20:,.0f} MB",
            ]
        )
