"""The process in which `benchmarks.host` measures a package: it prepares a step, times its calls, counts its launches.

Requests and answers are lines of JSON, on standard input and output:

    {"prepare": {"what": ..., "B": ..., "N": ..., "provider": ...}}    →  {"why": "", "machine": ..., "torch": ..., ...}
    {"calls": 40}, of the step that was prepared                       →  {"queued": [...], "done": [...], ...}
    {"count": the same as for prepare}                                 →  {"launches": ..., "operators": ...}

An answer to a request that failed says why.

Shapes: B queries, N bank rows, D features.
"""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks import null_gpu, problems
from benchmarks.grid import GRADIENT
from benchmarks.problems import SIGMA, Q
from benchmarks.timing import on_device
from ntdne_kernels import NTDNELoss
from ntdne_kernels.functional import ntdne_loss

MODULE = "forward, backward, update_bank"
ENCODER = "compiled encoder and NTDNELoss"
STEPS = {
    GRADIENT: ("ours", "ours, compiled", "naive", "naive, compiled", "empty op", "empty op, compiled"),
    MODULE: ("ours", "ours, compiled", "naive"),
    ENCODER: ("ours", "ours, compiled"),
}
"""Ours as NTDNELoss or the functions choose it; naive as `providers.naive`, with `steps.update` after it.

An empty op has the arguments and results of ours, and does nothing: what compiling adds to it is PyTorch's. The encoder
is compiled in either case, without the loss or with it.
"""
D, C = 128, 45
WARM_UP = 20
Call = Callable[[], Any]


def serve(checkout: str) -> None:
    """Answer the requests until there are no more, with the package of a checkout, which is imported already."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.cuda.init()
    if null_gpu.is_here():
        with contextlib.suppress(RuntimeError):  # a step that updates then says what it lacks
            torch.ops.load_library(null_gpu.update_kernel(Path(checkout)))
    _answer(sys.stdin, answers)


def _answer(requests: IO[str], answers: IO[str]) -> None:
    call: Call = _nothing
    replay: Call | None = None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if "prepare" in request:
                call, replay = _nothing, None  # first: two steps may not fit
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


def _nothing() -> None:
    pass


def machine() -> str:
    """The name of the GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def prepare(what: str, B: int, N: int, provider: str) -> Call:
    """One of `STEPS`.

    Raises:
        ValueError: There is no such step.
    """
    if provider not in STEPS[what]:
        raise ValueError(f"{provider}: expected one of {', '.join(STEPS[what])}")
    torch.compiler.reset()
    made = problems.make(B, N, D, C, torch.bfloat16)
    tensors = {name: value.detach().cuda() for name, value in vars(made).items() if isinstance(value, Tensor)}
    problem = replace(made, **tensors, label_index=made.label_index.to("cuda"))
    problem.features.requires_grad_()
    compiled = provider.endswith("compiled")
    if what == GRADIENT:
        return _gradient(problem, provider.split(",")[0], compiled=compiled)
    if provider.startswith("naive"):
        return _naive_module(problem)
    criterion = _criterion(problem, made.bank_labels)
    return (_module if what == MODULE else _encoder)(problem, criterion, compiled=compiled)


def _gradient(problem: problems.Problem, provider: str, *, compiled: bool) -> Call:
    """The loss of the functions, and its gradient."""
    loss = _ours
    if provider == "naive":
        from benchmarks import providers  # needs more of the package than its README names

        loss = providers.naive
    elif provider == "empty op":
        from benchmarks import empty_op  # the same

        loss = empty_op.loss
    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(loss(problem), problem.features)


def _ours(problem: problems.Problem) -> Tensor:
    features, bank, index = problem.features, problem.bank, problem.index
    return ntdne_loss(features, bank, problem.labels, problem.label_index, index, sigma=SIGMA, q=Q)


def _naive_module(problem: problems.Problem) -> Call:
    """What NTDNELoss does, with `providers.naive` and PyTorch's update."""
    from benchmarks import providers, steps  # need more of the package than its README names

    def step() -> None:
        problem.features.grad = None
        unit = replace(problem, features=normalize(problem.features, dim=1))  # a module takes features of any length
        providers.naive(unit).backward()
        steps.update(problem.bank, problem.features.detach(), problem.index, steps.MOMENTUM)

    return step


def _criterion(problem: problems.Problem, labels: Tensor) -> NTDNELoss:
    """NTDNELoss after its warm-up, made from the labels (N,) of all images, with rows as they start.

    It is made on the GPU, and no rows are put into it: a bank that is moved or written from outside looks at its rows
    once, and a GPU that computes nothing would leave them 0.
    """
    criterion = NTDNELoss(labels, D, sigma=SIGMA, q=Q, k=0.3, warmup_epochs=20, dtype=problem.bank.dtype, device="cuda")
    criterion.set_epoch(20)  # the warm-up is over: scores are looked up, and may prune
    return criterion


def _module(problem: problems.Problem, criterion: NTDNELoss, *, compiled: bool) -> Call:
    forward: Callable[..., Any] = criterion
    if compiled:
        forward = torch.compile(criterion, fullgraph=True, dynamic=False)

    def step() -> None:
        problem.features.grad = None
        forward(problem.features, problem.index).backward()
        criterion.update_bank(problem.features, problem.index)

    return step


def _encoder(problem: problems.Problem, criterion: NTDNELoss, *, compiled: bool) -> Call:
    """A small encoder before the loss, compiled with it or without; forward and backward."""
    encoder = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)).cuda()
    images = problem.features.detach()

    def forward(images: Tensor, index: Tensor) -> Tensor:
        loss: Tensor = criterion(encode(images), index)
        return loss

    encode: Callable[..., Any] = encoder
    if compiled:
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    else:
        encode = torch.compile(encoder, fullgraph=True, dynamic=False)

    def step() -> None:
        encoder.zero_grad()
        forward(images, problem.index).backward()

    return step


def warm(call: Call) -> Call:
    """The call, after some that nobody times."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    return call


def timed(call: Call, replay: Call | None, calls: int) -> dict[str, list[float]]:
    """Seconds of each call: until it is queued, until it is done, and of the device for its replay as a graph."""
    queued, done = [], []
    for _ in range(3 + calls):  # the first ones find another process's data in the caches
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - start)
    found = {"queued": queued[3:], "done": done[3:]}
    if replay is not None:
        found["replay"] = [on_device(replay) for _ in range(calls)]
    return found


def counted(call: Call) -> dict[str, int]:
    """Launches, and calls of PyTorch's operators, without those that other operators of PyTorch make."""
    counts_launches = null_gpu.is_here()
    before = null_gpu.launches() if counts_launches else 0
    activities = [ProfilerActivity.CPU] if counts_launches else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    sent = [event for event in events if event.device_type == DeviceType.CUDA]
    operators = [event for event in events if event.name.startswith("aten::")]
    operators = [event for event in operators if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]
    launches = null_gpu.launches() - before if counts_launches else len(sent)
    return {"launches": launches, "operators": len(operators)}


def graph_of(call: Call) -> Call | None:
    """The step as one launch; None where it cannot be captured, or the GPU computes nothing."""
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
    replay: Call = graph.replay
    return replay
