"""Fixtures that all tests share: devices, backends, and markers that are skipped without a GPU.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; it needs NumPy. A process has either the
interpreter or the compiler, so with a GPU the kernels run there alone.
"""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available() and find_spec("numpy") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from hypothesis import settings

from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.gpu.launches import INTERPRETED

pytest.register_assert_rewrite("tests.archives", "tests.ops.contract")  # before a test imports them
# Time limits per example would fail on a busy machine, not on wrong code.
settings.register_profile("package", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("package")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def served(backend: str, device: torch.device) -> str:
    """The backend; skips the test where this process cannot run it on the device."""
    if backend == "triton" and (device.type == "cpu") != INTERPRETED:
        pytest.skip("the kernels are interpreted in this process" if INTERPRETED else "needs TRITON_INTERPRET=1")
    return backend


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    return served(request.param, device)


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def fused(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend that is not the definition."""
    return served(request.param, device)


@pytest.fixture
def kernel_device(device: torch.device) -> torch.device:
    """Where this process can run the Triton kernels."""
    served("triton", device)
    return device


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    """The limit on compiling one function anew would count over all tests of a process."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
