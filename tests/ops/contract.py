"""What every backend promises, whether it sees the bank whole or in parts.

test_leave_one_out.py checks it for the whole bank, test_class_sums.py for parts. `by` is one of the forms of
`tests.archives.arguments`.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels.functional import leave_one_out_log_scores
from tests import formulas
from tests.archives import Archive, arguments, labels_of


def check_scores_and_gradients(backend: str, by: str, sigma: float, device: torch.device) -> None:
    """log p and its gradients to features and bank are those of the formulas."""
    archive = Archive(device=device)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features, bank = features.requires_grad_(), bank.clone().requires_grad_()
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, sigma=sigma, backend=backend)
    upstream = torch.linspace(-1, 2, len(log_p), dtype=torch.float64, device=device)
    finite = log_p > -torch.inf
    (log_p[finite] * upstream[finite]).sum().backward()

    expected, p, p_same = formulas.leave_one_out(features, bank, labels, labels_of(archive, by), index, sigma)
    to_features, to_bank = formulas.log_p_gradients(features, bank, p, p_same, upstream.tolist(), sigma)
    assert any(math.isinf(x) for x in expected)
    assert any(not math.isinf(x) for x in expected)
    scale = 1e-13 / sigma
    for found, exact, tolerance in (
        (log_p.detach(), expected, scale),
        (features.grad, to_features, 10 * scale),
        (bank.grad, to_bank, 10 * scale),
    ):
        torch.testing.assert_close(
            found.cpu(), torch.tensor(exact, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )


def check_far_positives(backend: str, by: str, device: torch.device) -> None:
    """A score near −115 is finite; sums with a common offset would underflow to −inf."""
    bank = nn.functional.normalize(torch.tensor([[1.0, 0.02], [1.0, 0.0], [-0.15, 1.0]], device=device), dim=1)
    archive = Archive(1, 3, 2, 2, device=device, dtype=torch.float32)
    archive.features = bank[1:2].clone()
    archive.bank, archive.bank_labels = bank, torch.tensor([0, 1, 1], device=device)
    archive.labels, archive.index = torch.tensor([1], device=device), torch.tensor([1], device=device)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features.requires_grad_()
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, sigma=0.01, backend=backend)
    log_p.sum().backward()
    expected, p, p_same = formulas.leave_one_out(features, bank, labels, labels_of(archive, by), index, 0.01)
    to_features, _ = formulas.log_p_gradients(features, bank, p, p_same, [1.0], 0.01)
    assert -120 < expected[0] < -110
    assert log_p.item() == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(features.grad.cpu(), torch.tensor(to_features), rtol=1e-5, atol=1e-4)


def check_queries_without_positives(backend: str, by: str, device: torch.device) -> None:
    """They have the score −inf and a gradient of exactly zero."""
    archive = Archive(B=3, N=6, device=device)
    archive.bank_labels = torch.tensor([0, 1, 1, 2, -1, -1], device=device)
    archive.index = torch.tensor([0, 4, -1], device=device)  # alone in its class; unlabelled; of a class not there
    archive.labels = torch.tensor([0, -1, 3], device=device)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features, bank = features.requires_grad_(), bank.clone().requires_grad_()
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    assert (log_p == -torch.inf).all()
    torch.where(log_p.isinf(), log_p * 0.5, log_p).sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    assert torch.equal(bank.grad, torch.zeros_like(bank))


def check_empty_batch(backend: str, by: str, device: torch.device) -> None:
    """No queries: no scores, and a bank gradient of zero."""
    archive = Archive(B=0, device=device)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features, bank = features.requires_grad_(), bank.clone().requires_grad_()
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    assert log_p.shape == (0,)
    log_p.sum().backward()
    assert features.grad.shape == (0, 5)
    assert torch.equal(bank.grad, torch.zeros_like(bank))


def check_error(backend: str, by: str, dtype: torch.dtype, sigma: float, clustered: bool, device: torch.device) -> None:
    """The error over 2000 rows is at most twice that of plain PyTorch; `clustered` rows have p near 1."""
    archive = Archive(B=64, N=2000, D=48, C=10, dtype=dtype, device=device, unlabelled=False)
    archive.labels.clamp_(min=0)
    if clustered:  # both sums nearly cancel
        centres = archive.bank[:10].float()[archive.bank_labels]
        archive.bank = nn.functional.normalize(centres + 0.05 * archive.bank.float(), dim=1).to(dtype)
        noise = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)).to(device)
        rows = archive.bank.float()[archive.index.clamp(min=0)]
        archive.features = nn.functional.normalize(rows + 0.02 * noise, dim=1)
        archive.labels = archive.bank_labels[archive.index.clamp(min=0)]
    check_error_of_archive(archive, by, backend, sigma)


def check_error_of_archive(archive: Archive, by: str, backend: str, sigma: float) -> None:
    """Errors of log p and of its gradient, against float64, are at most twice those of plain PyTorch."""
    exact = archive.features.double().requires_grad_()
    truth = leave_one_out_log_scores(
        exact, archive.bank.double(), *archive.arguments()[2:], sigma=sigma, backend="reference"
    )
    truth.sum().backward()
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features = features.clone().requires_grad_()
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, sigma=sigma, backend=backend)
    log_p.sum().backward()
    plain_log_p, plain_gradient = plain_pytorch(archive, sigma)
    assert log_p.dtype == torch.float32

    # One rounding of s/σ; and of the two means of unit rows, over σ, whose difference is the gradient.
    epsilon = torch.finfo(torch.float32).eps / sigma
    assert (log_p - truth).abs().max() <= 2 * (plain_log_p - truth).abs().max() + epsilon
    error = (features.grad - exact.grad).norm(dim=1).max()
    assert error <= 2 * (plain_gradient - exact.grad).norm(dim=1).max() + 2 * epsilon


def plain_pytorch(archive: Archive, sigma: float) -> tuple[Tensor, Tensor]:
    """log p and its gradient as one writes them in PyTorch: products in the bank's dtype, float32 softmax."""
    features = archive.features.clone().requires_grad_()
    logits = (features.to(archive.bank.dtype) @ archive.bank.t()).float() / sigma
    own = torch.arange(len(archive.bank), device=logits.device) == archive.index.unsqueeze(1)
    log_share = torch.log_softmax(logits.masked_fill(own, -torch.inf), dim=1)
    same = (archive.labels.unsqueeze(1) == archive.bank_labels) & ~own
    log_p = torch.logsumexp(log_share.masked_fill(~same, -torch.inf), dim=1)
    log_p.sum().backward()
    return log_p.detach(), features.grad
