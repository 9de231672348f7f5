"""What the tests share: devices, and made archives of unit rows.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. A process has either the interpreter or
the compiler, so with a GPU the kernels run there alone.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from hypothesis import settings
from torch import Tensor, nn

from ntdne_kernels.functional import BACKENDS
from ntdne_kernels.ops.gpu.launches import INTERPRETED

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


@pytest.fixture(params=[name for name, backend in BACKENDS.items() if backend is not None])
def fused(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend that is not the definition."""
    return served(request.param, device)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


class Archive:
    """B queries, most of them noisy copies of rows of a bank of N rows with labels from −1 to C − 1."""

    def __init__(
        self,
        B: int = 9,
        N: int = 40,
        D: int = 5,
        C: int = 4,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        unlabelled: bool = True,
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        bank = nn.functional.normalize(torch.randn(N, D, generator=made, dtype=torch.float64), dim=1)
        index = torch.randint(-1, N, (B,), generator=made)
        noise = torch.randn(B, D, generator=made, dtype=torch.float64)
        features = nn.functional.normalize(bank[index.clamp(min=0)] + 0.5 * noise, dim=1)
        labels = torch.randint(-1 if unlabelled else 0, C, (N,), generator=made)
        self.bank = bank.to(device, dtype)
        self.features = features.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.bank_labels = labels.to(device)
        # Queries outside the bank take a label of their own.
        own = torch.randint(-1, C, (B,), generator=made)
        self.labels = torch.where(index >= 0, labels[index.clamp(min=0)], own).to(device)
        self.index = index.to(device)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `ntdne_kernels.functional` takes them."""
        return self.features, self.bank, self.labels, self.bank_labels, self.index
