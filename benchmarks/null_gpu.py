"""A GPU that computes nothing, for machines that have none: what the host does for one can be measured and counted.

`null_gpu.c` stands in for the CUDA runtime, the driver and cuBLAS. All that PyTorch and Triton do above them happens,
the thread in which autograd runs for a GPU included; kernels are compiled and counted, and never run. Memory is the
host's and holds zeros, so what is computed there means nothing: data is to be made on the CPU and copied.

A process has it, or not, from its start on: `environment` is for a new one.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
UPDATE_FLAGS = "-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -arch=sm_90"


def environment() -> dict[str, str]:
    """Variables of a process that is to have such a GPU.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    import torch
    import triton

    # Those of the CUDA that PyTorch was built with; what its packages leave out has not changed since Triton's.
    headers = [*Path(torch.__file__).parent.parent.glob("nvidia/cu*/include")]
    headers.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    # Under the driver's own name, so that all who look for one find it loaded already.
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in headers), SOURCE]
    library = _built(SOURCE, command, "libcuda.so.1", ["-ldl"])
    link = library.with_name("libcuda.so")
    if not link.exists():
        link.symlink_to(library.name)
    return {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}


def update_kernel(checkout: Path) -> Path:
    """The CUDA update of a checkout, with the CUDA runtime of the process, where setup.py links one of its own.

    Raises:
        RuntimeError: there is no nvcc, or it fails.
    """
    import torch
    from torch.utils import cpp_extension

    source = checkout / "csrc" / "update_bank_cuda.cu"
    headers = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = ["-Xcompiler", "-fPIC", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cuda", "-ltorch_cpu"]
    command = ["nvcc", *UPDATE_FLAGS.split(), "-shared", "-cudart", "shared", *headers, source]
    return _built(source, command, "update_bank.so", [*libraries, "-lc10"])


def launches() -> int:
    """How many kernels, fills and copies this process has sent to its GPU."""
    return int(_library().null_gpu_launches())


def kernels_of(call) -> list[str]:
    """Names of what a call launches, in order; copies and fills by theirs."""
    names: list[str] = []
    heard = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: names.append(name.decode()))
    _library().null_gpu_listen(heard)
    try:
        call()
    finally:
        _library().null_gpu_listen(None)
    return names


def is_here() -> bool:
    return hasattr(ctypes.CDLL(None), "null_gpu_launches")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.null_gpu_launches.restype = ctypes.c_long
    return library


def _built(source: Path, command: list, name: str, libraries: list[str]) -> Path:
    """In the user's temporary folder, once for each version of the source and of the command."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{source.name}: needs {command[0]}")
    key = hashlib.sha256(source.read_bytes() + repr((command, sysconfig.get_platform())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"null-gpu-{os.getuid()}" / key
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_name(f"{name}.{os.getpid()}")
        run = subprocess.run([*command, "-o", made, *libraries], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{source.name}: {run.stderr[-1000:]}")
        made.replace(library)
    return library
