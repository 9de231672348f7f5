"""Time and memory to put labels into class order.

python -m benchmarks.class_order N C [dtype] [--rank r --ranks W]

The labels of N images in C classes are random, int32 unless told otherwise. With ranks, it is the part that rank r of W
holds. Prints the seconds, and the peak of memory beyond the labels and the results.
"""

import argparse
import time

import torch

from benchmarks.memory import reset_peak, status
from ntdne_kernels.label_index import class_order


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.class_order", description=__doc__)
    parser.add_argument("N", type=int)
    parser.add_argument("C", type=int)
    parser.add_argument("dtype", nargs="?", default="int32")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args()
    labels = torch.randint(0, given.C, (given.N,), dtype=getattr(torch, given.dtype))
    rows = -(-given.N // given.ranks)
    first = given.rank * rows
    class_order(torch.arange(9, -1, -1), 0, 10)  # libraries allocate on first use
    before = status("VmRSS")
    reset_peak()
    start = time.perf_counter()
    results = class_order(labels, first, min(rows, max(given.N - first, 0)))
    seconds = time.perf_counter() - start
    kept = sum(part.nbytes for part in results if part is not None)
    print(f"{seconds:.2f} s, {max(status('VmHWM') - before - kept, 0) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
