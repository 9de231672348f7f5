"""What the host does for a step on a GPU: python -m benchmarks host [--against CHECKOUT]

A step is timed from an idle device until Python has it back (queued) and until the device is idle again (done), and on
the device as a CUDA graph of it is replayed. Its launches (kernels, fills, copies) and calls of PyTorch's operators are
counted. Without a GPU all but the device's work happens (benchmarks/null_gpu.py): queued and
the counts are the host's, without the driver's own 2 to 4 µs a launch.

Each package is measured in a process of its own; with --against the two take turns. Of `ntdne_kernels` only what its
README names is used, so that older and newer versions can be compared.

Shapes: B queries, N bank rows, D features.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
import triton

from benchmarks import null_gpu, report
from benchmarks.grid import GRADIENT

MODULE = "forward, backward, update_bank"
STEPS = {
    GRADIENT: ("ours", "ours, compiled", "naive", "naive, compiled"),
    MODULE: ("ours", "ours, compiled", "naive"),
}
"""Ours as NTDNELoss or the functions choose it; naive as `providers.naive`, with `steps.update` after it."""
BATCHES, ROWS = (64, 256), (10**4, 10**5)
D, C = 128, 45
ROUNDS, CALLS, WARM_UP = 5, 40, 20
LONGEST = 100
"""Seconds that a process may take to answer, compiling included."""
ROOT = Path(__file__).parent.parent
COLUMNS = [
    "what", "B", "N", "provider", "package", "why",
    *(f"{clock}_{quantile}" for clock in ("queued", "done", "replay") for quantile in (20, 50, 80)),
    "launches", "operators", "machine", "torch", "triton", "python", "measured",
]  # fmt: skip
Call = Callable[[], Any]


def measure(batches: Iterable[int], rows: Iterable[int], against: Path | None, minutes: float, path: Path) -> None:
    """A row for each step and package, printed and written as soon as it is there; what compiles comes last."""
    begun = time.monotonic()
    checkouts = [ROOT, *([against.resolve()] if against is not None else [])]
    cases = [
        {"what": what, "B": B, "N": N, "provider": provider}
        for what, providers in STEPS.items() for N in rows for B in batches for provider in providers
    ]  # fmt: skip
    compiled = [case for case in cases if case["provider"].endswith("compiled")]
    eager = [case for case in cases if case not in compiled]
    found: list[dict[str, Any]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        packages = [stack.enter_context(Package(checkout)) for checkout in checkouts]
        for group in (eager, compiled):
            for case in group:
                if time.monotonic() - begun < 60 * minutes:
                    # naive is the same beside every package
                    found += step(case, packages if case["provider"].startswith("ours") else packages[:1])
                    write(found, path)
            if group is eager:
                found = count(eager, packages, found)
                write(found, path)
    print_aims(pd.DataFrame(found, columns=COLUMNS))


def count(cases: list[dict[str, Any]], packages: list["Package"], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with launches and operators, which are those of every size."""
    for case in (case for case in cases if (case["B"], case["N"]) == (cases[0]["B"], cases[0]["N"])):
        for package in packages if case["provider"].startswith("ours") else packages[:1]:
            counts = package.ask(count=case)
            print(describe(case | {"package": package.name} | counts), flush=True)
            same = {"what": case["what"], "provider": case["provider"], "package": package.name}
            found = [row | counts if same.items() <= row.items() and "why" not in counts else row for row in found]
    for package in packages:
        package.end()  # a profiler may leave launches slower than they were
    return found


def write(found: list[dict[str, Any]], path: Path) -> None:
    pd.DataFrame(found, columns=COLUMNS).to_csv(path, index=False, float_format="%.6g")


def step(case: dict[str, Any], packages: list["Package"]) -> list[dict[str, Any]]:
    """Rows of a step, one for each package; packages take turns."""
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
    for package, row, of_package in zip(packages, rows, times, strict=True):
        for clock, seconds in of_package.items():
            low, *_, high = statistics.quantiles(seconds, n=5)
            row |= {f"{clock}_20": low, f"{clock}_50": statistics.median(seconds), f"{clock}_80": high}
        row |= case | {"package": package.name, "measured": stamp}
        print(describe(row), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    case = f"{row['what']}, B = {row['B']:,}, N = {row['N']:,}: {row['provider']} ({row['package']})"
    if row.get("why"):
        return f"{case}: {row['why']}"
    clocks = [clock for clock in ("queued", "done", "replay") if f"{clock}_50" in row]
    parts = [f"{clock} {1e6 * row[f'{clock}_50']:.0f} µs ({1e6 * row[f'{clock}_20']:.0f})" for clock in clocks]
    parts += [f"{row[count]} {count}" for count in ("launches", "operators") if count in row]
    return f"{case}: {', '.join(parts)}"


def print_aims(rows: pd.DataFrame) -> None:
    """Of what this project aims at, what holds for each package."""
    report.print_head(["aim", "package", "B", "N", "found", "holds"])
    known = rows.set_index(["what", "B", "N", "provider"])
    for row in rows[rows.provider.str.startswith("ours")].itertuples():
        naive = known[known.index == (row.what, row.B, row.N, "naive")].done_50
        eager = known[(known.index == (row.what, row.B, row.N, "ours")) & (known.package == row.package)].queued_50
        module = row.what == MODULE
        aims: list[tuple[str, float, float, str]] = []  # what, found, at most, unit
        if row.provider == "ours":
            aims.append((f"{row.what}: queued", 1e6 * row.queued_50, 300 if module else 200, "µs"))
            aims += [(f"{row.what}: time over naive's", row.done_50 / of_naive, 1, "×") for of_naive in naive]
            aims += [(f"{row.what}: launches", row.launches, 10, "launches")] if module else []
            if (row.what, row.B, row.N) == (GRADIENT, 256, 10**4):
                aims.append((f"{row.what}: graph's replay", 1e6 * row.replay_50, 30, "µs"))
        else:
            aims += [(f"{row.what}: compiled over eager", row.queued_50 / of_eager, 1, "×") for of_eager in eager]
        for what, value, most, unit in aims:
            said = "not measured" if math.isnan(value) else f"{value:.3g} {unit}"
            holds = "yes" if value <= most else "**no**"
            report.print_row([f"{what} at most {most}", row.package, f"{row.B:,}", f"{row.N:,}", said, holds])


class Package:
    """A process that measures the `ntdne_kernels` of a checkout, begun anew where a step has failed in it."""

    def __init__(self, checkout: Path) -> None:
        self.name = _version(checkout)
        self.checkout = checkout
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Package":
        return self

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer; of a process that ended or gave none in time, why."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LONGEST)
        line = self.process.stdout.readline() if ready else ""
        answer = json.loads(line or json.dumps({"why": "its process ended" if ready else f"no answer in {LONGEST} s"}))
        if answer.get("why"):
            self.end()
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        more = {"TRITON_INTERPRET": "0"} | ({} if torch.cuda.is_available() else null_gpu.environment())
        # The package of the checkout, and the benchmarks of this one.
        start = (
            f"import sys; sys.path[:0] = [{str(self.checkout)!r}]; import ntdne_kernels; sys.path[0] = {str(ROOT)!r}; "
            f"from benchmarks import host; host.serve({str(self.checkout)!r})"
        )
        return subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.checkout,
            env=os.environ | more,
        )  # fmt: skip

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __exit__(self, *_: Any) -> None:
        self.end()


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _version(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = ""
    return said or checkout.name


# In the process of a package


def serve(checkout: str) -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    torch.cuda.init()
    if null_gpu.is_here():
        with contextlib.suppress(RuntimeError):  # then the step that updates says what it lacks
            torch.ops.load_library(null_gpu.update_kernel(Path(checkout)))
    _serve(sys.stdin, answers)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    call: Call = lambda: None  # noqa: E731
    replay: Call | None = None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if "prepare" in request:
                call, replay = (lambda: None), None  # first: two may not fit
                call = warm(prepare(**request["prepare"]))
                replay = graph_of(call)
                answer = {"why": "", "machine": machine(), "torch": torch.__version__}
                answer |= {"triton": triton.__version__, "python": platform.python_version()}
            elif "count" in request:
                answer = counted(warm(prepare(**request["count"])))
            else:
                answer = timed(call, replay, request["calls"])
        except Exception as error:
            answer = {"why": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        print(json.dumps(answer), file=answers, flush=True)


def prepare(what: str, B: int, N: int, provider: str) -> Call:
    from benchmarks import problems
    from ntdne_kernels import NTDNELoss
    from ntdne_kernels.functional import ntdne_loss

    if provider not in STEPS[what]:
        raise ValueError(f"{provider}: expected one of {', '.join(STEPS[what])}")
    torch.compiler.reset()
    made = problems.make(B, N, D, C, torch.bfloat16)
    tensors = {name: value.detach().cuda() for name, value in made._asdict().items() if name != "classes"}
    problem = made._replace(**tensors, classes=made.classes.to("cuda"))
    features = problem.features.requires_grad_()
    compiled = provider.endswith("compiled")

    if provider.startswith("naive"):
        from benchmarks import providers, steps

        loss = providers.naive
        after = lambda p: steps.update(p.bank, p.features.detach(), p.index, steps.MOMENTUM)  # noqa: E731
        if what == MODULE:  # as a module does, from features of any length
            loss = lambda p: providers.naive(  # noqa: E731
                p._replace(features=torch.nn.functional.normalize(p.features, dim=1))
            )
    elif what == GRADIENT:
        loss = lambda p: ntdne_loss(  # noqa: E731
            p.features, p.bank, p.labels, p.classes, p.index, sigma=problems.SIGMA, q=problems.Q
        )
    else:
        # Made there: a bank that was moved looks at its rows once, which a GPU that computes nothing leaves 0.
        criterion = NTDNELoss(
            made.bank_labels, D, sigma=problems.SIGMA, q=problems.Q, dtype=problem.bank.dtype, device="cuda"
        )
        criterion.memory.storage.copy_(problem.bank)
        criterion.set_epoch(20)  # the warm-up is over: scores are looked up, and may prune
        forward = torch.compile(criterion, fullgraph=True, dynamic=False) if compiled else criterion
        loss = lambda p: forward(p.features, p.index)  # noqa: E731
        after = lambda p: criterion.update_bank(p.features, p.index)  # noqa: E731
    if compiled and what == GRADIENT:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)

    def gradient() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(problem), features)

    def whole() -> None:
        features.grad = None
        loss(problem).backward()
        after(problem)

    return gradient if what == GRADIENT else whole


def warm(call: Call) -> Call:
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    return call


def timed(call: Call, replay: Call | None, calls: int) -> dict[str, list[float]]:
    """Seconds of each call."""
    queued, done = [], []
    for _ in range(3 + calls):  # the first ones find the caches of another process
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - start)
    found = {"queued": queued[3:], "done": done[3:]}
    if replay is not None:
        from benchmarks.timing import on_device

        found["replay"] = [on_device(replay) for _ in range(calls)]
    return found


def counted(call: Call) -> dict[str, int]:
    """Launches, and calls of PyTorch's operators but for those that operators of PyTorch make themselves."""
    from torch.profiler import ProfilerActivity, profile

    known = null_gpu.is_here()
    before = null_gpu.launches() if known else 0
    with profile(activities=[ProfilerActivity.CPU, *([] if known else [ProfilerActivity.CUDA])]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    operators = [event for event in events if event.name.startswith("aten::")]
    operators = [event for event in operators if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]
    return {"launches": null_gpu.launches() - before if known else len(on_device), "operators": len(operators)}


def graph_of(call: Call) -> Call | None:
    """The step as one launch, on a GPU that has work."""
    if null_gpu.is_here():
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"no graph: {error}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    return graph.replay
