"""Peak memory that a loss adds to its inputs: python -m benchmarks.memory LOSS B N D C DTYPE, in a fresh process."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import problems


def peak_delta(loss: str, B: int, N: int, D: int, C: int, dtype: str) -> int:
    """Bytes, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", loss, *map(str, (B, N, D, C)), dtype]
    root = Path(__file__).parent.parent
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(loss: str, *arguments: str) -> None:
    *shape, dtype = arguments
    # Libraries allocate on first use; a small problem makes them do it before the measurement.
    small = problems.make(64, 3000, int(shape[2]), 10, getattr(torch, dtype))
    problems.loss_and_gradient(problems.LOSSES[loss], small)
    problem = problems.make(*map(int, shape), getattr(torch, dtype))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    problems.loss_and_gradient(problems.LOSSES[loss], problem)
    print(max(status("VmHWM") - before, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
