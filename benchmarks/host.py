"""Measure what the host does for a step on a GPU.

python -m benchmarks host [--against CHECKOUT]

A step is timed from an idle device until Python has it back (queued) and until the device is idle again (done), and on
the device as a CUDA graph of it is replayed. Its launches (kernels, fills, copies) and its calls of PyTorch's operators
are counted. Without a GPU everything but the device's work happens (benchmarks/null_gpu.py): queued and the counts are
the host's, without the driver's own 2 to 4 µs for a launch.

Each package is measured in a process of its own (`benchmarks.host_worker`); with --against the two take turns. Of
`ntdne_kernels` only what its README names is used, so that older and newer versions can be compared.

Shapes: B queries, N bank rows.
"""

import contextlib
import datetime
import json
import math
import os
import select
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch

from benchmarks import null_gpu
from benchmarks.checkout import ROOT, program, version
from benchmarks.grid import GRADIENT
from benchmarks.host_worker import ENCODER, MODULE, STEPS
from benchmarks.markdown import print_head, print_row

BATCHES, ROWS = (64, 256), (10**4, 10**5)
ROUNDS, CALLS = 5, 40
LONGEST = 100
"""Seconds that a process may take to answer, compiling included."""
COLUMNS = [
    "what", "B", "N", "provider", "package", "why",
    *(f"{clock}_{quantile}" for clock in ("queued", "done", "replay") for quantile in (20, 50, 80)),
    "launches", "operators", "machine", "torch", "triton", "python", "measured",
]  # fmt: skip
Row = dict[str, Any]


def measure(batches: Iterable[int], rows: Iterable[int], against: Path | None, minutes: float, path: Path) -> None:
    """Measure each step with each package, and print and write its row at once. What compiles comes last.

    Args:
        batches: Values of B.
        rows: Values of N.
        against: Another checkout, to measure beside this one.
        minutes: No step begins after so many.
        path: Of the file, which is written anew.
    """
    begun = time.monotonic()
    checkouts = [ROOT, *([against.resolve()] if against is not None else [])]
    cases: list[Row] = [
        {"what": what, "B": B, "N": N, "provider": provider}
        for what, providers in STEPS.items() for N in rows for B in batches for provider in providers
    ]  # fmt: skip
    compiled = [case for case in cases if case["provider"].endswith("compiled")]
    eager = [case for case in cases if case not in compiled]
    found: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        packages = [stack.enter_context(Package(checkout)) for checkout in checkouts]
        for group in (eager, compiled):
            for case in group:
                if time.monotonic() - begun < 60 * minutes:
                    found += step(case, _that_differ(case, packages))
                    write(found, path)
            if group is eager:
                found = count(eager, packages, found)
                write(found, path)
    print_aims(pd.DataFrame(found, columns=COLUMNS))


def _that_differ(case: Row, packages: list["Package"]) -> list["Package"]:
    """All packages for our step; naive and the empty op are the same beside every package."""
    return packages if case["provider"].startswith("ours") else packages[:1]


def count(cases: list[Row], packages: list["Package"], found: list[Row]) -> list[Row]:
    """The rows with launches and operators, which are counted for one size and are the same for every size."""
    for case in (case for case in cases if (case["B"], case["N"]) == (cases[0]["B"], cases[0]["N"])):
        for package in _that_differ(case, packages):
            counts = package.ask(count=case)
            print(describe(case | {"package": package.name} | counts), flush=True)
            same = {"what": case["what"], "provider": case["provider"], "package": package.name}
            found = [row | counts if same.items() <= row.items() and "why" not in counts else row for row in found]
    for package in packages:
        package.end()  # a profiler may leave launches slower than they were
    return found


def write(found: list[Row], path: Path) -> None:
    """Write the rows as .csv."""
    pd.DataFrame(found, columns=COLUMNS).to_csv(path, index=False, float_format="%.6g")


def step(case: Row, packages: list["Package"]) -> list[Row]:
    """A row of a step for each package; the packages take turns."""
    rows = [package.ask(prepare=case) for package in packages]
    times: list[dict[str, list[float]]] = [{} for _ in packages]
    for turn in range(ROUNDS):
        for place in [(place + turn) % len(packages) for place in range(len(packages))]:
            if rows[place]["why"]:
                continue
            answer = packages[place].ask(calls=CALLS)
            rows[place]["why"] = answer.pop("why", "")
            for clock, seconds in answer.items():
                times[place].setdefault(clock, []).extend(seconds)
    stamp = datetime.datetime.now().isoformat(timespec="seconds")
    for package, row, by_clock in zip(packages, rows, times, strict=True):
        for clock, seconds in by_clock.items():
            low, *_, high = statistics.quantiles(seconds, n=5)
            row |= {f"{clock}_20": low, f"{clock}_50": statistics.median(seconds), f"{clock}_80": high}
        row |= case | {"package": package.name, "measured": stamp}
        print(describe(row), flush=True)
    return rows


def describe(row: Row) -> str:
    """A line with the case, and the median and lower fifth of its times in microseconds."""
    case = f"{row['what']}, B = {row['B']:,}, N = {row['N']:,}: {row['provider']} ({row['package']})"
    if row.get("why"):
        return f"{case}: {row['why']}"
    clocks = [clock for clock in ("queued", "done", "replay") if f"{clock}_50" in row]
    parts = [f"{clock} {1e6 * row[f'{clock}_50']:.0f} µs ({1e6 * row[f'{clock}_20']:.0f})" for clock in clocks]
    parts += [f"{row[counted]} {counted}" for counted in ("launches", "operators") if counted in row]
    return f"{case}: {', '.join(parts)}"


def print_aims(rows: pd.DataFrame) -> None:
    """A line for each speed that the project aims at, and whether each package reaches it."""
    print_head(["aim", "package", "B", "N", "found", "holds"])
    for row in rows[rows.provider.str.startswith("ours")].itertuples():
        for what, value, most, unit in _aims(row, rows.set_index(["what", "B", "N", "provider"])):
            found = "not measured" if math.isnan(value) else f"{value:.3g} {unit}"
            holds = "yes" if value <= most else "**no**"
            print_row([f"{what} at most {most}", row.package, f"{row.B:,}", f"{row.N:,}", found, holds])


def _aims(row: Any, by_case: pd.DataFrame) -> Iterator[tuple[str, float, float, str]]:
    """(What, the value found, the most it may be, its unit) of a row of ours, beside the rows of the same case."""
    beside = by_case[by_case.index == (row.what, row.B, row.N, "naive")]
    eager = by_case[(by_case.index == (row.what, row.B, row.N, "ours")) & (by_case.package == row.package)]
    if row.provider != "ours":
        empty = by_case.queued_50.get([(row.what, row.B, row.N, f"empty op{how}") for how in ("", ", compiled")])
        for of_eager in eager.queued_50:
            yield f"{row.what}: compiled over eager", row.queued_50 / of_eager, 1, "×"
            if empty is not None:
                most = round(1e6 * (empty.iloc[1] - empty.iloc[0]))
                yield f"{row.what}: compiling adds, as to an empty op,", 1e6 * (row.queued_50 - of_eager), most, "µs"
        return
    if row.what == ENCODER:
        return
    module = row.what == MODULE
    yield f"{row.what}: queued", 1e6 * row.queued_50, 300 if module else 200, "µs"
    for of_naive in beside.done_50:
        yield f"{row.what}: time over naive's", row.done_50 / of_naive, 1, "×"
    if module:
        yield f"{row.what}: launches", row.launches, 10, "launches"
    if (row.what, row.B, row.N) == (GRADIENT, 256, 10**4):
        yield f"{row.what}: graph's replay", 1e6 * row.replay_50, 30, "µs"


class Package:
    """A process that measures the `ntdne_kernels` of a checkout. It is started anew after a step that failed."""

    def __init__(self, checkout: Path) -> None:
        self.name = version(checkout)
        self.checkout = checkout
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def ask(self, **request: Any) -> Row:
        """The answer to a request of `benchmarks.host_worker`; "why" also says that the process ended or is silent."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LONGEST)
        line = self.process.stdout.readline() if ready else ""
        silent = {"why": "its process ended" if ready else f"no answer in {LONGEST} s"}
        answer: Row = json.loads(line) if line else silent
        if answer.get("why"):
            self.end()
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        more = {"TRITON_INTERPRET": "0"} | ({} if torch.cuda.is_available() else null_gpu.environment())
        serve = f"from benchmarks import host_worker; host_worker.serve({str(self.checkout)!r})"
        return subprocess.Popen(
            program(self.checkout, serve), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.checkout,
            env=os.environ | more,
        )  # fmt: skip

    def end(self) -> None:
        """End the process; the next request starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __exit__(self, *_: object) -> None:
        self.end()
