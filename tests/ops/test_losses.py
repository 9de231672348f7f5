"""The losses as functions of log p: against the formulas, at their limits, and what is pruned."""

import math

import pytest
import torch

from ntdne_kernels.ops import losses
from tests import formulas

LOG_P = [0.0, -1e-12, -1e-6, -0.01, -0.5, -0.69, -0.7, -1.0, -5.0, -40.0, -115.0]


@pytest.mark.parametrize("q", [1e-3, 0.1, 0.7, 1.0])
def test_box_cox_is_equation_9(q):
    log_p = torch.tensor(LOG_P, dtype=torch.float64)
    expected = torch.tensor([formulas.ntdne(x, q) for x in LOG_P], dtype=torch.float64)
    torch.testing.assert_close(losses.box_cox(log_p, q), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.3, 0.7, 1.0])
def test_box_cox_and_its_gradient_are_accurate_to_the_last_digits(q, dtype):
    """Values to 8 roundings of −expm1(u)/q in float64, gradients of −p^q: at p near 1, near 0 and q near 0."""
    log_p = torch.tensor(LOG_P, dtype=dtype, requires_grad=True)
    loss = losses.box_cox(log_p, q)
    loss.sum().backward()
    exact = [-math.expm1(q * x) / q for x in log_p.tolist()]
    slope = [-math.exp(q * x) for x in log_p.tolist()]
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.detach(), torch.tensor(exact, dtype=dtype), rtol=8 * epsilon, atol=0)
    # exp(u) itself is known to |u| roundings.
    torch.testing.assert_close(log_p.grad, torch.tensor(slope, dtype=dtype), rtol=250 * epsilon, atol=1e-37)


def test_small_q_gives_snca_in_value_and_gradient():
    """Lemma 1 at q = 10^-6, in float32."""
    values = [x for x in LOG_P if x < 0]
    ntdne = torch.tensor(values, requires_grad=True)
    snca = torch.tensor(values, requires_grad=True)
    loss = losses.ntdne(ntdne, 1e-6, None)
    loss.sum().backward()
    losses.reduce_snca(snca, "sum").backward()
    torch.testing.assert_close(loss, -torch.tensor(values), rtol=1e-4, atol=0)
    torch.testing.assert_close(ntdne.grad, snca.grad, rtol=2e-4, atol=0)


def test_score_zero_gives_the_largest_loss_and_no_gradient():
    log_p = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    loss = losses.ntdne(log_p, 0.7, None)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(1 / 0.7)
    assert log_p.grad[0] == 0
    assert log_p.grad[1].item() == pytest.approx(-math.exp(-0.7))


def test_pruned_rows_are_constant_and_have_exactly_no_gradient():
    log_p = torch.log(torch.tensor([0.1, 0.29, 0.31, 0.9])).requires_grad_()
    loss = losses.ntdne(log_p, 0.7, 0.3)
    loss.sum().backward()
    expected = [formulas.ntdne(x, 0.7, 0.3) for x in log_p.tolist()]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    assert log_p.grad[:2].tolist() == [0, 0]
    assert (log_p.grad[2:] < 0).all()


def test_a_score_of_exactly_k_is_pruned():
    log_p = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    losses.ntdne(log_p, 0.7, 0.25).sum().backward()
    assert log_p.grad.item() == 0


def test_unpruned_gradient_does_not_depend_on_how_many_others_are_pruned():
    """The published code scales every gradient by the kept share of the batch."""
    gradients = []
    for others in ([0.9, 0.8, 0.7], [0.01, 0.02, 0.03]):
        log_p = torch.log(torch.tensor([0.5, *others])).requires_grad_()
        losses.reduce(losses.ntdne(log_p, 0.7, 0.3), "mean").backward()
        gradients.append(log_p.grad[0].item())
    assert gradients[0] == gradients[1] == pytest.approx(-(0.5**0.7) / 4)


def test_indicator_decides_in_place_of_the_score_unless_it_is_nan():
    log_p = torch.log(torch.tensor([0.9, 0.1, 0.1, 0.9])).requires_grad_()
    indicator = torch.log(torch.tensor([0.1, 0.9, torch.nan, torch.nan]))
    losses.ntdne(log_p, 0.7, 0.3, indicator).sum().backward()
    assert (log_p.grad != 0).tolist() == [False, True, False, True]


def test_reductions():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert torch.equal(losses.reduce(values, "none"), values)
    assert losses.reduce(values, "sum") == 9
    assert losses.reduce(values, "mean") == 3


def test_reductions_of_an_empty_batch():
    for reduce in (losses.reduce, losses.reduce_snca):
        empty = torch.empty(0, requires_grad=True)
        assert reduce(empty, "none").shape == (0,)
        for reduction in ("sum", "mean"):
            loss = reduce(empty, reduction)
            assert loss == 0
            loss.backward()


def test_snca_ignores_queries_without_positives():
    log_p = torch.tensor([-1.0, -torch.inf, -3.0], requires_grad=True)
    assert losses.reduce_snca(log_p, "none").tolist() == [1, 0, 3]
    assert losses.reduce_snca(log_p, "sum") == 4
    mean = losses.reduce_snca(log_p, "mean")
    assert mean == 2
    mean.backward()
    assert log_p.grad.tolist() == [-0.5, 0, -0.5]
    nothing = torch.full((2,), -torch.inf, requires_grad=True)
    loss = losses.reduce_snca(nothing, "mean")
    loss.backward()
    assert loss == 0
    assert nothing.grad.tolist() == [0, 0]
