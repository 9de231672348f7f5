"""What setup.py builds, with and without the tools it may find."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ntdne_kernels
from ntdne_kernels.ops import bank_update

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_builds_without_a_compiler_and_says_so(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "no C++ compiler (no-such-compiler)" in result.stderr
    built = {path.name for path in tmp_path.rglob("*")}
    assert {"loss.py", "report.html", "audit.js", "page.css"} <= built
    assert not any(name.endswith(".so") for name in built)


def test_a_setuptools_that_is_too_old_is_named_with_what_to_do(tmp_path):
    """As --no-build-isolation meets it; setuptools itself says "invalid pyproject.toml config"."""
    stub = "__version__ = '76.1.0'\ndef setup(**options): raise SystemExit('invalid pyproject.toml config')\n"
    (tmp_path / "setuptools.py").write_text(stub)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "egg_info"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "setuptools 77 or newer is needed, 76.1.0 is installed: pip install 'setuptools>=77'" in result.stderr


def test_works_without_the_compiled_library(tmp_path):
    """The package alone, in a fresh interpreter: the update runs through PyTorch after one warning."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(ntdne_kernels.__file__).parent, tmp_path / "ntdne_kernels", ignore=ignore)
    script = """
import warnings, torch, ntdne_kernels
assert set(ntdne_kernels.ops.bank_update.LOAD_ERRORS) == {"cpu", "cuda"}
criterion = ntdne_kernels.NTDNELoss(torch.arange(20) % 3, dim=4, dtype=torch.bfloat16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        features = torch.randn(5, 4, requires_grad=True)
        criterion(features, torch.arange(5)).backward()
        criterion.update_bank(features, torch.arange(5))
print([(str(w.message)[:55], w.filename, w.lineno) for w in caught if w.category is RuntimeWarning])
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    line = script[: script.index("    criterion.update_bank")].count("\n") + 1
    assert result.stdout.strip() == f"[('bank updates on cpu run through PyTorch, right but slow', '<string>', {line})]"


def test_finds_the_toolkit_from_nvcc_and_not_from_the_folder_nvcc_lies_in(setup_script, tmp_path, monkeypatch):
    toolkit = tmp_path / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (toolkit / "bin").mkdir()
    assert setup_script.cuda_toolkit() == toolkit
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert setup_script.cuda_toolkit() is None


def test_builds_for_the_architectures_this_nvcc_knows(setup_script, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    assert setup_script.supported_architectures(tmp_path) == "7.5;8.0;8.6;9.0+PTX"


def test_the_library_holds_code_for_every_architecture(setup_script):
    """Wherever nvcc is, also without a GPU."""
    if setup_script.cuda_toolkit() is None or "cuda" in bank_update.LOAD_ERRORS or "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("needs nvcc, a torch with CUDA, and no other choice of architectures")
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = Path(ntdne_kernels.__file__).parent / "_C_cuda.abi3.so"
    listed = subprocess.run([cuobjdump, "--list-elf", "--list-ptx", library], capture_output=True, text=True).stdout
    assert set(re.findall(r"sm_(\d+)\.cubin", listed)) == {"75", "80", "86", "89", "90", "100"}
    assert set(re.findall(r"sm_(\d+)\.ptx", listed)) == {"100"}


def test_the_cuda_library_is_built_wherever_nvcc_is_of_torchs_version(setup_script):
    toolkit = setup_script.cuda_toolkit()
    if toolkit is None or setup_script.cuda_mismatch(toolkit, torch.version.cuda) is not None:
        pytest.skip("needs an nvcc of torch's CUDA version")
    assert "cuda" not in bank_update.LOAD_ERRORS


def test_an_nvcc_of_another_version_is_not_used_and_named(setup_script, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    assert setup_script.cuda_mismatch(tmp_path, "13.0") == "nvcc is of CUDA 12, torch of CUDA 13.0"
    assert setup_script.cuda_mismatch(tmp_path, "12.8") is None
    assert setup_script.cuda_mismatch(tmp_path, None) == "torch has no CUDA"


def test_loaded_kernels_take_the_place_of_the_pytorch_ones():
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        loaded = device_type not in bank_update.LOAD_ERRORS
        assert torch._C._dispatch_has_kernel_for_dispatch_key("ntdne_kernels::update_bank_", key) == loaded


def test_a_library_that_does_not_load_is_named_and_the_package_works(tmp_path):
    """As a build with CUDA does after torch was exchanged for one without."""
    copy = tmp_path / "ntdne_kernels"
    shutil.copytree(Path(ntdne_kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "_C_cuda.abi3.so").write_text("no library")
    script = "from ntdne_kernels.ops.bank_update import LOAD_ERRORS; print(LOAD_ERRORS['cuda'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("_C_cuda.abi3.so does not load")


def test_importing_the_package_brings_in_nothing_but_torch():
    """No module that only an extra installs, so that the core installs small and imports fast."""
    loaded = []
    for package in ("ntdne_kernels", "torch"):
        extras = "('sklearn', 'matplotlib', 'torchvision', 'tqdm', 'scipy', 'pytest', 'lightning', 'yaml', 'PIL')"
        script = f"import sys, {package}; print([name for name in {extras} if name in sys.modules])"
        loaded.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout)
    assert loaded[0] == loaded[1] != ""


def test_the_command_says_what_to_install_where_the_extra_was_left_out():
    script = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_metric_learning'] = None\n"
        "from ntdne_kernels.experiments import main\nsys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "pip install 'ntdne_kernels[experiments]'" in ended.stderr
