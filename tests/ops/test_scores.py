"""Which score of a batch is remembered for which image: in PyTorch, and in the kernel."""

import pytest
import torch
from torch import Tensor

from ntdne_kernels.ops.backends import gpu
from ntdne_kernels.ops.scores import record_scores_in_pytorch

op = torch.ops.ntdne_kernels.record_scores_.default


@pytest.fixture(params=["PyTorch", "the op", "kernel"])
def record_(request: pytest.FixtureRequest, device: torch.device):
    if request.param == "kernel":
        if gpu is None:
            pytest.skip("needs Triton")
        request.getfixturevalue("kernel_device")
        return gpu.record_scores_
    return {"PyTorch": record_scores_in_pytorch, "the op": op}[request.param]


def recorded(record_, log_p: list[float], index: list[int], labels: list[int], device: torch.device) -> list[float]:
    """Scores of images that were all -9 before; the last place is nobody's."""
    scores = torch.full((len(labels) + 1,), -9.0, device=device)
    given = torch.tensor(log_p, device=device), torch.tensor(index, device=device).long()
    record_(scores, *given, torch.tensor(labels, device=device).long())
    return scores[:-1].tolist()


def test_each_image_takes_its_score(record_, device):
    assert recorded(record_, [-1.0, -torch.inf, -0.5], [2, 0, 3], [0, 1, 0, 2, 1], device) == [
        -torch.inf,
        -9,
        -1,
        -0.5,
        -9,
    ]


def test_of_an_image_given_twice_the_higher_score_is_kept_whatever_it_was_before(record_, device):
    assert recorded(record_, [-12.0, -11.0, -11.5, -torch.inf], [1, 1, 1, 1], [0, 0], device) == [-9, -11]
    assert recorded(record_, [-torch.inf, -torch.inf], [0, 0], [0, 0], device) == [-torch.inf, -9]


def test_the_same_image_in_distant_parts_of_a_batch(record_, device):
    """A program of the kernel takes 64 queries."""
    log_p, index = [-5.0] * 200, list(range(200))
    index[3] = index[70] = index[199] = 150
    log_p[3], log_p[70], log_p[150], log_p[199] = -4.0, -3.0, -6.0, -3.5
    found = recorded(record_, log_p, index, [1] * 200, device)
    assert found[150] == -3
    assert [found[i] for i in (3, 70, 199)] == [-9, -9, -9]
    assert found.count(-5) == 196


def test_nan_leaves_the_old_score(record_, device):
    assert recorded(record_, [torch.nan, -1.0, torch.nan], [0, 1, 1], [0, 0], device) == [-9, -1]


def test_what_is_no_labelled_image_is_passed_over(record_, device):
    scores = [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert recorded(record_, scores, [-1, 3, -7, 1 << 40, 0], [-1, 2, 2], device) == [-9, -9, -9]
    assert recorded(record_, [-1.0], [0], [], device) == []
    assert recorded(record_, [], [], [0], device) == [-9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_scores", [torch.float32, torch.float64])
def test_dtypes_of_log_p_and_of_scores_may_differ(record_, dtype, of_scores, device):
    scores = torch.zeros(3, dtype=of_scores, device=device)
    log_p, index = torch.tensor([-0.1, -0.2], dtype=dtype, device=device), torch.tensor([1, 0], device=device)
    record_(scores, log_p, index, torch.zeros(2, dtype=torch.int64, device=device))
    assert torch.equal(scores[:2], log_p.flip(0).to(of_scores))


def batch(device: torch.device, B: int = 150, N: int = 60) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(0)
    log_p = -torch.rand(B, generator=made)
    log_p[::9], log_p[1::9] = torch.nan, -torch.inf
    index, labels = torch.randint(-2, N + 2, (B,), generator=made), torch.randint(-1, 3, (N,), generator=made)
    return tuple(x.to(device) for x in (torch.full((N + 1,), torch.nan), log_p, index, labels))


@pytest.mark.skipif(gpu is None, reason="needs Triton")
def test_the_kernel_is_the_definition(kernel_device):
    scores, *given = batch(kernel_device)
    expected = scores.clone()
    gpu.record_scores_(scores, *given)
    record_scores_in_pytorch(expected, *given)
    assert 10 < int(scores.isnan().sum()) < 50
    torch.testing.assert_close(scores[:-1], expected[:-1], rtol=0, atol=0, equal_nan=True)


def test_strided_indices_are_read_as_they_stand(record_, device):
    scores, log_p, index, labels = batch(device)
    expected = scores.clone()
    record_(expected, log_p, index, labels)
    record_(scores, log_p, torch.stack([index, index * 0], dim=1)[:, 0], labels)
    torch.testing.assert_close(scores[:-1], expected[:-1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_opcheck(device):
    torch.library.opcheck(op, batch(device))


@pytest.mark.slow
def test_compiled_and_eager_remember_the_same(device):
    scores, *given = batch(device)
    expected = scores.clone()
    op(expected, *given)
    torch.compile(lambda *arguments: op(*arguments), fullgraph=True)(scores, *given)
    torch.testing.assert_close(scores[:-1], expected[:-1], rtol=0, atol=0, equal_nan=True)
