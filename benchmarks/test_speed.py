"""The providers and the update as a suite to compare a change with, on a GPU where there is one, else on the CPU.

    python -m pytest benchmarks --benchmark-save=before
    python -m pytest benchmarks --benchmark-compare='*before'

The numbers that are kept are those of `python -m benchmarks`, in which the providers take turns.
"""

from typing import Any

import pytest
import torch

from benchmarks import checks, contract, problems, providers, steps
from benchmarks.grid import ARITHMETIC, GRADIENT, LOSS
from benchmarks.timing import Cache, wall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, N, D, C = 256, 1_000_000 if DEVICE == "cuda" else 100_000, 128, 45


@pytest.fixture(scope="module")
def cache() -> Cache:
    """Emptied before each call."""
    return Cache(DEVICE)


@pytest.mark.parametrize("name", providers.PROVIDERS)
@pytest.mark.parametrize("what", [LOSS, GRADIENT])
@pytest.mark.parametrize("dtype", ARITHMETIC[DEVICE])
def test_loss(benchmark: Any, cache: Cache, dtype: str, what: str, name: str) -> None:
    """Each provider of the loss, whose result is checked before."""
    torch.compiler.reset()
    problem = problems.make(B, N, D, C, contract.DTYPES[dtype], DEVICE)
    provider = providers.PROVIDERS[name]
    with contract.arithmetic(dtype):
        try:
            call = provider.prepare(problem, what == GRADIENT)
        except contract.NotSupported as reason:
            pytest.skip(str(reason))
        error = checks.error(provider.result, call(), problem)
        assert error is not None
        assert error < checks.LARGEST_ERROR[dtype]
        benchmark.group = f"{what}, {dtype}, N = {N:,}"
        benchmark.extra_info["error"] = error
        benchmark.pedantic(wall, args=(call, DEVICE), setup=cache.empty, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("name", steps.UPDATES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_update(benchmark: Any, cache: Cache, dtype: str, name: str) -> None:
    """Each provider of the update."""
    call = steps.UPDATES[name].prepare(problems.make(B, N, D, C, contract.DTYPES[dtype], DEVICE), False)
    benchmark.group = f"update, {dtype}, N = {N:,}"
    benchmark.pedantic(wall, args=(call, DEVICE), setup=cache.empty, rounds=50, warmup_rounds=5)
