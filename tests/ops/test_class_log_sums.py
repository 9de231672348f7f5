"""The sums over many classes at once, in every backend, against float64 loops over the rows.

Shapes: B queries, N bank rows, K classes.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels.ops import reference
from ntdne_kernels.ops.backends import BACKENDS
from tests.ops.cutting import small_tiles

SIZES = [0, 1, 9, 0, 23, 1, 1, 30, 0]


def problem(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (B, D), bank (N, D), index (B,), offsets (K + 1,); one row is queried twice, one query has no row."""
    made = torch.Generator().manual_seed(0)
    bank = nn.functional.normalize(torch.randn(sum(SIZES), 6, generator=made, dtype=torch.float64), dim=1)
    index = torch.tensor([5, 0, 64, -1, 33, 10, 10, 34, 2])
    features = torch.where((index >= 0).unsqueeze(1), bank[index], -bank[7])
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    return features.to(device, dtype), bank.to(device, dtype), index.to(device), offsets.to(device)


def loops(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """(B, K), as the sums are written."""
    f, g, bounds = features.double().tolist(), bank.double().tolist(), offsets.tolist()
    log_sums = []
    for query, own in zip(f, index.tolist(), strict=True):
        logits = [math.fsum(a * b for a, b in zip(query, row, strict=True)) / sigma for row in g]
        of_classes = []
        for begin, end in itertools.pairwise(bounds):
            rows = [logits[j] for j in range(begin, end) if j != own]
            highest = max(rows, default=0.0)
            of_classes.append(highest + math.log(math.fsum(math.exp(x - highest) for x in rows)) if rows else -math.inf)
        log_sums.append(of_classes)
    return torch.tensor(log_sums, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.03, 0.02, 0.001])
def test_sums_are_those_of_the_formula(backend, device, sigma, monkeypatch):
    small_tiles(monkeypatch)
    arguments = problem(device)
    log_sums = BACKENDS[backend].class_log_sums(*arguments, sigma)
    assert log_sums.dtype == torch.float64
    scale = 1e-13 / sigma
    torch.testing.assert_close(log_sums.cpu(), loops(*arguments, sigma), rtol=scale, atol=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_error_is_at_most_twice_that_of_plain_pytorch(fused, device, dtype, sigma):
    arguments = problem(device, dtype)
    expected = loops(*arguments, sigma)
    found = expected > -torch.inf

    def error(log_sums: Tensor) -> float:
        return float((log_sums.cpu() - expected)[found].abs().max())

    plain = error(reference.class_log_sums(*arguments, sigma))
    # A float32 exponential is off by some 1e-7 in each.
    assert error(BACKENDS[fused].class_log_sums(*arguments, sigma)) <= 2 * plain + 1e-6


def test_many_equal_terms_keep_their_digits(device):
    N = 8192
    bank = nn.functional.normalize(torch.tensor([[0.3, 0.7]], device=device), dim=1).repeat(N, 1)
    index, offsets = torch.tensor([-1], device=device), torch.tensor([0, N], device=device)
    log_sum = BACKENDS["streaming"].class_log_sums(bank[:1] * 0.97, bank, index, offsets, 0.1)
    expected = float(bank[0].double() @ (bank[0] * 0.97).double()) / 0.1 + math.log(N)
    assert float(log_sum) == pytest.approx(expected, rel=0, abs=3e-5)


def test_far_class_is_not_lost_at_a_low_temperature(backend, device):
    bank = torch.tensor([[1.0, 0], [-1.0, 0]], dtype=torch.float32, device=device)
    log_sums = BACKENDS[backend].class_log_sums(
        bank[:1], bank, torch.tensor([-1], device=device), torch.tensor([0, 1, 2], device=device), 0.001
    )
    torch.testing.assert_close(log_sums.cpu(), torch.tensor([[1000.0, -1000.0]], dtype=torch.float64))


@pytest.mark.parametrize("B", [0, 1])
def test_few_queries_and_one_class(backend, device, B):
    features, bank, index, offsets = problem(device)
    log_sums = BACKENDS[backend].class_log_sums(features[:B], bank, index[:B], offsets[[0, -1]], 0.1)
    assert log_sums.shape == (B, 1)
    torch.testing.assert_close(log_sums.cpu(), loops(features[:B], bank, index[:B], offsets[[0, -1]], 0.1).view(B, 1))
