"""How many wrong labels a reviewer finds by n decisions, by the order in which the images are looked at.

Labels are made wrong by known noise; the reviewer decides as the right labels say. After each of a few rounds the audit
is made again with the decisions. Its pass over all pairs is made once for the features and kept as N×N weights, from
which every audit sums up its classes: 400 MB for 10,000 images, where a pass would take 8 s.

Shapes: N images, D features, C classes, B queries.
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from statistics import median_low
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.audit.features import Features, read_rows, transition, write_rows
from ntdne_kernels import audit
from ntdne_kernels.audit import LabelAudit, choose_sigma, feature_bank
from ntdne_kernels.audit.neighbourhood import own_range
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.experiments import noise

NOISES = [("uniform", 0.1), ("uniform", 0.3), ("label-dependent", 0.1), ("label-dependent", 0.3)]
ROUNDS = (0, 100, 200, 500, 750, 1000, 1500, 2000)
"""Decisions after which the audit is made again."""


class Reviewer(NamedTuple):
    """What is known after some decisions."""

    given: Tensor
    """(N,) labels."""
    true: Tensor
    """(N,)"""
    order: Tensor
    """(n,) images decided on."""

    @property
    def checked(self) -> Tensor:
        """(N,) bool."""
        return torch.zeros(len(self.given), dtype=torch.bool).index_fill_(0, self.order, True)


class Weights:
    """exp(f_i·f_j/σ) of all pairs, and sums of them in the place of `class_log_sums`."""

    def __init__(self, features: Tensor, sigma: float) -> None:
        rows = torch.nn.functional.normalize(features, dim=1)
        self.sigma = sigma
        self.values = (rows @ rows.t()).div_(sigma).fill_diagonal_(-torch.inf)
        self.highest = self.values.amax(dim=1, keepdim=True)
        self.values.sub_(self.highest).exp_()
        self.bank: MemoryBank | None = None

    def class_log_sums(self, bank: MemoryBank, rows: Tensor, sigma: float, backend: str | None) -> Tensor:
        """(B, 1 + C) as `neighbourhood.class_log_sums`."""
        if bank is not self.bank:
            every = torch.arange(len(bank))
            columns = torch.zeros(len(bank), len(bank.classes) + 1)
            columns[every, own_range(bank, bank.positions(every))] = 1.0
            self.bank, self.sums = bank, (self.values @ columns).double().log() + self.highest
        return self.sums[bank.order[rows]]


def audit_again(features: Tensor, weights: Weights, known: Reviewer) -> LabelAudit:
    """The audit with the decisions so far."""
    checked = known.checked
    labels = torch.where(checked, known.true, known.given)
    no_sample = torch.empty(0, dtype=torch.int64), torch.empty((0, 0), dtype=torch.int64)
    with (
        patch("ntdne_kernels.audit.judgement.class_log_sums", weights.class_log_sums),
        # Doubt and copies play no part.
        patch("ntdne_kernels.audit.sample_neighbours", lambda bank, labels: no_sample),
        patch("ntdne_kernels.audit.find_duplicates", lambda bank: torch.full((len(bank),), -1)),
    ):
        return audit.audit_labels(features, labels, sigma=weights.sigma, checked=checked, given=known.given)


def by_ranking(found: LabelAudit) -> Tensor:
    """As the audit has it."""
    return found.ranking


def by_quality(found: LabelAudit) -> Tensor:
    """By the shares alone: checked labels count as they now are, and nothing is learned of the noise."""
    quality = found.log_ratio.nan_to_num(nan=torch.inf).masked_fill(found.checked, torch.inf)
    return quality.argsort(stable=True)


ORDERS: dict[str, Callable[[LabelAudit], Tensor]] = {"ours": by_ranking, "by quality": by_quality}
"""The next images by an audit."""


def review(archive: Features, seeds: int, path: Path) -> None:
    """Add the rows that `path` lacks: of each order, seed, noise and number of decisions."""
    rows = read_rows(path) if path.exists() else []
    done = {(row["dataset"], row["order"], row["seed"], row["noise"], row["rate"]) for row in rows}
    weights = None
    for order, seed, (kind, rate) in product(["fixed", "random", *ORDERS], range(seeds), NOISES):
        run = {"dataset": archive.name, "noise": kind, "rate": str(rate), "seed": str(seed), "order": order}
        if (archive.name, order, str(seed), kind, str(rate)) in done:
            continue
        weights = weights or Weights(archive.rows, middle_sigma(archive))
        made = noise.corrupt(archive.labels, transition(archive.classes, kind, rate), seed)
        known = Reviewer(made.labels, archive.labels, torch.empty(0, dtype=torch.int64))
        for n, metric, value in _curve(archive.rows, weights, known, order, seed):
            rows.append(run | {"decisions": str(n), "metric": metric, "value": value})
        write_rows(rows, path)
        print(*run.values(), flush=True)


def middle_sigma(archive: Features) -> float:
    """One for all noises, as the weights are made once: the middle one of those that their labels choose."""
    made = [noise.corrupt(archive.labels, transition(archive.classes, *each), seed=0) for each in NOISES]
    return median_low(choose_sigma(feature_bank(archive.rows, noisy.labels)) for noisy in made)


def _curve(
    features: Tensor, weights: Weights, known: Reviewer, order: str, seed: int
) -> Iterator[tuple[int, str, float]]:
    """(Decisions, metric, value): wrong labels found, and what the audit says of how many there are."""
    wrong = known.given != known.true
    yield 0, "images", len(wrong)
    yield 0, "wrong", int(wrong.sum())
    rounds = [n for n in ROUNDS if n <= len(wrong)]
    if order in ("fixed", "random"):
        shuffled = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))
        chosen = audit_again(features, weights, known).ranking if order == "fixed" else shuffled
        for n in rounds:
            yield n, "found", int(wrong[chosen[:n]].sum())
        return
    for n, after in pairwise([*rounds, rounds[-1]]):
        found = audit_again(features, weights, known)
        yield n, "found", int(wrong[known.order].sum())
        yield n, "estimated", found.noise_rate * len(wrong)
        yield n, "calibrated", float(not found.uncalibrated)
        blind = dataclasses.replace(found, checked=torch.zeros_like(found.checked), decided=found.labels)
        yield n, "estimated without calibration", blind.noise_rate * len(wrong)
        known = known._replace(order=torch.cat([known.order, ORDERS[order](found)[: after - n]]))
