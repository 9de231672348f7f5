"""Time calls that take turns, each from a cold cache.

On a GPU a call is timed in two ways. Wall time is the host's, from an idle device until all is done, as a user waits
for it. Device time is between two events, on a device that is kept busy until the whole call is queued. Launches then
cost nothing, except where the call itself waits for the device.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

Call = Callable[[], Any]
COLD_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""More than the largest cache: an EPYC's share of its third level is 32 MB, an H200's second level 60 MB."""
LEAST_CALLS = 3
LONGEST_LEAD = 0.02
"""Seconds for which the device is kept busy at most: a call that takes longer to queue keeps it busy by itself."""


class Times(NamedTuple):
    """Seconds of each call."""

    wall: list[float]
    device: list[float]
    """Empty on a CPU."""


class Cache:
    """Empties a device's cache by filling it with other data."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.buffer = torch.zeros(COLD_BYTES[device] // 4, device=device)
        self.seconds = 0.0
        if device == "cuda":
            self.empty()
            self.seconds = on_device(lambda: self.empty(times=100)) / 100

    def empty(self, times: int = 1) -> None:
        """Read and write a large buffer: its writes alone would bypass a CPU's cache."""
        for _ in range(times):
            self.buffer.add_(1)

    def hold(self, seconds: float) -> None:
        """Keep the device busy for so long, by emptying its cache."""
        self.empty(times=1 + math.ceil(min(seconds, LONGEST_LEAD) / self.seconds))


def wall(call: Call, device: str) -> float:
    """Seconds of the host until a call is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_device(call: Call, before: Call = lambda: None) -> float:
    """Seconds of the device between two events around a call, after `before` has been queued."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def in_turns(
    calls: dict[str, Call], device: str, seconds: float, most: int = 50
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Time calls in rounds. Each takes part until it has had its seconds, and LEAST_CALLS times in any case.

    Args:
        calls: By name. Each has run before, so that nothing is compiled here.
        device: That they run on.
        seconds: Of timed calls that each gets.
        most: Calls of each at most.

    Returns:
        The times of the calls that ran, and the errors of those that failed.
    """
    if not calls:
        return {}, {}
    cache = Cache(device)
    leads: dict[str, float] = {}
    found = {name: Times([], []) for name in calls}
    failed: dict[str, Exception] = {}
    turn = 0
    while names := [name for name in found if _wants_more(found[name], seconds, most)]:
        turn += 1
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                cache.empty()
                found[name].wall.append(wall(calls[name], device))
                if device == "cuda":
                    if name not in leads:
                        leads[name] = 2 * _to_queue(calls[name])
                    found[name].device.append(on_device(calls[name], before=partial(cache.hold, leads[name])))
            except Exception as error:
                failed[name] = error
                del found[name]
    return found, failed


def _to_queue(call: Call) -> float:
    """Seconds that the host takes to hand a call to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def _wants_more(times: Times, seconds: float, most: int) -> bool:
    calls = len(times.wall)
    return calls < LEAST_CALLS or (calls < most and sum(times.wall) + sum(times.device) < seconds)


def replayed(call: Call, calls: int, repeats: int) -> list[float]:
    """Seconds of a call on a GPU, when so many of them are one CUDA graph that is replayed from a cold cache."""
    cache = Cache("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return [on_device(graph.replay, before=lambda: cache.hold(1e-4)) / calls for _ in range(repeats)]


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    return float(low), float(median), float(high)
