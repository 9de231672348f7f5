"""What a measurement notes of the machine and of the software that it ran on."""

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

PEERS = ("liger-kernel", "cut-cross-entropy")


def describe(device: str) -> dict[str, str]:
    """The columns of `benchmarks.rows` that are the same in all rows of a run."""
    if device == "cuda":
        here = {"machine": torch.cuda.get_device_name(), "driver": _driver()}
        libraries = [f"cuDNN {torch.backends.cudnn.version()}"]
    else:
        here = {"machine": f"{cpu_model()}, {torch.get_num_threads()} threads, {vector_instructions()}", "driver": ""}
        libraries = []
    for distribution in metadata.distributions():
        if distribution.name in PEERS:
            libraries.append(f"{distribution.name} {distribution.version}")
    return here | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": (device == "cuda" and torch.version.cuda) or "",
        "python": platform.python_version(),
        "libraries": ", ".join(libraries),
    }


def describe_cpu() -> dict[str, Any]:
    """For the JSON files of measurements on CPUs, with the date and how busy the machine was before."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vector_instructions": vector_instructions(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }


def cpu_model() -> str:
    """As Linux names it."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return model[1] if model else platform.machine()


def vector_instructions() -> str:
    """The widest that PyTorch uses here, and AMX where Linux lists it for bfloat16."""
    capability = str(torch.backends.cpu.get_cpu_capability())
    return f"{capability}, AMX" if " amx_bf16" in Path("/proc/cpuinfo").read_text() else capability


def _driver() -> str:
    """The version of NVIDIA's driver, or "" where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
