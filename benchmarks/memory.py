"""The peak of memory that a call adds, and what Linux says of a process's memory."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def added_by(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes. Call it once before: libraries allocate on first use."""
    gc.collect()  # garbage that the call frees would hide what it takes
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the call takes
    before = status("VmRSS")
    reset_peak()
    call()
    return max(status("VmHWM") - before, 0)


def reset_peak() -> None:
    """Let the peak of this process's memory (VmHWM) start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
