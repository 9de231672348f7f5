"""The matrix products of a tile against float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ntdne_kernels.ops import products

SHAPES = [(1, 1, 1), (6, 2, 64), (5, 3, 65), (13, 7, 1), (12, 130, 200), (67, 129, 63)]
SHAPES += [(16, 32, 16), (17, 31, 33), (32, 33, 15), (33, 600, 97), (4, 0, 3)]  # tile registers: 16 rows, 32 values


@pytest.mark.parametrize("multiply", [torch.ops.ntdne_kernels.bf16_mm_, products.bf16_mm_in_pytorch])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_product_is_exact_to_float32(multiply, shape):
    M, K, L = shape
    source = torch.Generator().manual_seed(M * K * L)

    def inside_of_nan(rows: int, columns: int) -> torch.Tensor:  # a read beyond the matrix spoils the sums
        around = torch.full((rows + 2, columns + 3), torch.nan, dtype=torch.bfloat16)
        matrix = around[1:-1, 1 : 1 + columns]
        return matrix.copy_(torch.randn(rows, columns, generator=source))

    a, b = inside_of_nan(M, K), inside_of_nan(L, K)
    rows, spread = inside_of_nan(K, L).copy_(b.t()), inside_of_nan(K, 2 * L)[:, ::2].copy_(b.t())
    for right in (b.t(), rows, spread):
        whole = torch.randn(M, L + 5, generator=source)
        out, margin = whole[:, :L], whole[:, L:].clone()
        expected = 0.5 * (a.double() @ right.double())
        multiply(out, a, right, 0.5)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6 * K**0.5)
        assert torch.equal(whole[:, L:], margin)


# Linux lets no process use AMX whose alternate signal stack is too small for its registers.
WITHOUT_AMX = """
import ctypes, sys
import pytest

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

library, memory = ctypes.CDLL(None), ctypes.create_string_buffer(4096)
assert library.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]  # which has a stack of its own
failed = pytest.main([*options, sys.argv[1], "-k", "exact_to_float32"])
permitted, ARCH_PRCTL, GET_PERMISSIONS, TILE_DATA = ctypes.c_uint64(), 158, 0x1022, 18
assert library.syscall(ARCH_PRCTL, GET_PERMISSIONS, ctypes.byref(permitted)) == 0
assert not permitted.value >> TILE_DATA & 1
sys.exit(failed)
"""


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or " amx_bf16" not in Path("/proc/cpuinfo").read_text(),
    reason="needs a processor with AMX",
)
def test_bf16_product_where_amx_may_not_be_used():
    run = subprocess.run([sys.executable, "-c", WITHOUT_AMX, __file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_of_a_tile(dtype, device):
    source = torch.Generator().manual_seed(0)
    queries, tile = torch.randn(9, 20, generator=source), torch.randn(31, 20, generator=source)
    queries, tile = queries.to(device, dtype), tile.to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = products.scaled_scores_(torch.empty(9, 31, dtype=wide, device=device), queries, tile, 10.0)
    expected = 10 * (queries.double() @ tile.double().t())
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.rand(9, 31, generator=source, dtype=torch.float64).to(device, wide)
    rows = products.weighted_rows(weights, tile)
    assert rows.dtype == wide
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rows.double(), weights.double() @ tile.double(), rtol=rounding, atol=10 * rounding)


def test_empty_products():
    out = torch.ones(0, 4)
    torch.ops.ntdne_kernels.bf16_mm_(out, torch.empty(0, 3).bfloat16(), torch.empty(3, 4).bfloat16(), 1.0)
    assert out.shape == (0, 4)


@pytest.mark.parametrize("exponential", [torch.ops.ntdne_kernels.exp_, products.exp_in_pytorch])
def test_exponential_is_right_to_two_units_in_the_last_place(exponential):
    x = torch.cat([torch.linspace(-87.3, 88.3, 200_003), torch.linspace(-1e-3, 1e-3, 1001), torch.zeros(5)])
    expected = x.double().exp()
    exponential(x)
    assert ((x.double() - expected).abs() / expected).max() < 2 * 2**-23


@pytest.mark.parametrize("exponential", [torch.ops.ntdne_kernels.exp_, products.exp_in_pytorch])
def test_exponential_of_what_is_not_finite_or_out_of_range(exponential):
    x = torch.tensor([-torch.inf, -1e30, -200.0, torch.inf, 1e30, 100.0, torch.nan] * 9)
    exponential(x)
    expected = torch.tensor([0, 0, 0, torch.inf, torch.inf, torch.inf, torch.nan] * 9)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
