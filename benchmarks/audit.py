"""How well the label audit finds wrong labels, beside cleanlab and a K-NN vote; and its time and memory.

python -m benchmarks.audit evidence RUNS --output benchmarks/results/audit.csv      of all trained runs under a folder
python -m benchmarks.audit speed --output benchmarks/results/audit-speed.json
python -m benchmarks.audit calibrate --scenes AID/    whether it knows when features cannot carry a rate; see there
python -m benchmarks.audit table                                                    Markdown of all

The features of a run are those of its own encoder, which was trained on the given labels; which of these are wrong
serves to judge the ranking alone. Every method gets the same unit features and the same labels.

Shapes: N images, D features, C classes.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from cleanlab.count import compute_confident_joint
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import calibration, memory
from benchmarks.scale import machine
from ntdne_kernels import audit
from ntdne_kernels.experiments.noise import dataset_of
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.results import embed
from ntdne_kernels.experiments.run import SETTINGS, trained

RESULTS = Path(__file__).parent / "results"
EVIDENCE, SPEED = RESULTS / "audit.csv", RESULTS / "audit-speed.json"
CALIBRATION = RESULTS / "audit-calibration.csv"
K = 0.3  # the paper's threshold
Row = dict[str, Any]


class Verdict(NamedTuple):
    """What a method says of the given labels (N,)."""

    quality: Tensor
    """(N,): the lowest are the most suspect; equal ones by image."""
    suspects: dict[str, Tensor]
    """By the way to choose them, (N,) bool."""
    noise_rate: float


def ours(features: Tensor, labels: Tensor) -> Verdict:
    found = audit.audit_labels(features, labels)
    suspects = {method: found.suspects(method) for method in audit.METHODS}
    return Verdict(found.quality, suspects | {f"k={K}": found.suspects(K)}, found.noise_rate)


def score(features: Tensor, labels: Tensor) -> Verdict:
    """The score p in place of the quality."""
    found = audit.audit_labels(features, labels)
    return Verdict(found.score, {}, found.noise_rate)


def vote(features: Tensor, labels: Tensor) -> Verdict:
    """The share of the 20 nearest that has the image's label, ties by their similarity; suspects are outvoted."""
    votes, similarity = neighbour_votes(features, labels, 20)
    own = labels.unsqueeze(1)
    share = votes.gather(1, own).squeeze(1)
    suspects = votes.argmax(dim=1) != labels
    return Verdict(share + 1e-3 * similarity, {"majority": suspects}, float(suspects.float().mean()))


def cleanlab_knn(features: Tensor, labels: Tensor) -> Verdict:
    """As cleanlab.Datalab without pred_probs: class frequencies of the 10 nearest other images."""
    return cleanlab(labels, neighbour_votes(features, labels, 10)[0].double().numpy())


def cleanlab_classifier(features: Tensor, labels: Tensor) -> Verdict:
    """As in cleanlab's tutorials on embeddings: a logistic regression, cross-validated in five parts."""
    parts = StratifiedKFold(5, shuffle=True, random_state=0)
    classifier = LogisticRegression(max_iter=1000)
    shares = cross_val_predict(classifier, features.numpy(), labels.numpy(), cv=parts, method="predict_proba")
    return cleanlab(labels, shares)


METHODS: dict[str, Callable[[Tensor, Tensor], Verdict]] = {
    "ours": ours,
    "ours, p alone": score,
    "cleanlab, classifier": cleanlab_classifier,
    "cleanlab, K-NN": cleanlab_knn,
    "K-NN vote": vote,
}


def neighbour_votes(features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, C) class frequencies among the k nearest others of each image, (N,) how similar those of its label are."""
    bank = audit.feature_bank(features, labels)
    nearest, similarity = audit.nearest_neighbours(bank, torch.arange(len(labels)), k)
    votes = torch.zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], torch.full_like(similarity, 1 / k))
    return votes, (similarity * (labels[nearest] == labels.unsqueeze(1))).mean(dim=1)


def cleanlab(labels: Tensor, shares: "np.ndarray[Any, Any]") -> Verdict:
    """From class probabilities (N, C), with cleanlab's defaults."""
    given = labels.numpy()
    joint = compute_confident_joint(given, shares)
    issues = find_label_issues(given, shares)
    quality = torch.from_numpy(np.array(get_label_quality_scores(given, shares)))
    return Verdict(quality, {"find_label_issues": torch.from_numpy(issues)}, 1 - joint.trace() / joint.sum())


# Evidence


def evidence(folder: Path, cache: Path | None) -> Iterator[Row]:
    for path in sorted(path.parent for path in folder.rglob(SETTINGS)):
        try:
            settings, variant, encoder, history, _ = trained(path)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if len(history) < settings.epochs:
            print(f"left out: {path} is not finished", file=sys.stderr)
            continue
        problem = make_problem(settings, cache)
        features = normalize(embed(encoder, problem.dataset(problem.train), settings.batch_size, "cpu"), dim=1)
        labels, wrong, _ = problem.noisy
        if not 0 < int(wrong.sum()) < len(wrong):
            print(f"left out: the labels of {path} are all right or all wrong", file=sys.stderr)
            continue
        run = {
            "dataset": dataset_of(problem.archive.classes) or problem.archive.name,
            "noise": settings.noise,
            "rate": settings.rate,
            "loss": f"{settings.loss} {variant}".strip(),
            "seed": settings.seed,
        }
        print(path, flush=True)
        for method, judge in METHODS.items():
            start = time.perf_counter()
            verdict = judge(features, labels)
            seconds = time.perf_counter() - start
            for suspects, metric, value in [*measures(verdict, wrong), ("", "seconds", seconds)]:
                yield run | {"method": method, "suspects": suspects, "metric": metric, "value": value}


def measures(verdict: Verdict, wrong: Tensor) -> Iterator[tuple[str, str, float]]:
    """(Way to choose suspects or "", metric, value), given which labels (N,) are wrong."""
    quality, truth = verdict.quality.numpy(), wrong.numpy()
    yield "", "auroc", roc_auc_score(truth, -quality)
    yield "", "average_precision", average_precision_score(truth, -quality)
    worst = np.argsort(quality, kind="stable")[: truth.sum()]
    yield "", "precision_at_rate", truth[worst].mean()
    yield "", "noise_rate", verdict.noise_rate
    yield "", "true_rate", truth.mean()
    for name, suspects in verdict.suspects.items():
        found = int((suspects & wrong).sum())
        yield name, "precision", found / max(int(suspects.sum()), 1)
        yield name, "recall", found / int(wrong.sum())


def write(rows: Iterable[Row], path: Path) -> None:
    """The file is there once all rows are."""
    found = list(rows)
    if not found:
        raise SystemExit("no finished run with wrong labels was found")
    written = path.with_suffix(".new")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    written.replace(path)


# Time and memory


class Case(NamedTuple):
    N: int
    D: int
    C: int
    dtype: str
    batches: int
    """Of queries that are compared, evenly spread; 0 for all. The time of the others is extrapolated."""


D, C = 128, 45
BATCHES = 4  # of a million images: 16384 queries


def cases(sizes: list[int]) -> Iterator[Case]:
    for N in sizes:
        for dtype in ("float32", "bfloat16"):
            yield Case(N, D, C, dtype, BATCHES if N > 100_000 else 0)
    yield Case(min(100_000, max(sizes)), D, min(100_000, max(sizes)) // 2, "float32", 0)


def speed(sizes: list[int]) -> Row:
    """Each case in a process of its own."""
    root, here, rows = Path(__file__).parent.parent, machine(), []
    for case in cases(sizes):
        command = [sys.executable, "-m", "benchmarks.audit", "case", *map(str, case)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
        rows.append(case._asdict() | json.loads(result.stdout))
        print(rows[-1], flush=True)
    return {"machine": here | {"threads": torch.get_num_threads()}, "rows": rows}


def run_case(case: Case) -> Row:
    """Seconds and the peak of memory that an audit adds to its features and labels."""
    dtype = getattr(torch, case.dtype)
    features, labels = torch.randn(case.N, case.D), torch.randint(case.C, (case.N,))
    audit_once(features[:1000], labels[:1000] % 10, dtype)  # libraries allocate on first use
    sweep = Sweep(case.batches)
    audit.with_progress = sweep  # type: ignore[attr-defined]
    start = time.perf_counter()
    peak = memory.added_by(lambda: audit_once(features, labels, dtype))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds + sweep.seconds * (sweep.share - 1),
        "sweep_seconds": sweep.seconds * sweep.share,
        "measured_seconds": seconds,
        "extrapolated": sweep.share > 1,
        "peak_bytes": peak,
        "copy_bytes": case.N * case.D * dtype.itemsize,
    }


def audit_once(features: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    found = audit.audit_labels(features, labels, dtype=dtype, progress=True)
    found.ranking, found.suspects("rate")


class Sweep:
    """In place of the audit's progress bars: times the comparison of images, which is done for some batches alone."""

    def __init__(self, batches: int) -> None:
        self.batches, self.seconds, self.share = batches, 0.0, 1.0

    def __call__(self, starts: Any, title: str) -> Iterator[int]:
        if title != "Comparing images":
            yield from starts
            return
        chosen = starts
        if 0 < self.batches < len(starts):
            chosen = starts[:: len(starts) // self.batches][: self.batches]
            self.share = len(starts) / len(chosen)
        begun = time.perf_counter()
        yield from chosen
        self.seconds = time.perf_counter() - begun


# Tables


def table(evidence_path: Path, speed_path: Path, calibration_path: Path) -> None:
    drawn = (evidence_path, print_evidence), (speed_path, print_speed), (calibration_path, print_calibration)
    for path, print_tables in drawn:
        if path.exists():
            print_tables(path)
        else:
            print(f"({path.name} is not there)\n")


Setting = tuple[str, str, str]
"""Dataset, noise, rate."""


def print_evidence(path: Path) -> None:
    values: dict[tuple[Setting, str, str, str], list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            setting = row["dataset"], row["noise"], row["rate"]
            values[setting, row["method"], row["suspects"], row["metric"]].append(float(row["value"]))
    of = {key: mean(found) for key, found in values.items()}  # over seeds
    settings = sorted({key[0] for key in of}, key=lambda setting: (setting[0], setting[1] != "uniform", setting[2]))
    print("**Finding wrong labels: AUROC / average precision / precision at the true rate, in %**\n")
    names = ("auroc", "average_precision", "precision_at_rate")
    print_head(["features", "noise", "wrong", *METHODS])
    for setting in settings:
        found = [[of[setting, method, "", name] for name in names] for method in METHODS]
        best = [max(f"{100 * row[place]:.1f}".rjust(5) for row in found) for place in range(len(names))]
        cells = [" / ".join(percent(value, best[place]) for place, value in enumerate(row)) for row in found]
        print_row([*titles(setting, of), *cells])
    print_row(
        [
            "mean",
            "",
            "",
            *(" / ".join(f"{100 * mean(of[s, m, '', n] for s in settings):.1f}" for n in names) for m in METHODS),
        ]
    )

    chosen = {(method, suspects) for _, method, suspects, _ in of if suspects}
    columns = [
        (m, s) for m in METHODS for s in dict.fromkeys(s for _, n, s, _ in of if n == m and s) if (m, s) in chosen
    ]
    print("\n**Suspects without a clean label: precision / recall, in %**\n")
    print_head(["features", "noise", "wrong", *(f"{method}: {suspects}" for method, suspects in columns)])
    for setting in settings:
        cells = [
            " / ".join(f"{100 * of[setting, *column, name]:.0f}" for name in ("precision", "recall"))
            for column in columns
        ]
        print_row([*titles(setting, of), *cells])
    cells = [f"{100 * mean(f1(of[s, *c, 'precision'], of[s, *c, 'recall']) for s in settings):.0f}" for c in columns]
    print_row(["mean F1", "", "", *cells])

    print("\n**Estimated share of wrong labels, in %**\n")
    print_head(["features", "noise", "wrong", *METHODS])
    for setting in settings:
        print_row([*titles(setting, of), *(f"{100 * of[setting, method, '', 'noise_rate']:.0f}" for method in METHODS)])
    print("\n**Seconds, largest over the settings**\n")
    for method in METHODS:
        print(f"- {method}: {max(of[setting, method, '', 'seconds'] for setting in settings):.1f} s")
    print()


def titles(setting: Setting, of: dict[Any, float]) -> list[str]:
    dataset, noise, rate = setting
    return [dataset, f"{noise} {rate}", f"{100 * of[setting, next(iter(METHODS)), '', 'true_rate']:.0f} %"]


def percent(value: float, best: str) -> str:
    text = f"{100 * value:.1f}"
    return f"**{text}**" if text == best.strip() else text


def f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def print_calibration(path: Path) -> None:
    """Estimated rates, those that the audit does not name in brackets, and how far off both kinds are."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    noises = list(dict.fromkeys((row["noise"], row["share"]) for row in rows))
    print("**Estimated noise rates in %, in brackets where the audit says that the features cannot carry one**\n")
    print_head(["images", "features", *(f"{noise} {share}" for noise, share in noises)])
    by_place = {(row["archive"], row["features"], row["noise"], row["share"]): row for row in rows}
    for archive, features in dict.fromkeys((row["archive"], row["features"]) for row in rows):
        cells = []
        for noise in noises:
            row = by_place[archive, features, *noise]
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


def print_head(cells: list[str]) -> None:
    print_row(cells)
    print("|" + "---|" * len(cells))


def print_row(cells: Iterable[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.audit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("evidence")
    command.add_argument("runs", type=Path)
    command.add_argument("--cache", type=Path, help="of `ntdne reproduce`")
    command.add_argument("--output", type=Path, default=EVIDENCE)
    command = commands.add_parser("speed")
    command.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    command.add_argument("--output", type=Path, default=SPEED)
    command = commands.add_parser("calibrate")
    command.add_argument("--scenes", type=Path, help="folder of class folders of aerial scenes")
    command.add_argument("--output", type=Path, default=CALIBRATION)
    command = commands.add_parser("table")
    command.add_argument("--evidence", type=Path, default=EVIDENCE)
    command.add_argument("--speed", type=Path, default=SPEED)
    command.add_argument("--calibration", type=Path, default=CALIBRATION)
    command = commands.add_parser("case")  # that `speed` runs in processes of their own
    command.add_argument("case", nargs=5)
    given = parser.parse_args()
    if given.command == "evidence":
        write(evidence(given.runs, given.cache), given.output)
    elif given.command == "speed":
        text = json.dumps(speed(given.sizes), indent=1) + "\n"
        given.output.write_text(text)
    elif given.command == "calibrate":
        write(calibration.calibrate(given.scenes), given.output)
    elif given.command == "table":
        table(given.evidence, given.speed, given.calibration)
    else:
        N, D, C, dtype, batches = given.case
        print(json.dumps(run_case(Case(int(N), int(D), int(C), dtype, int(batches)))))


if __name__ == "__main__":
    main()
