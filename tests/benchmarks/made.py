"""Rows of results of a made machine."""

import pandas as pd

from benchmarks import rows
from benchmarks.grid import GRADIENT, PRODUCTS, TRAFFIC


def made_rows(*found: dict) -> pd.DataFrame:
    """Rows of a machine that multiplies at 1 TFLOP/s and reads at 0.1 TB/s."""
    side = 1000
    shared = dict.fromkeys(rows.COLUMNS, "") | dict.fromkeys(rows.TIMES) | {"error": None}
    given = [
        {"what": PRODUCTS, "B": side, "N": side, "D": side, "provider": "product", "wall_50": 2 * side**3 / 1e12},
        {"what": TRAFFIC, "B": 1, "N": 10**6, "D": 100, "provider": "reading", "wall_50": 2e-3},
        *found,
    ]
    same = {"C": 45, "dtype": "bfloat16", "busy": 0, "outcome": "ok", "peak_bytes": 1 << 20, "machine": "here"}
    return pd.DataFrame([shared | same | row for row in given]).astype({column: float for column in rows.TIMES})


def timed(provider: str, B: int, N: int, seconds: float, **more) -> dict:
    """A row of `made_rows`."""
    shape = {"what": GRADIENT, "B": B, "N": N, "D": 128, "provider": provider}
    return shape | {"wall_50": 2 * seconds, "device_50": seconds} | more
