"""The functional interface: both losses against the formulas, and one clear error for each kind of bad input."""

import math
from typing import Any

import pytest
import torch

from ntdne_kernels import LabelIndex, functional
from tests import formulas
from tests.archives import Archive


@pytest.mark.parametrize("k", [None, 0.3])
@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_ntdne_loss_is_equation_13(backend, q, k, device):
    archive = Archive(B=12, device=device)
    log_p, _, _ = formulas.leave_one_out(*archive.arguments(), 0.1)
    expected = torch.tensor([formulas.ntdne(x, q, k) for x in log_p], dtype=torch.float64)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = functional.ntdne_loss(*archive.arguments(), q=q, k=k, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss.cpu(), value)


def test_snca_loss_is_equation_5_and_ignores_queries_without_positives(backend, device):
    archive = Archive(B=12, device=device)
    log_p, _, _ = formulas.leave_one_out(*archive.arguments(), 0.1)
    kept = [-x for x in log_p if x > -math.inf]
    assert 0 < len(kept) < 12
    losses = functional.snca_loss(*archive.arguments(), reduction="none", backend=backend)
    torch.testing.assert_close(losses.cpu(), torch.tensor([-x if x > -math.inf else 0 for x in log_p]).double())
    assert functional.snca_loss(*archive.arguments(), backend=backend).item() == pytest.approx(sum(kept) / len(kept))


def test_pruning_zeroes_gradients_of_pruned_queries_and_changes_no_other(device):
    archive = Archive(B=30, device=device)
    gradients = []
    for k in (None, 0.3):
        features = archive.features.clone().requires_grad_()
        functional.ntdne_loss(features, *archive.arguments()[1:], k=k, reduction="sum").backward()
        gradients.append(features.grad)
    p = functional.leave_one_out_log_scores(*archive.arguments()).exp()
    pruned = p <= 0.3
    assert 5 < pruned.sum() < 25
    assert torch.equal(gradients[1][pruned], torch.zeros_like(gradients[1][pruned]))
    assert torch.equal(gradients[1][~pruned], gradients[0][~pruned])


def test_update_bank_returns_the_bank_it_was_given():
    archive = Archive()
    archive.index.clamp_(min=0)
    before = archive.bank.clone()
    features = (archive.features * 7).requires_grad_()
    result = functional.update_bank_(archive.bank, features, archive.index.to(torch.int32), 0.25)
    assert result is archive.bank
    assert not result.requires_grad
    expected = formulas.update_bank(before, features, archive.index, 0.25)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


BAD_CALLS = [
    (dict(features=[1.0]), TypeError, "features: expected a float tensor, got list"),
    (dict(features=torch.ones(9, 5, dtype=torch.int64)), TypeError, "features: expected a float tensor, got torch.int"),
    (dict(features=torch.ones(5)), ValueError, r"features: expected shape \(B, D\), got \(5,\)"),
    (dict(features=torch.ones(9, 4)), ValueError, r"features: expected 5 columns as in the bank, got shape \(9, 4\)"),
    (dict(features=torch.ones(9, 5)), ValueError, "features: expected unit rows .* got norm 2.2.* in row 0"),
    (dict(bank=torch.ones(40)), ValueError, r"bank: expected shape \(N, D\), got \(40,\)"),
    (dict(bank=torch.ones(40, 5).long()), TypeError, "bank: expected a float tensor, got torch.int64"),
    (dict(bank=torch.ones(0, 5), bank_labels=torch.ones(0).long()), ValueError, "bank: expected at least one row"),
    (dict(bank=torch.ones(40, 5).to(torch.float8_e4m3fn)), TypeError, "bank: expected float64, float32, float16 or"),
    (dict(labels=torch.ones(9)), TypeError, "labels: expected an integer tensor, got torch.float32"),
    (dict(labels=torch.ones(8).long()), ValueError, "labels: expected one value for each of the 9 features, got 8"),
    (dict(labels=torch.full((9,), -3)), ValueError, r"labels: expected -1 \(unlabelled\) or a class from 0, got -3"),
    (dict(bank_labels=torch.ones(40)), TypeError, "bank_labels: expected an integer tensor, got torch.float32"),
    (dict(bank_labels=torch.ones(39).long()), ValueError, "bank_labels: expected one label for each of the bank's 40"),
    (
        dict(bank_labels=LabelIndex.from_labels(torch.ones(39).long())),
        ValueError,
        "bank_labels: expected an index of the bank's 40 rows, got one of 39",
    ),
    (dict(index=torch.ones(9)), TypeError, "index: expected an integer tensor, got torch.float32"),
    (dict(index=torch.ones(3).long()), ValueError, "index: expected one value for each of the 9 features, got 3"),
    (dict(index=torch.full((9,), 40)), IndexError, "index: expected -1 or a bank row from 0 to 39, got 40 at row 0"),
    (dict(index=torch.full((9,), -2)), IndexError, "index: expected -1 or a bank row from 0 to 39, got -2 at row 0"),
    (dict(sigma=0), ValueError, r"sigma: expected a number in \(0, inf\), got 0"),
    (dict(sigma=-0.1), ValueError, r"sigma: expected a number in \(0, inf\), got -0.1"),
    (dict(sigma=math.nan), ValueError, r"sigma: expected a number in \(0, inf\), got nan"),
    (dict(sigma="0.1"), TypeError, "sigma: expected a number, got str"),
    (dict(q=0), ValueError, r"q: expected a number in \(0, 1\], got 0"),
    (dict(q=1.1), ValueError, r"q: expected a number in \(0, 1\], got 1.1"),
    (dict(k=0), ValueError, r"k: expected a number in \(0, 1\), got 0"),
    (dict(k=1), ValueError, r"k: expected a number in \(0, 1\), got 1"),
    (dict(reduction="avg"), ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    (dict(backend="cuda"), ValueError, "backend: expected one of 'reference', 'streaming'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=[str(call[2][:60]) for call in BAD_CALLS])
def test_bad_arguments_of_the_losses_are_named(change, error, message):
    names = ("features", "bank", "labels", "bank_labels", "index")
    call: dict[str, Any] = dict(zip(names, Archive(dtype=torch.float32).arguments(), strict=True)) | change
    with pytest.raises(error, match=message):
        functional.ntdne_loss(**call)
    if "q" not in change and "k" not in change:
        with pytest.raises(error, match=message):
            functional.snca_loss(**call)


BAD_UPDATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(features=torch.ones(9, 4)), ValueError, "features: expected 5 columns"),
    (dict(features=None), TypeError, "features: expected a float tensor, got NoneType"),
    (dict(index=torch.ones(9)), TypeError, "index: expected an integer tensor"),
    (dict(index=torch.arange(9) + 32), IndexError, "index: expected -1 or a bank row from 0 to 39, got 40 at row 8"),
    (dict(index=torch.arange(9) - 4), IndexError, "index: expected -1 or a bank row from 0 to 39, got -4 at row 0"),
    (dict(bank=torch.ones(5, 40).t()), ValueError, "bank: expected a contiguous tensor, got strides"),
    (dict(momentum=1.5), ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
    (dict(momentum=-0.1), ValueError, r"momentum: expected a number in \[0, 1\], got -0.1"),
    (dict(momentum=math.nan), ValueError, r"momentum: expected a number in \[0, 1\], got nan"),
    (
        dict(features=torch.zeros(9, 5)),
        ValueError,
        "features: expected rows of finite norm, at least 1e-12, got norm 0.0",
    ),
    (
        dict(features=torch.full((9, 5), math.inf)),
        ValueError,
        "features: .* got norm inf in row 0; nothing was written",
    ),
    (
        dict(features=torch.full((9, 5), math.nan)),
        ValueError,
        "features: .* got norm nan in row 0; nothing was written",
    ),
]


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(("change", "error", "message"), BAD_UPDATES, ids=[str(call[2][:60]) for call in BAD_UPDATES])
def test_bad_arguments_of_the_update_are_named_and_nothing_is_written(change, error, message, validate):
    archive = Archive(dtype=torch.float32)
    call = dict(bank=archive.bank, features=archive.features, index=torch.arange(9)) | change
    before = call["bank"].clone()
    with pytest.raises(error, match=message):
        functional.update_bank_(**call, validate=validate)
    assert torch.equal(call["bank"], before)


@pytest.mark.gpu
def test_validate_raises_on_a_gpu_and_nothing_is_written():
    for change, error, message in BAD_UPDATES:
        archive = Archive(dtype=torch.float32)
        call = dict(bank=archive.bank, features=archive.features, index=torch.arange(9)) | change
        call = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
        before = call["bank"].clone()
        with pytest.raises(error, match=message):
            functional.update_bank_(**call, validate=True)
        assert torch.equal(call["bank"], before)


def test_tensors_on_different_devices_are_named():
    """The meta device stands for another one."""
    names = ("features", "bank", "labels", "bank_labels", "index")
    for name in ("features", "labels", "bank_labels", "index"):
        call: dict[str, Any] = dict(zip(names, Archive().arguments(), strict=True))
        call[name] = call[name].to("meta")
        with pytest.raises(ValueError, match=f"{name}: expected the bank's device, cpu, got meta"):
            functional.ntdne_loss(**call)
