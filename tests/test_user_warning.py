"""Warnings point at the user's line, whatever lies between."""

import inspect
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntdne_kernels
from ntdne_kernels import IndexedDataset, MemoryBank, NTDNELoss, fill_bank, functional
from ntdne_kernels.ops import bank_update
from ntdne_kernels.user_warning import warn_user

if find_spec("numpy") is not None:
    from ntdne_kernels.audit import audit_bank

N, D = 12, 4
LABELS = torch.arange(N) % 3
FEATURES = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def criterion_of(**options) -> NTDNELoss:
    return NTDNELoss(LABELS, D, **({"k": 0.3, "warmup_epochs": 20, "unit_slope": False} | options))


class Step(nn.Module):
    """A module of the user's around the criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = criterion_of()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.criterion(features, torch.arange(N))  # here


def in_forward() -> None:
    criterion = criterion_of()
    for _ in range(2):
        criterion(FEATURES, torch.arange(N))  # here


def in_no_grad() -> None:
    criterion = criterion_of()
    with torch.no_grad():
        for _ in range(2):
            criterion(FEATURES, torch.arange(N))  # here


def in_set_epoch() -> None:
    criterion = criterion_of(warmup_epochs=1)
    criterion.memory.last_log_p.fill_(-9)
    criterion.set_epoch(1)  # here


def in_fill_bank() -> None:
    loader = DataLoader(IndexedDataset(TensorDataset(FEATURES[:8])), batch_size=4)
    fill_bank(MemoryBank(LABELS, D), nn.Identity(), loader, progress=False)  # here


def in_the_criterions_fill_bank() -> None:
    loader = DataLoader(IndexedDataset(TensorDataset(FEATURES[:8])), batch_size=4)
    criterion_of().fill_bank(nn.Identity(), loader, progress=False)  # here


def in_audit_bank() -> None:
    audit_bank(MemoryBank(LABELS, D))  # here


def in_the_update_without_a_kernel() -> None:
    bank_update.update_bank_in_pytorch(FEATURES.clone(), FEATURES, torch.arange(N), 0.5)  # here


def in_the_choice_of_a_backend() -> None:
    class Gpu:
        """A bank on a device that this machine has not."""

        device = torch.device("cuda")

        def size(self, _: int) -> int:
            return D

        def new_empty(self, *_: object, **__: object) -> "Gpu":
            return self

    functional.choose_backend(None, Gpu(), None)  # here


@pytest.mark.parametrize(
    "call",
    [
        in_forward,
        in_no_grad,
        Step,
        in_set_epoch,
        in_fill_bank,
        in_the_criterions_fill_bank,
        pytest.param(in_audit_bank, marks=pytest.mark.skipif(find_spec("numpy") is None, reason="needs NumPy")),
        in_the_update_without_a_kernel,
        in_the_choice_of_a_backend,
    ],
)
def test_the_line_is_the_users(call: Callable[[], nn.Module | None], monkeypatch):
    monkeypatch.setattr(bank_update, "LOAD_ERRORS", {"cpu": "no compiler"})
    monkeypatch.setattr(bank_update, "_warned", set())
    monkeypatch.setitem(functional.BACKENDS, "triton", SimpleNamespace(missing=lambda bank: "another GPU"))
    monkeypatch.setattr(functional, "_said", set())
    source, first = inspect.getsourcelines(call)
    expected = first + next(number for number, line in enumerate(source) if line.endswith("# here\n"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = call()
        if step is not None:
            step(FEATURES)
            step(FEATURES)
    assert len(said) > 0
    assert {(warning.filename, warning.lineno) for warning in said} == {(__file__, expected)}


def test_a_warning_has_its_category():
    with pytest.warns(RuntimeWarning, match="^slow$") as said:
        warn_user("slow", RuntimeWarning)
    assert said[0].filename == __file__


def test_all_warnings_of_the_package_go_this_way():
    package = Path(ntdne_kernels.__file__).parent
    counted = [path.name for path in package.rglob("*.py") if re.search(r"\bwarn(_explicit)?\(", path.read_text())]
    assert counted == ["user_warning.py"]
