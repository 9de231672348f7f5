"""Time of a training step with a bank on disk, beside one in memory, on a CPU.

python -m benchmarks.disk_bank FOLDER [N]

A step is the loss, its gradient, and the update of the batch's rows. The mapped file is read once with nothing of it in
memory (cold), as happens to a bank that is larger than the memory, and once from the page cache (warm).
"""

import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import problems, providers
from ntdne_kernels import storage
from ntdne_kernels.functional import update_bank_

B, D, C = 256, 128, 45
ROUNDS = 7


def step(problem: problems.Problem) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    providers.PROVIDERS["streaming"].prepare(problem, True)()
    update_bank_(problem.bank, problem.features, problem.index)
    return time.perf_counter() - start


def map_rows(path: Path, N: int) -> Tensor:
    """The (N, D) rows of the file, which is made where there is none."""
    rows, _ = storage.allocate("disk", (N, D), torch.bfloat16, torch.device("cpu"), path)
    return rows


def forget(path: Path) -> None:
    """Drop a file that is not mapped from the page cache."""
    storage.flush(path)  # pages that are not on the disk yet would stay
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main(folder: str, N: str = "2000000") -> None:
    """The command, with a folder on the disk to measure and the number of rows."""
    problem = problems.make(B, int(N), D, C, torch.bfloat16)
    path = Path(folder) / "bank.bin"
    try:
        map_rows(path, int(N)).copy_(problem.bank)
        storage.mark(path, ready=True)
        seconds: dict[str, list[float]] = {"in memory": [], "on disk, cold": [], "on disk, warm": []}
        for _ in range(ROUNDS):  # in turns: the machine may be shared
            seconds["in memory"].append(step(problem))
            forget(path)
            mapped = replace(problem, bank=map_rows(path, int(N)))
            seconds["on disk, cold"].append(step(mapped))
            seconds["on disk, warm"].append(step(mapped))
            del mapped
    finally:
        for file in (path, Path(f"{path}.json")):
            file.unlink(missing_ok=True)
    size = problem.bank.nbytes
    print(f"{N} rows of {D} bfloat16 values, {size / 2**20:.0f} MiB; {B} queries, {torch.get_num_threads()} threads")
    for place, times in seconds.items():
        median = statistics.median(times)
        print(f"{place:14} {median:6.3f} s ({min(times):.3f} to {max(times):.3f}), {size / median / 1e9:5.2f} GB/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
