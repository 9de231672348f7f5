"""How well the methods find wrong labels in the features of trained runs.

The features of a run are those of its own encoder, which was trained on the given labels. Which labels are wrong is
known, and serves only to judge the verdicts.

Shapes: N images.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.audit.methods import METHODS, Verdict
from ntdne_kernels.experiments.noise import dataset_of
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.results import embed
from ntdne_kernels.experiments.run import SETTINGS, trained

Row = dict[str, Any]


def evidence(folder: Path, cache: Path | None) -> Iterator[Row]:
    """Rows of each method and metric, for all finished runs with wrong labels under a folder; names the others.

    Args:
        folder: With the output of `ntdne reproduce`.
        cache: For decoded images, as for `ntdne reproduce`.
    """
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
    """(Way to choose suspects or "", metric, value) of a verdict, given which labels (N,) are wrong."""
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
