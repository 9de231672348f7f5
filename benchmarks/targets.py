"""Whether the speed that the project aims at on a GPU, or on a CPU, is reached.

Shapes: B queries, N bank rows, D features, C classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks import grid
from benchmarks.busy import beside
from benchmarks.grid import UPDATE
from benchmarks.markdown import print_head, print_row
from benchmarks.rates import with_rates
from benchmarks.rows import CASE, OK

Measured = Callable[..., float]
"""(provider, column of `benchmarks.rates`, else "seconds") → the value in a case, NaN where it was not measured."""


class Target(NamedTuple):
    """A limit, and what was found."""

    says: str
    case: grid.Case
    found: float
    """NaN where it, or what it is compared with, was not measured or failed."""
    limit: float
    is_least: bool
    unit: str

    @property
    def held(self) -> bool:
        """Whether the limit is kept: NaN keeps none."""
        return self.found >= self.limit if self.is_least else self.found <= self.limit


def print_targets(rows: pd.DataFrame) -> None:
    """A line for each target of the device that the rows are of."""
    rows = with_rates(rows)
    judged = list(targets(rows) if rows.device_50.notna().any() else cpu_targets(rows))
    print(f"{sum(target.held for target in judged)} of {len(judged)} hold\n")
    print_head(["target", "B", "N", "classes", "dtype", "found", "holds"])
    for target in judged:
        shape = [f"{target.case.B:,}", f"{target.case.N:,}", f"{target.case.C:,}", target.case.dtype]
        value = "not measured" if np.isnan(target.found) else f"{target.found:.3g} {target.unit}"
        print_row([target.says, *shape, value, "yes" if target.held else "**no**"])


def targets(rows: pd.DataFrame) -> Iterator[Target]:
    """Judge rows of a GPU with their rates.

    The device's clock counts. Only for small banks, where launches take longest, it is the time that a user waits.
    """
    for case in grid.targets():
        in_case, measured = _in_case(rows, case)
        if case.what == UPDATE:
            yield from _of_update(case, measured)
        elif case.N == 10**4:
            ratio = measured("naive", "wall_50") / measured("triton", "wall_50")
            yield Target("no slower than naive, launches included", case, ratio, 1, True, "×")
        else:
            attention = in_case.seconds[in_case.index.str.startswith("SDPA")].min()
            yield from _of_large_bank(case, measured, attention)


def cpu_targets(rows: pd.DataFrame) -> Iterator[Target]:
    """Judge rows of a CPU with their rates."""
    for case in grid.cpu_targets():
        _, measured = _in_case(rows, case)
        ours = measured("streaming")
        yield Target("no slower than naive", case, measured("naive") / ours, 1, True, "×")
        if (case.B, case.N) == (256, 5 * 10**5):
            least = 80 if case.dtype == "float32" else 75
            share = 100 * measured("streaming", "flops_share")
            yield Target(f"at least {least} % of the matrix rate", case, share, least, True, "%")
            loaded = case._replace(busy=2)
            ratio = _in_case(rows, loaded)[1]("streaming") / ours
            yield Target(f"at most 2.2 × as long{beside(2)}", loaded, ratio, 2.2, False, "×")
            yield Target("at most 64 MB of memory", case, measured("streaming", "peak_bytes") / 2**20, 64, False, "MB")


def _in_case(rows: pd.DataFrame, case: grid.Case) -> tuple[pd.DataFrame, Measured]:
    """The rows of a case that ran, by provider, and what they say."""
    in_case = rows[(rows[CASE] == list(case)).all(axis=1) & (rows.outcome == OK)].set_index("provider")

    def measured(provider: str, column: str = "seconds") -> float:
        return float(in_case[column].get(provider, np.nan))

    return in_case, measured


def _of_update(case: grid.Case, measured: Measured) -> Iterator[Target]:
    ours = measured("ours")
    yield Target("update in at most 10 µs", case, 1e6 * ours, 10, False, "µs")
    yield Target("update at least 5 × as fast as PyTorch", case, measured("PyTorch") / ours, 5, True, "×")


def _of_large_bank(case: grid.Case, measured: Measured, attention: float) -> Iterator[Target]:
    """`attention`: seconds of the fastest forward pass."""
    ours = measured("triton")
    if case.B >= 256 and case.N < 10**8:
        limit = 1.5 if case.C == 2 else 0.8 if case.B == 256 else 0.75
        yield Target(f"at most {limit} × attention's forward", case, ours / attention, limit, False, "×")
    if case.B >= 1024 and case.C == 45:
        share = 100 * measured("triton", "flops_share")
        yield Target("at least 70 % of the matrix rate", case, share, 70, True, "%")
    if case.B <= 64:
        least = 85 if case.B == 64 else 75
        share = 100 * measured("triton", "bandwidth_share")
        yield Target(f"at least {least} % of bandwidth", case, share, least, True, "%")
    if (case.B, case.N) == (256, 10**8):
        yield Target("in at most 18 ms", case, 1e3 * ours, 18, False, "ms")
    if (case.B, case.N, case.C) == (256, 10**6, 45):
        for name, least in (("naive", 15), ("naive, compiled", 5)):
            yield Target(f"at least {least} × as fast as {name}", case, measured(name) / ours, least, True, "×")
    if case.N == 10**8:
        yield Target("at most 64 MB of memory", case, measured("triton", "peak_bytes") / 2**20, 64, False, "MB")
