"""Builds csrc/ into ntdne_kernels/_C_cpu.abi3.so and _C_cuda.abi3.so.

The ops use PyTorch's stable ABI: one build serves torch 2.10 and newer and every Python from 3.11. What can be built
is built: nothing without a C++ compiler or torch, the CPU kernels with them, the CUDA kernel too where nvcc is found
(no GPU has to be visible). The package works in each case; the update then runs through PyTorch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0"]  # the last one also as PTX, for devices to come
OLDEST_SETUPTOOLS = 77  # that knows `license = "..."` in pyproject.toml, as build-system.requires says


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
    return ";".join(known or ARCHITECTURES) + "+PTX"


def cuda_mismatch(toolkit: Path, torch_cuda: str | None) -> str | None:
    """Why this nvcc cannot build for this torch, or None."""
    if torch_cuda is None:
        return "torch has no CUDA"
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", text)
    if release is None or release[1] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else '?'}, torch of CUDA {torch_cuda}"
    return None


def extension() -> dict:
    """What setup() is told to build here, and how; nothing where the tools are missing."""
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
    modules = [
        cpp_extension.CppExtension(
            name="ntdne_kernels._C_cpu",
            sources=["csrc/update_bank_cpu.cpp", "csrc/bf16_mm_cpu.cpp", "csrc/exp_cpu.cpp", "csrc/streaming_cpu.cpp"],
            depends=[f"csrc/{name}.h" for name in ("update_bank", "float_type", "vector_width", "exp", "tiles")],
            # Without the flag gcc does not vectorise the loop of exp_ where there is no AVX-512.
            extra_compile_args={"cxx": [*flags, "-fno-trapping-math"]},
            py_limited_api=True,
        )
    ]
    toolkit = cuda_toolkit()
    problem = "no nvcc" if toolkit is None else cuda_mismatch(toolkit, torch.version.cuda)
    if toolkit is None or problem is not None:
        print(f"ntdne_kernels: {problem}; building the update op for CPUs only", file=sys.stderr)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", supported_architectures(toolkit))
        cpp_extension.CUDA_HOME = str(toolkit)
        # A library of its own, so that the other one loads where torch has no CUDA.
        module = cpp_extension.CUDAExtension(
            name="ntdne_kernels._C_cuda",
            sources=["csrc/update_bank_cuda.cu"],
            depends=["csrc/update_bank.h", "csrc/float_type.h"],
            extra_compile_args={"cxx": [*flags, "-DUSE_CUDA"], "nvcc": [*flags, "-DUSE_CUDA"]},
            py_limited_api=True,
        )
        # The CUDA runtime inside: the library then loads whatever CUDA version the user's torch brings.
        module.libraries = ["cudart_static" if name == "cudart" else name for name in module.libraries]
        modules.append(module)
    return {"ext_modules": modules, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(
            f"ntdne_kernels: setuptools {OLDEST_SETUPTOOLS} or newer is needed, {setuptools.__version__} is installed: "
            f"pip install 'setuptools>={OLDEST_SETUPTOOLS}', or leave out --no-build-isolation"
        )
    setup(options={"bdist_wheel": {"py_limited_api": "cp311"}}, **extension())
