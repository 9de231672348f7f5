"""A step with a bank on disk against one in memory, on a CPU: python -m benchmarks.disk_bank FOLDER [N]

A step is the loss, its gradient, and the update of the batch's rows. The file is read through its mapping: once from
the page cache (warm), once with nothing of it in memory (cold), as a bank has it that is larger than the memory.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import problems, providers
from ntdne_kernels import storage
from ntdne_kernels.functional import update_bank_

B, D, C = 256, 128, 45
ROUNDS = 7


def step(problem: problems.Problem) -> float:
    """Seconds."""
    start = time.perf_counter()
    providers.PROVIDERS["streaming"].prepare(problem, True)()
    update_bank_(problem.bank, problem.features, problem.index)
    return time.perf_counter() - start


def take_up(path: Path, N: int) -> Tensor:
    rows, _ = storage.allocate("disk", (N, D), torch.bfloat16, torch.device("cpu"), path)
    return rows


def forget(path: Path) -> None:
    """Take the file, which nobody has mapped, out of the page cache."""
    storage.flush(path)  # what is not on the disk stays
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main(folder: str, N: str = "2000000") -> None:
    problem = problems.make(B, int(N), D, C, torch.bfloat16)
    path = Path(folder) / "bank.bin"
    try:
        take_up(path, int(N)).copy_(problem.bank)
        storage.mark(path, ready=True)
        seconds: dict[str, list[float]] = {"in memory": [], "on disk, cold": [], "on disk, warm": []}
        for _ in range(ROUNDS):  # in turns: the machine may be shared
            seconds["in memory"].append(step(problem))
            forget(path)
            mapped = problem._replace(bank=take_up(path, int(N)))
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
