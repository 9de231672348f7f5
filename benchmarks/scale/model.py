"""The machines that the model of `benchmarks.cost` is applied to: this one by its measured rates, and GPU clusters.

Shapes: W ranks.
"""

import math
import statistics
from typing import Any

from benchmarks import cost
from benchmarks.scale.measure import CORES, Row

H200 = cost.Machine(
    flops=790e12, bandwidth=4.3e12, exponentials=3.9e12, network=math.inf, latency=math.nan, at_once=True
)
"""Measured with PyTorch: matrix products in bfloat16, reading, and exponentials."""
CLUSTERS = {
    1: H200,
    # NVLink 4, one direction. NCCL's own table of latencies (src/graph/tuning.cc, protocol LL): 6.6 µs and 0.6 µs for
    # each of the 7 steps of an all-gather's ring are 11 µs, both ways of an all-reduce's tree 15 µs; 5 µs to launch it.
    8: H200._replace(network=450e9, latency=20e-6),
    # InfiniBand NDR, one 400 Gbit/s adapter for each GPU; rings that use all eight adapters of a machine may be faster.
    # 56 steps in the machines of 1.1 µs and 7 between them of 2.7 µs are 86 µs for an all-gather; an all-reduce 52 µs.
    64: H200._replace(network=50e9, latency=90e-6),
}
CAPACITY = 141e9
"""Bytes of an H200's memory."""


def this_machine(rates: list[Row], dtype: str, W: int, threads: int) -> cost.Machine:
    """What one of W ranks can do: an equal share of what all threads reach together, on as many cores as there are.

    Args:
        rates: The rows of the part "rates".
        dtype: Of the bank.
        W: Ranks.
        threads: Of each rank.
    """

    def rate(name: str, **facts: Any) -> float:
        facts = {"rate": name, **facts}
        (row,) = (row for row in rates if facts.items() <= row.items())
        return float(row["work"] / statistics.median(row["seconds"]))

    together = min(W * threads, CORES)
    return cost.Machine(
        flops=rate("products", dtype=dtype, threads=together) / W,
        bandwidth=rate("reading", threads=together) / W,
        exponentials=rate("exponentials", threads=together) / W,
        network=rate("all-to-all", ranks=W) if W > 1 else math.inf,
        latency=1 / rate("all-reduce", ranks=W) if W > 1 else 0,
        at_once=False,
    )
