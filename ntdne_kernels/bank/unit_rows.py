"""Rows of unit length: a bank's random start, and the look for a row that is not of unit length.

Shapes: N images, n rows of this process, D values.
"""

import torch
from torch import Tensor, nn

from ntdne_kernels.arguments import accumulator_dtype

CHUNK = 65536  # rows drawn or looked at together, so that neither needs a second bank
TOLERANCE = 0.01  # how far from 1 the length of a row may be


def fill_at_random(
    storage: Tensor, positions: range, N: int, generator: torch.Generator | None, device: torch.device
) -> None:
    """Give the rows (n, D) at the `positions` of N directions drawn evenly: the same for any number of processes.

    The first chunk of positions is drawn from the generator (None: the device's own), each later one from a generator
    of its own, so a process need not draw what others keep.
    """
    source = device if generator is None else generator.device
    seed = 0
    for begin in range(0, N, CHUNK):
        end = min(begin + CHUNK, N)
        if begin > 0 and seed == 0:
            seed = int(torch.randint(1, 2**62, (), generator=generator, device=source))
        if begin > 0 and (end <= positions.start or begin >= positions.stop):
            continue
        drawn = generator if begin == 0 else torch.Generator(source).manual_seed(seed + begin)
        noise = torch.randn((end - begin, storage.size(1)), generator=drawn, device=source)
        first, stop = max(begin, positions.start), min(end, positions.stop)
        if first < stop:
            unit = nn.functional.normalize(noise[first - begin : stop - begin], dim=1)
            storage[first - positions.start : stop - positions.start].copy_(unit)


def first_not_unit(rows: Tensor) -> tuple[int, float] | None:
    """The first of the rows (n, D) that is not of unit length, and its length. Synchronises."""
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        length = torch.linalg.vector_norm(chunk, dim=1, dtype=accumulator_dtype(rows.dtype))
        wrong = ~((length - 1).abs() <= TOLERANCE)  # NaN too
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            return start + row, float(length[row])
    return None
