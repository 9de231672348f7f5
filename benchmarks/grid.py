"""The cases that are measured, the most important first: where time runs out, the last ones are missing.

Shapes: B queries, N bank rows, D features, C classes.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

BATCHES = (1, 64, 256, 1024, 4096)
ROWS = (10**4, 10**5, 10**6, 8 * 10**6, 10**8)
WIDTHS = (128, 64, 256, 512)
ARITHMETIC = {"cuda": ("bfloat16", "float32", "tf32", "float16"), "cpu": ("bfloat16", "float32")}
"""CPUs have no TF32, and PyTorch takes minutes there for a product in float16 that takes 0.4 s in bfloat16."""
CLASSES = (45, 2, None)
"""None: half as many classes as rows. The first of widths, arithmetics and classes is the usual one."""
LOSS, GRADIENT, UPDATE, TRAINING = "loss", "loss and gradient", "update", "training step"
PRODUCTS, TRAFFIC = "matrix product", "memory traffic"
"""What the machine can do: a product of B×D and D×N; moving N·D values."""
SIDE = {"cuda": 8192, "cpu": 4096}
"""Of the square matrices whose product is measured."""
TRAFFIC_ROWS = 1 << 22
"""Of the float32 rows that are moved: 2 GB."""


class Case(NamedTuple):
    """A shape for which all providers of `what` are measured."""

    what: str
    B: int
    N: int
    D: int
    C: int
    dtype: str
    """A key of `benchmarks.contract.DTYPES`."""
    busy: int = 0
    """Processes that keep cores busy as the calls are timed (`benchmarks.busy`)."""


def targets() -> list[Case]:
    """The cases by which the speed on a GPU is judged (`benchmarks.targets`)."""
    found = [Case(GRADIENT, B, N, 128, 45, "bfloat16") for N in (10**6, 8 * 10**6) for B in (256, 1024, 4096)]
    found += [Case(GRADIENT, B, N, 128, 45, "bfloat16") for N in (8 * 10**6, 10**8) for B in (1, 64)]
    found += [Case(GRADIENT, B, 10**6, 128, 2, "bfloat16") for B in (256, 1024, 4096)]
    found += [Case(GRADIENT, B, 10**4, 128, 45, "bfloat16") for B in BATCHES]
    return [*found, Case(GRADIENT, 256, 10**8, 128, 45, "bfloat16"), Case(UPDATE, 256, 10**6, 128, 45, "bfloat16")]


def cpu_targets() -> list[Case]:
    """The same for a CPU. Some stand beside busy processes too."""
    sizes = itertools.product(ARITHMETIC["cpu"], (10**4, 10**5, 5 * 10**5, 10**6), (1, 4, 16, 64, 256))
    return [Case(GRADIENT, B, N, 128, 45, dtype) for dtype, N, B in sizes]


def cases(
    device: str,
    batches: Sequence[int] = BATCHES,
    rows: Sequence[int] = ROWS,
    widths: Sequence[int] = WIDTHS,
    arithmetic: Sequence[str] = (),
    classes: Sequence[int | None] = CLASSES,
    busy: Sequence[int] = (0,),
) -> list[Case]:
    """All combinations, in this order.

    First comes what the machine can do, then on a GPU the targets, then the cases with the usual width, arithmetic and
    classes, and then those that differ from the usual in one of them, in two, in all.

    Args:
        device: "cuda" or "cpu".
        batches: Values of B.
        rows: Values of N.
        widths: Values of D.
        arithmetic: Of the products; empty for all that the device has.
        classes: Values of C, None for N/2.
        busy: Numbers of busy processes, beside each of which a case is measured; what the machine can do is so at 0.
    """
    side = SIDE[device]
    available = ARITHMETIC[device]
    ranked = [(0, Case(PRODUCTS, side, side, side, 1, dtype)) for dtype in available]
    ranked.append((0, Case(TRAFFIC, 1, TRAFFIC_ROWS, 128, 1, "float32")))
    if device == "cuda":
        ranked += [(0, case) for case in targets()]
    for D, dtype, C in itertools.product(widths, arithmetic or available, classes):
        differences = (D != WIDTHS[0]) + (dtype != available[0]) + (C != CLASSES[0])
        for N, B, processes in itertools.product(rows, batches, busy):
            if B > N:
                continue
            shape = (B, N, D, N // 2 if C is None else C, dtype, processes)
            ranked += [(2 * differences + 1, Case(what, *shape)) for what in (GRADIENT, LOSS)]
            if C == CLASSES[0] and dtype != "tf32":  # an update multiplies no matrices
                ranked.append((2 * differences + 2, Case(UPDATE, *shape)))
            if differences == 0 and B == 256:
                ranked.append((2, Case(TRAINING, *shape)))
    return list(dict.fromkeys(case for _, case in sorted(ranked, key=lambda entry: entry[0])))
