"""Which runs make the tables, in an order in which an interrupted grid is balanced.

Learning rates are chosen by `held_out`: the K-NN accuracy of validation images whose labels are made wrong by the same
process. That is done for each loss and kind of noise, at one rate of noise and with one seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from benchmarks.frozen.losses import AUDITED, COMPARED, OURS, TUNED
from benchmarks.frozen.problem import Column
from benchmarks.frozen.results import Run

COLUMNS = [
    *(Column("uniform", 0.5), Column("label-dependent", 0.3), Column("uniform", 0.7), Column("uniform", 0.1)),
    *(Column("uniform", 0.3), Column("label-dependent", 0.5), Column("label-dependent", 0.1)),
]
CHOSEN_AT = {"uniform": COLUMNS[0], "label-dependent": COLUMNS[1]}
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
BEYOND = {LEARNING_RATES[0]: 0.001, LEARNING_RATES[-1]: 1.0}  # tried where the best lies at the end
COMMON = 0.01
TRIED_BY_HAND = (0.1, 0.3)  # learning rates of NTDNE without division, which needs ten times cross-entropy's


class Scope(NamedTuple):
    """The part of the grid that a command asks for."""

    methods: Sequence[str] = tuple(COMPARED)
    columns: Sequence[Column] = tuple(COLUMNS)
    seeds: Sequence[int] = tuple(range(5))

    @property
    def noises(self) -> list[str]:
        """The kinds of noise, in the order of the columns."""
        return list(dict.fromkeys(column.noise for column in self.columns))


def chosen(rows: pd.DataFrame, method: str, noise: str) -> float | None:
    """The learning rate of the best held-out accuracy, of equal ones the lowest; None where none was tried."""
    at = CHOSEN_AT[noise]
    tried = rows[(rows.method == method) & (rows.noise == noise) & (rows.rate == at.rate) & (rows.seed == 0)]
    tried = tried[tried.held_out.notna()].sort_values("lr")
    return float(tried.lr[tried.held_out.idxmax()]) if len(tried) else None


def learning_rates(scope: Scope, rows: pd.DataFrame) -> Iterator[Run]:
    """The runs by which learning rates are chosen."""
    for noise in scope.noises:
        for lr in LEARNING_RATES:
            for method in scope.methods:
                yield Run(*CHOSEN_AT[noise], 0, method, lr)


def beyond(scope: Scope, rows: pd.DataFrame) -> Iterator[Run]:
    """One more learning rate for each loss whose best is at an end."""
    for noise in scope.noises:
        for method in scope.methods:
            best = chosen(rows, method, noise)
            if best in BEYOND:
                yield Run(*CHOSEN_AT[noise], 0, method, BEYOND[best])


def grid(scope: Scope, rows: pd.DataFrame) -> Iterator[Run]:
    """Seed by seed, each loss with its own learning rate and ours with the common one; then the others with that."""
    for seed in scope.seeds:
        for column in scope.columns:
            for method in scope.methods:
                if method == OURS:
                    yield Run(*column, seed, OURS, COMMON)
                lr = chosen(rows, method, column.noise)
                if lr is not None:
                    yield Run(*column, seed, method, lr)
    for seed in scope.seeds:
        for column in scope.columns:
            for method in scope.methods:
                yield Run(*column, seed, method, COMMON)


def by_hand(scope: Scope, rows: pd.DataFrame) -> Iterator[Run]:
    """NTDNE as one would tune it by hand, beside its default with the common learning rate; also without noise."""
    for seed in scope.seeds:
        for column in [*scope.columns, Column("uniform", 0.0)]:
            yield Run(*column, seed, OURS, COMMON)
            for method in TUNED:
                for lr in TRIED_BY_HAND:
                    yield Run(*column, seed, method, lr)


def audited(scope: Scope, rows: pd.DataFrame) -> Iterator[Run]:
    """Losses after an audit, beside the same with the labels as they are given; all with the common learning rate."""
    for seed in scope.seeds:
        for column in scope.columns:
            for after, (method, _) in AUDITED.items():
                if method in scope.methods:
                    yield Run(*column, seed, method, COMMON)
                    yield Run(*column, seed, after, COMMON)


STAGES: dict[str, list[Callable[[Scope, pd.DataFrame], Iterator[Run]]]] = {
    "rates": [learning_rates, beyond],
    "grid": [grid],
    "by-hand": [by_hand],
    "audited": [audited],
}
"""What is run one after the other, since a stage needs the rows of those before."""
