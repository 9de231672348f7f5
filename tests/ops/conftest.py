"""Fixtures of the tests of ops."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from ntdne_kernels.ops.gpu.launches import INTERPRETED

# They run the kernels over NumPy.
collect_ignore = [] if find_spec("numpy") else ["test_hopper.py", "test_hopper_classes.py", "test_memory_check.py"]


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory from `torch.empty` holds NaN, or an integer's largest value: what an op leaves unwritten shows.

    Not in tests that need a GPU: some count launches, and filling is one.
    """
    if "gpu" in request.keywords:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills in this mode alone
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _kernels_keep_to_their_memory() -> Iterator[None]:
    """Interpreted kernels are checked as compute-sanitizer checks them on a GPU."""
    if not INTERPRETED:
        yield
        return
    from tests.ops.memory_check import checked  # needs NumPy, as the interpreter does

    with checked():
        yield
