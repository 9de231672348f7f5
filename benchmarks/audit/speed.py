"""Time and memory of the label audit.

Shapes: N images, D features, C classes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import memory, timing
from benchmarks.machine import describe_cpu
from ntdne_kernels import MemoryBank, audit

Row = dict[str, Any]


class Case(NamedTuple):
    """An audit of random features and labels."""

    N: int
    D: int
    C: int
    dtype: str
    batches: int
    """Batches of queries that are compared, evenly spread; 0 for all. The time of the others is extrapolated."""


D, C = 128, 45
BATCHES = 4  # for a million images: 16384 queries


def cases(sizes: list[int]) -> Iterator[Case]:
    """Each number of images with two dtypes of the copy; the last case has many classes."""
    for N in sizes:
        for dtype in ("float32", "bfloat16"):
            yield Case(N, D, C, dtype, BATCHES if N > 100_000 else 0)
    yield Case(min(100_000, max(sizes)), D, min(100_000, max(sizes)) // 2, "float32", 0)


def speed(sizes: list[int]) -> Row:
    """The machine, and a row for each case, which is measured in a process of its own."""
    root, here, rows = Path(__file__).parent.parent.parent, describe_cpu(), list[Row]()
    for case in cases(sizes):
        command = [sys.executable, "-m", "benchmarks.audit", "case", *map(str, case)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
        rows.append(case._asdict() | json.loads(result.stdout))
        print(rows[-1], flush=True)
    return {"machine": here | {"threads": torch.get_num_threads()}, "rows": rows}


def run_case(case: Case) -> Row:
    """The seconds of an audit, and the peak of memory that it adds to its features and labels.

    Raises:
        RuntimeError: The audit compared no images through its progress bar.
    """
    dtype = getattr(torch, case.dtype)
    features, labels = torch.randn(case.N, case.D), torch.randint(case.C, (case.N,))
    audit_once(features[:1000], labels[:1000] % 10, dtype)  # libraries allocate on first use
    sweep = Sweep(case.batches)
    with ExitStack() as patched:
        patched.enter_context(patch.object(audit, "with_progress", sweep))
        if case.batches:  # images that are left out would have arbitrary memory for class codes
            patched.enter_context(patch.object(torch, "empty", torch.zeros))
        start = time.perf_counter()
        peak = memory.added_by(lambda: audit_once(features, labels, dtype))
        seconds = time.perf_counter() - start
    if sweep.seconds == 0:
        raise RuntimeError("the audit compared no images through its progress bar: what takes its place here is unused")
    return {
        "seconds": seconds + sweep.seconds * (sweep.share - 1),
        "sweep_seconds": sweep.seconds * sweep.share,
        "measured_seconds": seconds,
        "extrapolated": sweep.share > 1,
        "peak_bytes": peak,
        "copy_bytes": case.N * case.D * dtype.itemsize,
    }


def audit_once(features: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    """All that an audit by neighbours alone computes: scores, ranking and suspects."""
    found = audit.audit_labels(features, labels, sigma=0.1, ridge=False, dtype=dtype, progress=True)
    found.ranking, found.suspects("rate")


def run_fit(N: int, D: int, C: int) -> Row:
    """The seconds of what an audit does beside its neighbours, and the peak of memory that each adds to the bank."""
    bank = audit.feature_bank(torch.randn(N, D), torch.randint(C, (N,)))
    found: Row = {}
    steps: dict[str, Callable[[MemoryBank], Any]] = {"choose_sigma": audit.choose_sigma, "fit_ridge": audit.fit_ridge}
    for name, step in steps.items():
        begun = time.process_time()
        peak = memory.added_by(partial(step, bank))
        found[name] = {"cpu_seconds": time.process_time() - begun, "peak_bytes": peak}
    return found


def gpu(N: int, D: int, C: int, queries: int) -> Iterator[Row]:
    """On a GPU: the two kernels of the class sums, in turns, and what a whole audit takes, the first and later ones.

    A row for each, as soon as it is known: the audit is "ours" by default, neighbours and ridge with sigma chosen, and
    "neighbours" alone with sigma 0.1, to compare with the kernels.
    """
    from ntdne_kernels.ops.gpu import class_log_sums  # needs triton, which the other measurements do without

    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(N, D, generator=generator, device="cuda")
    labels = torch.randint(C, (N,), generator=generator, device="cuda")
    bank = audit.feature_bank(features, labels, dtype=torch.bfloat16)
    rows = torch.arange(queries, device="cuda")
    arguments = bank.stored_rows(rows), bank.storage, rows, bank.offsets, 0.1
    calls: dict[str, timing.Call] = {}
    for kernel in ("portable", "hopper"):
        call = partial(class_log_sums, *arguments, kernel=kernel)
        try:
            seconds = timing.wall(call, "cuda")
        except ValueError as error:  # the second does not serve every device
            yield {"kernel": kernel, "error": str(error)}
            continue
        calls[kernel] = call
        yield {"kernel": kernel, "first_seconds": seconds}
    times, failed = timing.in_turns(calls, "cuda", seconds=2)
    for kernel, found in times.items():
        low, median, high = timing.quantiles(found.device)
        teraflops = 2e-12 * queries * N * D / median
        yield {"kernel": kernel, "low": low, "median": median, "high": high, "teraflops": teraflops}
    yield from ({"kernel": kernel, "error": str(error)} for kernel, error in failed.items())
    audits: dict[str, dict[str, Any]] = {"ours": {}, "neighbours": {"sigma": 0.1, "ridge": False}}
    for name, options in audits.items():
        for call_number in range(3):
            seconds = timing.wall(partial(audit.audit_bank, bank, **options), "cuda")
            yield {"audit": name, "call": call_number, "seconds": seconds}


class Sweep:
    """Takes the place of the audit's progress bar, to compare only some batches of images and time that.

    Attributes:
        seconds: That these batches took.
        share: How many times as many batches there are.
    """

    def __init__(self, batches: int) -> None:
        self.batches, self.seconds, self.share = batches, 0.0, 1.0

    def __call__(self, starts: Any, title: str) -> Iterator[int]:
        """Some of the batches of images that are compared."""
        chosen = starts
        if 0 < self.batches < len(starts):
            chosen = starts[:: len(starts) // self.batches][: self.batches]
            self.share = len(starts) / len(chosen)
        begun = time.perf_counter()
        yield from chosen
        self.seconds = time.perf_counter() - begun
