"""A GPU that computes nothing, for machines without one: what the host does for a GPU can be measured and counted.

`null_gpu.c` stands in for the CUDA runtime, the driver and cuBLAS. All that PyTorch and Triton do above them happens,
also in the thread in which autograd runs for a GPU. Kernels are compiled and counted, and never run. Memory is the
host's and holds zeros, so results on this GPU mean nothing: make data on the CPU and copy it.

A process has such a GPU from its start on: `environment` is for a new one.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
UPDATE_FLAGS = "-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -arch=sm_90"


def environment() -> dict[str, str]:
    """The environment variables of a process that is to have such a GPU.

    Raises:
        RuntimeError: There is no C compiler, or it fails.
    """
    import torch
    import triton

    # Of the CUDA that PyTorch was built with. What its packages leave out has not changed since Triton's.
    headers = [*Path(torch.__file__).parent.parent.glob("nvidia/cu*/include")]
    headers.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    # Under the driver's own name: whoever looks for the driver finds it loaded already.
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in headers)]
    command.append(str(SOURCE))
    library = _built(SOURCE, command, "libcuda.so.1", ["-ldl"])
    link = library.with_name("libcuda.so")
    if not link.exists():
        link.symlink_to(library.name)
    return {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}


def update_kernel(checkout: Path) -> Path:
    """Build a checkout's CUDA update so that it uses the process's CUDA runtime; setup.py links a runtime of its own.

    Raises:
        RuntimeError: There is no nvcc, or it fails.
    """
    import torch
    from torch.utils import cpp_extension

    source = checkout / "csrc" / "update_bank_cuda.cu"
    headers = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = ["-Xcompiler", "-fPIC", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cuda", "-ltorch_cpu"]
    command = ["nvcc", *UPDATE_FLAGS.split(), "-shared", "-cudart", "shared", *headers, str(source)]
    return _built(source, command, "update_bank.so", [*libraries, "-lc10"])


def launches() -> int:
    """The number of kernels, fills and copies that this process has sent to its GPU."""
    return int(_library().null_gpu_launches())


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches, in order; "copy" and "fill" for those."""
    names: list[str] = []
    listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: names.append(name.decode()))
    _library().null_gpu_listen(listener)
    try:
        call()
    finally:
        _library().null_gpu_listen(None)
    return names


def is_here() -> bool:
    """Whether this process has such a GPU."""
    return hasattr(ctypes.CDLL(None), "null_gpu_launches")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.null_gpu_launches.restype = ctypes.c_long
    return library


def _built(source: Path, command: list[str], name: str, libraries: list[str]) -> Path:
    """The library in the user's temporary folder, built once for each version of the source and of the command."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{source.name}: needs {command[0]}")
    key = hashlib.sha256(source.read_bytes() + repr((command, sysconfig.get_platform())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"null-gpu-{os.getuid()}" / key
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_name(f"{name}.{os.getpid()}")  # another process may build it too
        run = subprocess.run([*command, "-o", made, *libraries], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{source.name}: {run.stderr[-1000:]}")
        made.replace(library)
    return library
