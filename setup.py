"""Builds the bank update op of csrc/ into ntdne_kernels/_C.abi3.so.

The op uses PyTorch's stable ABI: one build serves torch 2.10 and newer and every Python from 3.11. What can be built
is built: nothing without a C++ compiler or torch, the CPU kernel with them, the CUDA kernel too where nvcc is found
(no GPU has to be visible). The package works in each case; the update then runs through PyTorch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0"]  # the last one also as PTX, for devices to come


def cuda_toolkit() -> Path | None:
    """Folder of the toolkit that nvcc itself uses; nvcc on the PATH may be a link or a wrapper elsewhere."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ["PATH"]]))
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", plan)
    if top is None:
        return None
    toolkit = Path(top[1].strip()).resolve()
    return toolkit if (toolkit / "include" / "cuda_runtime.h").exists() else None


def supported_architectures(toolkit: Path) -> str:
    """ARCHITECTURES that this nvcc knows, as TORCH_CUDA_ARCH_LIST writes them."""
    listed = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}\n" in listed]
    return ";".join(known) + "+PTX"


def extension() -> dict:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        print(f"ntdne_kernels: no C++ compiler ({compiler}); building without the compiled update op", file=sys.stderr)
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("ntdne_kernels: torch is not importable; building without the compiled update op", file=sys.stderr)
        return {}

    flags = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    settings = {
        "name": "ntdne_kernels._C",
        "sources": ["csrc/update_bank_cpu.cpp", "csrc/bf16_mm_cpu.cpp"],
        "depends": ["csrc/update_bank.h"],
        "extra_compile_args": {"cxx": flags},
        "py_limited_api": True,
    }
    toolkit = cuda_toolkit()
    if toolkit is not None and torch.version.cuda is not None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", supported_architectures(toolkit))
        cpp_extension.CUDA_HOME = str(toolkit)
        settings["sources"].append("csrc/update_bank_cuda.cu")
        settings["extra_compile_args"] = {"cxx": [*flags, "-DUSE_CUDA"], "nvcc": [*flags, "-DUSE_CUDA"]}
        module = cpp_extension.CUDAExtension(**settings)
        # The CUDA runtime inside: the build loads whatever CUDA version the user's torch brings.
        module.libraries = ["cudart_static" if name == "cudart" else name for name in module.libraries]
    else:
        print("ntdne_kernels: no nvcc, or torch without CUDA; building the update op for CPUs only", file=sys.stderr)
        module = cpp_extension.CppExtension(**settings)
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


if __name__ == "__main__":
    setup(options={"bdist_wheel": {"py_limited_api": "cp311"}}, **extension())
