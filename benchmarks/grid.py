"""What is measured, in the order of its importance: where time runs out, the rest is missing.

Shapes: B queries, N bank rows, D features, C classes.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

BATCHES = (1, 64, 256, 1024, 4096)
ROWS = (10**4, 10**5, 10**6, 8 * 10**6, 10**8)
WIDTHS = (128, 64, 256, 512)
ARITHMETIC = {"cuda": ("bfloat16", "float32", "tf32", "float16"), "cpu": ("bfloat16", "float32")}
"""On CPUs TF32 does not exist, and PyTorch takes minutes for a product of float16 that takes 0.4 s in bfloat16."""
CLASSES = (45, 2, None)
"""None: half as many as rows. Of widths, arithmetics and classes the first is what most cases share."""
LOSS, GRADIENT, UPDATE, TRAINING = "loss", "loss and gradient", "update", "training step"
PRODUCTS, TRAFFIC = "matrix product", "memory traffic"
"""What the machine can do: a product of B×D and D×N; moving N·D values."""


class Case(NamedTuple):
    what: str
    B: int
    N: int
    D: int
    C: int
    dtype: str
    """Of `benchmarks.providers.DTYPES`."""


def targets() -> list[Case]:
    """What the speed that is aimed at on a GPU is judged by."""
    found = [Case(GRADIENT, B, N, 128, 45, "bfloat16") for N in (10**6, 8 * 10**6) for B in (256, 1024, 4096)]
    found += [Case(GRADIENT, B, N, 128, 45, "bfloat16") for N in (8 * 10**6, 10**8) for B in (1, 64)]
    found += [Case(GRADIENT, B, 10**6, 128, 2, "bfloat16") for B in (256, 1024, 4096)]
    found += [Case(GRADIENT, B, 10**4, 128, 45, "bfloat16") for B in BATCHES]
    return [*found, Case(GRADIENT, 256, 10**8, 128, 45, "bfloat16"), Case(UPDATE, 256, 10**6, 128, 45, "bfloat16")]


def cases(
    device: str,
    batches: Sequence[int] = BATCHES,
    rows: Sequence[int] = ROWS,
    widths: Sequence[int] = WIDTHS,
    arithmetic: Sequence[str] = (),
    classes: Sequence[int | None] = CLASSES,
) -> list[Case]:
    """What the machine can do; on a GPU the targets; the loss by B and N; then what differs in one thing, two, all."""
    side = 8192 if device == "cuda" else 4096
    known = ARITHMETIC[device]
    found = [(0, Case(PRODUCTS, side, side, side, 1, dtype)) for dtype in known]
    found.append((0, Case(TRAFFIC, 1, 1 << 22, 128, 1, "float32")))
    if device == "cuda":
        found += [(0, case) for case in targets()]
    for D, dtype, C in itertools.product(widths, arithmetic or known, classes):
        apart = (D != WIDTHS[0]) + (dtype != known[0]) + (C != CLASSES[0])
        for N, B in itertools.product(rows, batches):
            if B > N:
                continue
            found += [(2 * apart + 1, Case(what, B, N, D, C or N // 2, dtype)) for what in (GRADIENT, LOSS)]
            if C == CLASSES[0] and dtype != "tf32":  # an update multiplies no matrices
                found.append((2 * apart + 2, Case(UPDATE, B, N, D, C, dtype)))
            if apart == 0 and B == 256:
                found.append((2, Case(TRAINING, B, N, D, C, dtype)))
    return list(dict.fromkeys(case for _, case in sorted(found, key=lambda of: of[0])))
