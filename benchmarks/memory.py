"""The memory that a call adds, at its peak, to what is there before it."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def added_by(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes. Libraries allocate on first use: call it once before."""
    gc.collect()  # garbage that the call would free hides what it takes
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was taken and freed before would hide what the call takes
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    call()
    return max(status("VmHWM") - before, 0)


def status(field: str) -> int:
    """Bytes, of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
