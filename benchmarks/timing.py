"""Times of calls that take turns, each from a cold cache.

On a GPU a call is timed in two ways. Wall: from an idle device, by the host's clock, until all is done, as a user waits
for it. Device: by events on a device that is kept busy until all of the call is queued, so that launches cost nothing;
where a call itself waits for the device, they do.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch

Call = Callable[[], Any]
COLD_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""More than the largest cache: an EPYC's share of a third level is 32 MB, an H200's second level 60 MB."""
LEAST_CALLS = 3
LONGEST_LEAD = 0.02
"""Seconds by which the host may run ahead; what takes longer to queue keeps the device busy by itself."""


class Times(NamedTuple):
    """Seconds of each call."""

    wall: list[float]
    device: list[float]
    """Empty on a CPU."""


class Cache:
    """Fills a device's cache with something else."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.buffer = torch.zeros(COLD_BYTES[device] // 4, device=device)
        self.seconds = 0.0
        if device == "cuda":
            self.empty()
            self.seconds = on_device(lambda: [self.empty() for _ in range(100)]) / 100

    def empty(self) -> None:
        """Reads and writes: the writes alone of a large buffer pass by a CPU's cache."""
        self.buffer.add_(1)

    def hold(self, seconds: float) -> None:
        """Keep the device busy for so long, with what empties its cache too."""
        for _ in range(1 + math.ceil(min(seconds, LONGEST_LEAD) / self.seconds)):
            self.empty()


def wall(call: Call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_device(call: Call, before: Call = lambda: None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turns(
    calls: dict[str, Call], device: str, seconds: float, most: int = 50
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Each call's times, of at most `most` calls, and what went wrong with others; call each once before.

    One takes part in the rounds until it has had `seconds`, and LEAST_CALLS times in any case.
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
    """Seconds of a call on a GPU, of so many captured in one graph that is replayed from a cold cache."""
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
    """20 %, 50 %, 80 %."""
    low, median, high = numpy.quantile(seconds, (0.2, 0.5, 0.8))
    return float(low), float(median), float(high)
