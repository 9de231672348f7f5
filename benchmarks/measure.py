"""Times, memory and errors of all providers of a case, as rows of a table that is kept in a file.

Shapes: B queries, N bank rows, D features, C classes.
"""

import datetime
import gc
import platform
import re
import shutil
import subprocess
import time
import traceback
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton

from benchmarks import checks, memory, problems, providers, steps, timing
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC, TRAINING, UPDATE, Case
from benchmarks.providers import NotSupported, Provider

PROVIDERS: dict[str, dict[str, Provider]] = {
    PRODUCTS: providers.PRODUCT,
    TRAFFIC: providers.TRAFFIC,
    LOSS: providers.PROVIDERS,
    GRADIENT: providers.PROVIDERS,
    UPDATE: steps.UPDATES,
    TRAINING: steps.TRAINING,
}
NAMES = list(dict.fromkeys(name for of_what in PROVIDERS.values() for name in of_what))
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
PEERS = ("liger-kernel", "cut-cross-entropy")
REPLAYS = 20
Row = dict[str, Any]


def machine(device: str) -> Row:
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        known = shutil.which(asked[0]) is not None
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0] if known else ""
        here = {"machine": torch.cuda.get_device_name(), "driver": driver}
    else:
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = cpu[1] if cpu else platform.machine()
        features = torch.backends.cpu.get_cpu_capability()
        here = {"machine": f"{name}, {torch.get_num_threads()} threads, {features}", "driver": ""}
    libraries = [f"cuDNN {torch.backends.cudnn.version()}"] if device == "cuda" else []
    for distribution in metadata.distributions():
        if distribution.name in PEERS:
            libraries.append(f"{distribution.name} {distribution.version}")
    return here | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": (device == "cuda" and torch.version.cuda) or "",
        "python": platform.python_version(),
        "libraries": ", ".join(libraries),
    }


def read(path: Path) -> pd.DataFrame:
    integers = dict.fromkeys(("B", "N", "D", "C"), int)
    text = {column: str for column in COLUMNS if column not in (*integers, *NUMBERS)}
    numbers = dict.fromkeys(NUMBERS, float)
    missing = {column: [""] for column in NUMBERS}
    return pd.read_csv(path, dtype=integers | text | numbers, keep_default_na=False, na_values=missing)


def write(rows: pd.DataFrame, path: Path) -> None:
    written = path.with_suffix(".new")
    rows.to_csv(written, index=False, float_format="%.6g")
    written.replace(path)


def merge(new: pd.DataFrame, path: Path) -> None:
    """Into the rows of a file, in place of those of the same cases and providers."""
    parts = [read(path), new] if path.exists() else [new]
    write(pd.concat(parts, ignore_index=True).drop_duplicates([*CASE, "provider"], keep="last"), path)


def measure(
    cases: Iterable[Case],
    chosen: Collection[str],
    device: str,
    path: Path,
    *,
    minutes: float,
    seconds: float,
    longest: float,
    again: bool = False,
) -> None:
    """Go through the cases that the file lacks, or all of them again, until the minutes are over.

    A case is measured as a whole, so that all of its rows are from one run, but for what failed before: after a fault
    of the GPU, which ends the process, the command is to be started again.
    """
    start, here = time.monotonic(), machine(device)
    rows = read(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    for column, value in here.items():
        # One machine has several patches of its driver, and what others compute with at one time and not at another.
        if column not in ("driver", "libraries") and len(rows) and set(rows[column]) != {value}:
            raise SystemExit(f"{path}: measured with {column} {rows[column].iloc[0]!r}, here it is {value!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # else each of the many collections looks at all that was imported
    for case in cases:
        of_case = (rows[CASE] == list(case)).all(axis=1)
        known = rows[of_case]
        names = [name for name in PROVIDERS[case.what] if name in chosen or case.what in (PRODUCTS, TRAFFIC)]
        if set(names) <= set(known.provider) and not again:
            continue
        if time.monotonic() - start > 60 * minutes:
            print(f"{minutes:g} minutes are over; the same command goes on with {describe(case)}")
            return
        failed = set() if again else set(known.provider[known.outcome == FAILED])
        names = [name for name in PROVIDERS[case.what] if name in {*names, *known.provider} - failed]
        begun = time.monotonic()
        found, fault = measure_case(case, names, device, seconds, longest, rows)
        stamp = {"measured": datetime.datetime.now().isoformat(timespec="seconds")}
        new = pd.DataFrame([{**case._asdict(), **row, **here, **stamp} for row in found], columns=COLUMNS)
        kept = rows[~(of_case & rows.provider.isin(new.provider))]
        rows = new if kept.empty else pd.concat([kept, new], ignore_index=True)
        write(rows, path)
        if fault is not None:
            raise SystemExit(f"{describe(case)}: {fault} broke the GPU's context; start the command again")
        print(f"{describe(case)}: {summary(found)}; {time.monotonic() - begun:.0f} s", flush=True)


def measure_case(
    case: Case, names: list[str], device: str, seconds: float, longest: float, rows: pd.DataFrame
) -> tuple[list[Row], str | None]:
    """A row for each provider, without what all rows of a run share; or that of the one which broke the GPU, and it."""
    torch.compiler.reset()  # else the shapes before count towards its limit
    found: dict[str, Row] = {}
    calls: dict[str, providers.Run] = {}
    with providers.arithmetic(case.dtype):
        try:
            problem = problems.make(*case[1:5], providers.DTYPES[case.dtype], device)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return [{"provider": name, "outcome": OUT_OF_MEMORY, "why": "the bank"} for name in names], None
        for name in names:
            provider = PROVIDERS[case.what][name]
            expected = _expected(case, name, rows)
            if expected > longest:
                found[name] = {"outcome": NOT_RUN, "why": f"some {expected:.2g} s"}
                continue
            try:
                calls[name] = provider.prepare(problem, case.what == GRADIENT)
                found[name] = _looked_at(provider.result, calls[name], problem, case.dtype)
                found[name]["peak_bytes"] = memory.added_by(calls[name], device)
            except Exception as error:
                found[name] = _ended(error)
                if _is_broken(device):
                    return [{"provider": name, **found[name]}], name
            if found[name]["outcome"] != OK:
                calls.pop(name, None)
                _free(device)
        timed, failed = timing.in_turns(calls, device, seconds)
        for name, times in timed.items():
            found[name] |= {"calls": len(times.wall), **_quantiles("wall", times.wall)}
            on_device = times.device
            if device == "cuda" and case.what == UPDATE:
                try:
                    on_device = timing.replayed(calls[name], steps.BATCHES, REPLAYS)
                except Exception as error:
                    failed[name] = error
            found[name] |= _quantiles("device", on_device)
        for name, error in failed.items():
            found[name] = _ended(error)
            if _is_broken(device):
                return [{"provider": name, **found[name]}], name
        calls.clear()
        _free(device)
    return [{"provider": name, **row} for name, row in found.items()], None


def _looked_at(result: str, call: providers.Run, problem: problems.Problem, dtype: str) -> Row:
    """The outcome of the first call."""
    if result == "update":
        before = problem.bank[problem.index]
        call()
        error = checks.updated(before, problem.bank[problem.index], problem.features.detach())
    else:
        error = checks.error(result, call(), problem)
    wrong = error is not None and error > checks.LARGEST_ERROR[dtype]
    return {"outcome": WRONG if wrong else OK, "why": f"error {error:.1e}" if wrong else "", "error": error}


def _ended(error: Exception) -> Row:
    if isinstance(error, NotSupported):
        return {"outcome": NOT_SUPPORTED, "why": str(error)}
    out_of_memory = _is_out_of_memory(error)
    if not out_of_memory:
        traceback.print_exception(error)
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return {"outcome": OUT_OF_MEMORY if out_of_memory else FAILED, "why": why}


def _is_broken(device: str) -> bool:
    """Whether an error has left a GPU's context of which no further call can be made."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _expected(case: Case, name: str, rows: pd.DataFrame) -> float:
    """Seconds, by the B·N of the largest smaller case of the same kind; 0 where there is none."""
    like = rows[(rows[["what", "D", "dtype"]] == [case.what, case.D, case.dtype]).all(axis=1) & (rows.provider == name)]
    like = like[(like.outcome == OK) & (like.B * like.N < case.B * case.N)]
    if case.what in (PRODUCTS, TRAFFIC, UPDATE, TRAINING) or like.empty:
        return 0
    work = like.B * like.N
    largest = like.loc[work.idxmax()]
    return float(largest.wall_50) * case.B * case.N / float(work.max())


def _quantiles(clock: str, seconds: list[float]) -> Row:
    if not seconds:
        return {}
    return {f"{clock}_{q}": value for q, value in zip((20, 50, 80), timing.quantiles(seconds), strict=True)}


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    words = ("out of memory", "not enough memory", "can't alloc", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in said for word in words)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe(case: Case) -> str:
    return f"{case.what}, B = {case.B:,}, N = {case.N:,}, D = {case.D}, {case.C:,} classes, {case.dtype}"


def summary(found: list[Row]) -> str:
    """The fastest, and how the others ended."""
    ok = [row for row in found if row["outcome"] == OK]
    others = pd.Series([row["outcome"] for row in found if row["outcome"] != OK], dtype=str).value_counts()
    fastest = min(ok, key=lambda row: row["wall_50"], default=None)
    best = "nothing ran" if fastest is None else f"{fastest['provider']} {1e3 * fastest['wall_50']:.3g} ms of {len(ok)}"
    return ", ".join([best, *(f"{count} {outcome}" for outcome, count in others.items())])
