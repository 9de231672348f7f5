"""The CPU's numbers: python -m pytest benchmarks/test_cpu.py --benchmark-json=benchmarks/results/cpu.json

Then `python -m benchmarks.table benchmarks/results/cpu.json` prints them as a table, with the ratios.
"""

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks import memory, problems

B, N, D, C = 256, 500_000, 128, 45
THREADS = 2


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


made = lru_cache(maxsize=1)(problems.make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_rate(benchmark, dtype):
    """The machine's own: a 4096³ product. 4·B·N·D over this rate is the floor of the loss with its gradient."""
    a = torch.randn(4096, 4096).to(getattr(torch, dtype))
    benchmark.group = "machine"
    benchmark.extra_info |= {"dtype": dtype, "operations": 2 * 4096**3}
    benchmark.pedantic(lambda: a @ a, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", list(problems.LOSSES))
def test_loss_and_gradient(benchmark, loss, dtype):
    problem = made(B, N, D, C, getattr(torch, dtype))
    benchmark.group = f"loss and gradient, {dtype} bank"
    benchmark.extra_info |= {
        "dtype": dtype,
        "loss": loss,
        "operations": 4 * B * N * D,
        "peak_bytes": memory.peak_delta(loss, B, N, D, C, dtype),
    }
    # The machine is shared: medians of few rounds moved by 30 %.
    rounds = 5 if loss == "naive" else 15
    benchmark.pedantic(
        problems.loss_and_gradient, args=(problems.LOSSES[loss], problem), rounds=rounds, warmup_rounds=1
    )


@pytest.mark.parametrize("C", [2, 45, N // 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_of_classes(benchmark, C, dtype):
    problem = made(B, N, D, C, getattr(torch, dtype))
    benchmark.group = f"streaming by number of classes, {dtype} bank"
    benchmark.extra_info |= {"dtype": dtype, "classes": C}
    benchmark.pedantic(problems.loss_and_gradient, args=(problems.streaming, problem), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("rows", [10_000, 100_000, 1_000_000, 4_000_000])
def test_memory_does_not_grow_with_the_bank(benchmark, rows):
    problem = made(B, rows, D, C, torch.float32)
    benchmark.group = "streaming by bank size"
    benchmark.extra_info |= {
        "rows": rows,
        "peak_bytes": memory.peak_delta("streaming", B, rows, D, C, "float32"),
    }
    benchmark.pedantic(problems.loss_and_gradient, args=(problems.streaming, problem), rounds=3, warmup_rounds=1)


def update_in_pytorch(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> None:
    """Eq. 15 as one writes it: right as long as no index stands twice."""
    new = nn.functional.normalize(features, dim=1)
    blend = torch.lerp(new, bank.index_select(0, index), momentum)
    bank.index_copy_(0, index, nn.functional.normalize(blend, dim=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", ["pytorch", "compiled op"])
def test_bank_update(benchmark, update, dtype):
    source = torch.Generator().manual_seed(0)
    bank = nn.functional.normalize(torch.randn(N, D, generator=source), dim=1).to(getattr(torch, dtype))
    features = torch.randn(B, D, generator=source).to(bank.dtype)
    index = torch.randperm(N, generator=source)[:B]
    functions = {"pytorch": update_in_pytorch, "compiled op": torch.ops.ntdne_kernels.update_bank_}
    benchmark.group = f"bank update, {dtype} bank"
    benchmark.extra_info |= {"dtype": dtype, "update": update}
    with torch.no_grad():
        benchmark.pedantic(
            functions[update], args=(bank, features, index, 0.5), rounds=200, iterations=20, warmup_rounds=5
        )
