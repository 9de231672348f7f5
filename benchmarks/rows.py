"""The files of results that `measure` writes: a row for each provider of a case, with how it ended.

A row has the case (`benchmarks.grid.Case`), the provider, and what is below. A file without the column `busy` of the
case is of idle machines alone.

    outcome             one of the outcomes below; `why` explains all but "ok"
    calls               how many calls were timed
    wall_20, _50, _80   quantiles of the seconds that a user waits for a call
    device_20, ...      the same by the device's clock; empty on a CPU
    peak_bytes          of memory that a call adds to bank and queries
    error               relative, against float64 (`benchmarks.checks`); empty where nothing is compared
    machine ... python  what it ran on (`benchmarks.machine`), and what computes for the peers: `libraries`
    measured            date and time
"""

from pathlib import Path

import pandas as pd

from benchmarks.grid import Case

OK, OUT_OF_MEMORY, WRONG, FAILED = "ok", "out of memory", "wrong", "failed"
NOT_SUPPORTED, NOT_RUN = "not supported", "not run"
"""Outcomes. Wrong: an error beyond `checks.LARGEST_ERROR`. Not run: it would have taken too long."""
CASE = list(Case._fields)
TIMES = [f"{clock}_{quantile}" for clock in ("wall", "device") for quantile in (20, 50, 80)]
COLUMNS = [
    *CASE, "provider", "outcome", "why", "calls", *TIMES, "peak_bytes", "error",
    "machine", "driver", "torch", "triton", "cuda", "python", "libraries", "measured",
]  # fmt: skip
NUMBERS = ["calls", *TIMES, "peak_bytes", "error"]


def read(path: Path) -> pd.DataFrame:
    """The rows of a file, with NaN for an empty number and "" for an empty text."""
    integers = dict.fromkeys(("B", "N", "D", "C", "busy"), int)
    text = {column: str for column in COLUMNS if column not in (*integers, *NUMBERS)}
    numbers = dict.fromkeys(NUMBERS, float)
    missing = {column: [""] for column in NUMBERS}
    rows = pd.read_csv(path, dtype=integers | text | numbers, keep_default_na=False, na_values=missing)
    return rows.assign(busy=rows.get("busy", 0))[COLUMNS]


def write(rows: pd.DataFrame, path: Path) -> None:
    """Replace the file by these rows."""
    replace(rows if rows.busy.any() else rows.drop(columns="busy"), path)


def replace(rows: pd.DataFrame, path: Path) -> None:
    """Replace a file at once, so that a kill leaves the old one or the new one."""
    written = path.with_suffix(".new")
    rows.to_csv(written, index=False, float_format="%.6g")
    written.replace(path)


def merge(new: pd.DataFrame, path: Path) -> None:
    """Add rows to a file. They replace those of the same case and provider."""
    parts = [read(path), new] if path.exists() else [new]
    write(pd.concat(parts, ignore_index=True).drop_duplicates([*CASE, "provider"], keep="last"), path)
