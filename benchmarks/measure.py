"""Measure the time, memory and error of all providers of a case, and keep the rows in a file after each case.

Shapes: B queries, N bank rows, D features, C classes.
"""

import datetime
import gc
import time
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks import checks, contract, machine, memory, problems, providers, rows, steps, timing
from benchmarks.busy import beside, busy
from benchmarks.contract import Call, NotSupported, Provider
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC, TRAINING, UPDATE, Case
from benchmarks.rows import CASE, COLUMNS, FAILED, NOT_RUN, NOT_SUPPORTED, OK, OUT_OF_MEMORY, WRONG

PROVIDERS: dict[str, dict[str, Provider]] = {
    PRODUCTS: providers.PRODUCT,
    TRAFFIC: providers.TRAFFIC,
    LOSS: providers.PROVIDERS,
    GRADIENT: providers.PROVIDERS,
    UPDATE: steps.UPDATES,
    TRAINING: steps.TRAINING,
}
NAMES = list(dict.fromkeys(name for by_name in PROVIDERS.values() for name in by_name))
REPLAYS = 20
Row = dict[str, Any]


class Limits(NamedTuple):
    """How long to measure."""

    minutes: float
    """No case begins after so many."""
    seconds: float
    """Of timed calls that each provider gets in a case."""
    longest: float
    """Seconds. A call that is expected to take longer is left out."""


class BrokenContextError(Exception):
    """A provider has left the GPU's context in a state in which no further call can be made."""

    def __init__(self, row: Row) -> None:
        super().__init__(row["provider"])
        self.row = row


def measure(
    cases: Iterable[Case], chosen: Collection[str], device: str, path: Path, limits: Limits, *, again: bool = False
) -> None:
    """Go through the cases that the file lacks, or all of them again, until the minutes are over.

    A case is measured as a whole, so that all of its rows are from one run. Only what failed before is left out: a
    fault of the GPU ends the process, and the same command, started again, goes on behind it.
    """
    start, here = time.monotonic(), machine.describe(device)
    known = rows.read(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    _check_machine(known, here, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # else each of the many collections looks at all that was imported
    for case in cases:
        in_case = (known[CASE] == list(case)).all(axis=1)
        names = _to_measure(case, chosen, known[in_case], again)
        if not names:
            continue
        if time.monotonic() - start > 60 * limits.minutes:
            print(f"{limits.minutes:g} minutes are over; the same command goes on with {describe(case)}")
            return
        begun, broken = time.monotonic(), False
        try:
            found = measure_case(case, names, device, limits, known)
        except BrokenContextError as error:
            found, broken = [error.row], True
        stamp = {"measured": datetime.datetime.now().isoformat(timespec="seconds")}
        new = pd.DataFrame([{**case._asdict(), **row, **here, **stamp} for row in found], columns=COLUMNS)
        kept = known[~(in_case & known.provider.isin(new.provider))]
        known = new if kept.empty else pd.concat([kept, new], ignore_index=True)
        rows.write(known, path)
        if broken:
            fault = found[0]["provider"]
            raise SystemExit(f"{describe(case)}: {fault} broke the GPU's context; start the command again")
        print(f"{describe(case)}: {summary(found)}; {time.monotonic() - begun:.0f} s", flush=True)


def _check_machine(known: pd.DataFrame, here: dict[str, str], path: Path) -> None:
    """Refuse to mix machines in a file."""
    for column, value in here.items():
        # A machine's driver is patched, and the peers beside the same torch are renewed.
        if column not in ("driver", "libraries") and len(known) and set(known[column]) != {value}:
            raise SystemExit(f"{path}: measured with {column} {known[column].iloc[0]!r}, here it is {value!r}")


def _to_measure(case: Case, chosen: Collection[str], known: pd.DataFrame, again: bool) -> list[str]:
    """The providers of a case: none where its rows are complete, else the chosen and known ones that did not fail.

    What the machine can do is measured whatever is chosen: the tables need it.
    """
    wanted = {name for name in PROVIDERS[case.what] if name in chosen or case.what in (PRODUCTS, TRAFFIC)}
    if wanted <= set(known.provider) and not again:
        return []
    failed = set() if again else set(known.provider[known.outcome == FAILED])
    return [name for name in PROVIDERS[case.what] if name in (wanted | set(known.provider)) - failed]


def measure_case(case: Case, names: list[str], device: str, limits: Limits, known: pd.DataFrame) -> list[Row]:
    """A row for each provider, without the columns that all rows of a run share.

    Raises:
        BrokenContextError: of the provider after which no further call can be made.
    """
    torch.compiler.reset()  # else the shapes before count towards its limit
    found: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    with contract.arithmetic(case.dtype):
        try:
            problem = problems.make(*case[1:5], contract.DTYPES[case.dtype], device)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return [{"provider": name, "outcome": OUT_OF_MEMORY, "why": "the bank"} for name in names]
        for name in names:
            expected = _expected_seconds(case, name, known)
            if expected > limits.longest:
                found[name] = {"outcome": NOT_RUN, "why": f"some {expected:.2g} s"}
                continue
            try:
                calls[name], found[name] = _first_calls(case, name, problem, device)
            except Exception as error:
                found[name] = _row_of_error(name, error, device)
            if found[name]["outcome"] != OK:
                calls.pop(name, None)
                _free(device)
        for name, times in _time(case, calls, device, limits.seconds).items():
            found[name] = found[name] | times if "outcome" not in times else times
        calls.clear()
        _free(device)
    return [{"provider": name, **row} for name, row in found.items()]


def _first_calls(case: Case, name: str, problem: problems.Problem, device: str) -> tuple[Call, Row]:
    """The call to time, and its outcome, error and memory."""
    provider = PROVIDERS[case.what][name]
    call = provider.prepare(problem, case.what == GRADIENT)
    if provider.result == "update":
        before = problem.bank[problem.index]
        call()
        error: float | None = checks.error_of_update(before, problem.bank[problem.index], problem.features.detach())
    else:
        error = checks.error(provider.result, call(), problem)
    wrong = error is not None and error > checks.LARGEST_ERROR[case.dtype]
    row = {"outcome": WRONG if wrong else OK, "why": f"error {error:.1e}" if wrong else "", "error": error}
    return call, row | {"peak_bytes": memory.added_by(call, device)}


def _time(case: Case, calls: dict[str, Call], device: str, seconds: float) -> dict[str, Row]:
    """The times of each call beside the case's busy processes, or the outcome of one that failed after all."""
    with busy(case.busy):
        timed, failed = timing.in_turns(calls, device, seconds)
    found: dict[str, Row] = {}
    for name, times in timed.items():
        on_device = times.device
        if device == "cuda" and case.what == UPDATE:
            try:
                on_device = timing.replayed(calls[name], steps.BATCHES, REPLAYS)
            except Exception as error:
                failed[name] = error
        found[name] = {"calls": len(times.wall), **_quantiles("wall", times.wall), **_quantiles("device", on_device)}
    return found | {name: _row_of_error(name, error, device) for name, error in failed.items()}


def _row_of_error(name: str, error: Exception, device: str) -> Row:
    """How a provider ended; raises where the device has ended with it."""
    if isinstance(error, NotSupported):
        row = {"outcome": NOT_SUPPORTED, "why": str(error)}
    else:
        out_of_memory = _is_out_of_memory(error)
        if not out_of_memory:
            traceback.print_exception(error)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        row = {"outcome": OUT_OF_MEMORY if out_of_memory else FAILED, "why": why}
    if _is_broken(device):
        raise BrokenContextError({"provider": name, **row})
    return row


def _is_broken(device: str) -> bool:
    """Whether an error has left the GPU's context in a state in which no further call can be made."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _expected_seconds(case: Case, name: str, known: pd.DataFrame) -> float:
    """By the B·N of the largest smaller case of the same kind; 0 where there is none."""
    kind = ["what", "D", "dtype", "busy"]
    same_kind = (known[kind] == [case.what, case.D, case.dtype, case.busy]).all(axis=1)
    smaller = known[same_kind & (known.provider == name) & (known.outcome == OK)]
    smaller = smaller[smaller.B * smaller.N < case.B * case.N]
    if case.what not in (LOSS, GRADIENT) or smaller.empty:
        return 0
    work = smaller.B * smaller.N
    largest = smaller.loc[work.idxmax()]
    return float(largest.wall_50) * case.B * case.N / float(work.max())


def _quantiles(clock: str, seconds: list[float]) -> Row:
    if not seconds:
        return {}
    return {f"{clock}_{q}": value for q, value in zip((20, 50, 80), timing.quantiles(seconds), strict=True)}


def _is_out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    words = ("out of memory", "not enough memory", "can't alloc", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in message for word in words)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe(case: Case) -> str:
    """A case in words."""
    shape = f"B = {case.B:,}, N = {case.N:,}, D = {case.D}, {case.C:,} classes"
    return f"{case.what}, {shape}, {case.dtype}{beside(case.busy)}"


def summary(found: list[Row]) -> str:
    """The fastest provider, and how the others ended."""
    ok = [row for row in found if row["outcome"] == OK]
    others = pd.Series([row["outcome"] for row in found if row["outcome"] != OK], dtype=str).value_counts()
    fastest = min(ok, key=lambda row: row["wall_50"], default=None)
    best = "nothing ran" if fastest is None else f"{fastest['provider']} {1e3 * fastest['wall_50']:.3g} ms of {len(ok)}"
    return ", ".join([best, *(f"{count} {outcome}" for outcome, count in others.items())])
