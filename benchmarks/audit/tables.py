"""Markdown tables of the evidence, the calibration and the speed of the label audit."""

import csv
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from benchmarks.audit.review_curve import plot, print_review
from benchmarks.markdown import print_head, print_row

RESULTS = Path(__file__).parent.parent / "results"
EVIDENCE, SPEED = RESULTS / "audit.csv", RESULTS / "audit-speed.json"
FEATURES = RESULTS / "audit-features.csv"
REVIEW = RESULTS / "audit-review.csv"
FINDINGS = RESULTS / "audit-findings.csv"
CALIBRATION = RESULTS / "audit-calibration.csv"

Setting = tuple[str, str, str]
"""Dataset, noise, rate."""
Values = dict[tuple[Setting, str, str, str], float]
"""By setting, method, way to choose suspects (or ""), and metric."""


def table(
    features_path: Path,
    evidence_path: Path,
    speed_path: Path,
    calibration_path: Path,
    review_path: Path,
    findings_path: Path,
    *,
    figures: Path | None = None,
) -> None:
    """Print the tables of each file that is there, and draw the curve of the review into a folder."""
    printers = (
        (features_path, print_features),
        (evidence_path, print_evidence),
        (speed_path, print_speed),
        (calibration_path, print_calibration),
        (review_path, print_review),
        (findings_path, print_findings),
    )
    for path, print_tables in printers:
        if path.exists():
            print_tables(path)
        else:
            print(f"({path.name} is not there)\n")
    if figures is not None:
        plot(review_path, figures / "review-curve.png")


def print_features(path: Path) -> None:
    """Each method whose runs are all there: over all noises, and in each; with standard errors over the seeds."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        runs: dict[str, dict[tuple[str, str], dict[tuple[str, str], float]]] = {}
        """By method, noise with its rate and seed, way to choose suspects and metric."""
        for row in rows:
            if row["dataset"] == dataset:
                run = runs.setdefault(row["method"], {}).setdefault((f"{row['noise']} {row['rate']}", row["seed"]), {})
                run[row["suspects"], row["metric"]] = float(row["value"])
        complete = {method: found for method, found in runs.items() if len(found) == max(map(len, runs.values()))}
        _print_methods(dataset, complete)


def _print_methods(dataset: str, runs: dict[str, dict[tuple[str, str], dict[tuple[str, str], float]]]) -> None:
    first = next(iter(runs.values()))
    noises, seeds = (list(dict.fromkeys(key[i] for key in first)) for i in range(2))
    suspects = {}  # the way to choose them: the audit's first, or the only one
    for method, found in runs.items():
        suspects[method] = next(way for way, metric in next(iter(found.values())) if way and metric == "precision")

    def value(method: str, noise: str, seed: str, metric: str) -> float:
        run = runs[method][noise, seed]
        if metric == "F1":
            return 100 * _f1(run[suspects[method], "precision"], run[suspects[method], "recall"])
        if metric == "error":
            return 100 * abs(run["", "noise_rate"] - run["", "true_rate"])
        return run["", metric] * (1 if metric == "seconds" else 100)

    def with_error(method: str, metric: str, over: list[str]) -> str:
        by_seed = [mean(value(method, noise, seed, metric) for noise in over) for seed in seeds]
        return f"{mean(by_seed):.1f}" + (f" ± {stdev(by_seed) / len(seeds) ** 0.5:.1f}" if len(seeds) > 1 else "")

    metrics = {
        "AUROC": "auroc",
        "average precision": "average_precision",
        "precision at the rate": "precision_at_rate",
        "F1 of suspects": "F1",
        "error of the rate": "error",
        "seconds": "seconds",
    }
    print(f"**{dataset}, untrained features: mean over {len(noises)} noises, {len(seeds)} seeds, in %; CPU seconds**\n")
    print_head(["method", *metrics])
    for method in runs:
        print_row([method, *(with_error(method, metric, noises) for metric in metrics.values())])
    for title in ("average precision", "F1 of suspects"):
        print(f"\n**{dataset}: {title}**\n")
        print_head(["method", *noises])
        for method in runs:
            print_row([method, *(with_error(method, metrics[title], [noise]) for noise in noises)])
    ours, *others = runs
    print(f"\n**{dataset}: {ours} minus the others, mean over the noises, the least of the seeds**\n")
    print_head(["method", "average precision", "F1 of suspects"])
    for method in others:
        least = [
            min(mean(value(ours, n, s, metric) - value(method, n, s, metric) for n in noises) for s in seeds)
            for metric in ("average_precision", "F1")
        ]
        print_row([method, *(f"{difference:+.1f}" for difference in least)])
    print()


def print_evidence(path: Path) -> None:
    """How well each method ranks the wrong labels, what its suspects are worth, and what it estimates."""
    by_seed: dict[tuple[Setting, str, str, str], list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            setting = row["dataset"], row["noise"], row["rate"]
            by_seed[setting, row["method"], row["suspects"], row["metric"]].append(float(row["value"]))
    values = {key: mean(found) for key, found in by_seed.items()}
    settings = sorted({key[0] for key in values}, key=lambda setting: (setting[0], setting[1] != "uniform", setting[2]))
    methods = list(dict.fromkeys(key[1] for key in values))
    _print_ranking(values, settings, methods)
    _print_suspects(values, settings, methods)
    print("\n**Estimated share of wrong labels, in %**\n")
    print_head(["features", "noise", "wrong", *methods])
    for setting in settings:
        rates = [f"{100 * values[setting, method, '', 'noise_rate']:.0f}" for method in methods]
        print_row([*_titles(setting, values), *rates])
    print("\n**Seconds, largest over the settings**\n")
    for method in methods:
        print(f"- {method}: {max(values[setting, method, '', 'seconds'] for setting in settings):.1f} s")
    print()


def _print_ranking(values: Values, settings: list[Setting], methods: list[str]) -> None:
    """The best value of a metric in each setting is bold."""
    print("**Finding wrong labels: AUROC / average precision / precision at the true rate, in %**\n")
    metrics = ("auroc", "average_precision", "precision_at_rate")
    print_head(["features", "noise", "wrong", *methods])
    for setting in settings:
        best = {metric: max(_percent(values[setting, m, "", metric]) for m in methods) for metric in metrics}
        cells = []
        for method in methods:
            rounded = {metric: _percent(values[setting, method, "", metric]) for metric in metrics}
            cells.append(" / ".join(f"**{x:.1f}**" if x == best[m] else f"{x:.1f}" for m, x in rounded.items()))
        print_row([*_titles(setting, values), *cells])
    means = []
    for method in methods:
        of_method = [mean(values[setting, method, "", metric] for setting in settings) for metric in metrics]
        means.append(" / ".join(f"{100 * value:.1f}" for value in of_method))
    print_row(["mean", "", "", *means])


def _print_suspects(values: Values, settings: list[Setting], methods: list[str]) -> None:
    """Precision and recall for each way to choose suspects, and their mean F1."""
    ways = dict.fromkeys((method, way) for _, method, way, _ in values if way)
    columns = sorted(ways, key=lambda column: methods.index(column[0]))
    print("\n**Suspects without a clean label: precision / recall, in %**\n")
    print_head(["features", "noise", "wrong", *(f"{method}: {way}" for method, way in columns)])
    f1: dict[tuple[str, str], list[float]] = defaultdict(list)
    for setting in settings:
        cells = []
        for method, way in columns:
            precision, recall = (values[setting, method, way, metric] for metric in ("precision", "recall"))
            cells.append(f"{100 * precision:.0f} / {100 * recall:.0f}")
            f1[method, way].append(_f1(precision, recall))
        print_row([*_titles(setting, values), *cells])
    print_row(["mean F1", "", "", *(f"{100 * mean(f1[column]):.0f}" for column in columns)])


def _titles(setting: Setting, values: Values) -> list[str]:
    dataset, noise, rate = setting
    return [dataset, f"{noise} {rate}", f"{100 * _true_rate(values, setting):.0f} %"]


def _true_rate(values: Values, setting: Setting) -> float:
    return next(value for key, value in values.items() if key[0] == setting and key[3] == "true_rate")


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


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


def print_findings(path: Path) -> None:
    """What is named of what was made, and what else."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        print(f"**{dataset}: what was made and is named, and what else is named**\n")
        print_head(["finding", "made", "number", "named", "others named"])
        for row in rows:
            if row["dataset"] == dataset:
                print_row([row[name] for name in ("finding", "case", "made", "named", "others")])
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
