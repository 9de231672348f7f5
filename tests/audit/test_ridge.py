"""The ridge regression's leave-one-out predictions against plain fits without each image.

Shapes: N images, D features, C classes.
"""

import pytest
import torch
from torch import Tensor

from ntdne_kernels import MemoryBank
from ntdne_kernels.audit import audit_labels, feature_bank, fit_ridge, ridge
from tests.audit.archives import blobs, small_pieces


def refitted(rows: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """(N, C) predictions of each row by a fit to the other labelled ones, the bias as a column of ones."""
    C, ones = int(labels.max()) + 1, torch.ones(len(rows), 1, dtype=rows.dtype)
    columns = torch.cat([rows, ones], dim=1)
    weights = torch.full((columns.size(1),), penalty, dtype=rows.dtype)
    weights[-1] = 0
    found = rows.new_empty(len(rows), C)
    for i in range(len(rows)):
        others = (labels >= 0) & (torch.arange(len(rows)) != i)
        X, Y = columns[others], torch.nn.functional.one_hot(labels[others], C).to(rows.dtype)
        found[i] = columns[i] @ torch.linalg.solve(X.T @ X + weights.diag(), X.T @ Y)
    return found


def mean_eigenvalue(rows: Tensor, labels: Tensor) -> float:
    """Of the scatter matrix of the labelled rows."""
    fitted = rows[labels >= 0]
    return float((fitted - fitted.mean(dim=0)).square().sum() / rows.size(1))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("shape", ["N > D", "D > N", "constant column"])
def test_predictions_equal_fits_without_each_image(shape, pieces, device, monkeypatch):
    if pieces:
        small_pieces(monkeypatch)
    features, labels, _ = blobs(N=40, C=5)
    labels[::7], labels[1] = -1, 5  # unlabelled images, and a class of one
    if shape == "D > N":
        features = torch.cat([features, torch.randn(40, 60, generator=torch.Generator().manual_seed(0))], dim=1)
    if shape == "constant column":
        features[:, 3] = 0
    bank = feature_bank(features, labels, device=device, dtype=torch.float64)
    fit = fit_ridge(bank)
    found = fit.log_shares(bank, bank.positions(torch.arange(40))).cpu()
    rows = bank.rows(torch.arange(len(bank))).cpu()
    predicted = refitted(rows, labels, fit.strength * mean_eigenvalue(rows, labels))
    torch.testing.assert_close(found, torch.log_softmax(predicted / fit.temperature, dim=1), rtol=1e-9, atol=1e-9)


def test_strength_and_temperature_are_the_most_likely_ones():
    features, labels, _ = blobs(N=60, C=3, wrong=0.3)
    bank = feature_bank(features, labels, dtype=torch.float64)
    fit = fit_ridge(bank)
    rows = bank.rows(torch.arange(len(bank))).cpu()

    def likelihood(strength: float, temperature: float) -> float:
        predicted = refitted(rows, labels, strength * mean_eigenvalue(rows, labels))
        return -float(torch.nn.functional.cross_entropy(predicted / temperature, labels))

    chosen = likelihood(fit.strength, fit.temperature)
    for strength in ridge.STRENGTHS:
        assert chosen >= likelihood(strength, fit.temperature) - 1e-9
    for temperature in ridge.TEMPERATURES:
        assert chosen >= likelihood(fit.strength, temperature) - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_round_only_the_rows(dtype, device):
    features, labels, _ = blobs()
    bank = feature_bank(features, labels, device=device, dtype=dtype)
    exact = feature_bank(bank.rows(torch.arange(120)).double(), labels, device=device, dtype=torch.float64)
    exact.storage.copy_(bank.storage)  # not normalised anew
    rows = torch.arange(120, device=device)
    fit, expected = fit_ridge(bank), fit_ridge(exact)
    assert (fit.strength, fit.temperature) == (expected.strength, expected.temperature)
    torch.testing.assert_close(
        fit.log_shares(bank, rows).double(), expected.log_shares(exact, rows), rtol=1e-4, atol=1e-4
    )


def test_bank_on_disk_is_fitted_as_one_in_memory(tmp_path):
    features, labels, _ = blobs()
    bank = MemoryBank(labels, 8, storage="disk", path=tmp_path / "bank")
    bank.update_(features.float(), torch.arange(120), momentum=0.0)
    rows = torch.arange(120)
    expected = feature_bank(features.float(), labels)
    assert torch.equal(fit_ridge(bank).log_shares(bank, rows), fit_ridge(expected).log_shares(expected, rows))


def test_features_that_are_all_alike_say_nothing():
    labels = torch.arange(12) % 3
    bank = feature_bank(torch.ones(12, 4), labels)
    shares = fit_ridge(bank).log_shares(bank, torch.arange(12)).exp()
    assert shares.isfinite().all()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(12))


def test_a_sample_chooses_nearly_as_all_images_do(monkeypatch):
    features, labels, _ = blobs(N=600, C=3, wrong=0.3)
    bank = feature_bank(features, labels)
    whole = fit_ridge(bank)
    monkeypatch.setattr(ridge, "SAMPLE_SIZE", 300)
    part = fit_ridge(bank)
    assert part.strength == pytest.approx(whole.strength, rel=9)
    assert part.temperature == pytest.approx(whole.temperature, rel=0.5)


def test_archive_with_fewer_than_two_labels_is_refused():
    bank = feature_bank(torch.eye(3), torch.tensor([-1, 4, -1]))
    with pytest.raises(ValueError, match="^bank: expected two labelled images or more, got 1$"):
        fit_ridge(bank)


def test_ridge_finds_a_wrong_label_that_the_neighbours_miss():
    """Four of five features are noise that is the same for wrong and right labels: near neighbours are near in it."""
    made = torch.Generator().manual_seed(0)
    true = torch.arange(300) % 2
    features = torch.cat([0.4 * (2 * true - 1).unsqueeze(1), torch.randn(300, 24, generator=made)], dim=1)
    labels = true.clone()
    labels[:30] = 1 - labels[:30]

    def found(ridge: bool) -> int:
        return int((audit_labels(features, labels, ridge=ridge).ranking[:30] < 30).sum())

    assert found(ridge=True) > found(ridge=False)


def test_shares_of_few_images_and_many_classes_are_those_of_all_images():
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    bank = feature_bank(features, torch.arange(60) % 20)
    fit, few = fit_ridge(bank), torch.tensor([3, 41])
    torch.testing.assert_close(fit.log_shares(bank, few), fit.log_shares(bank, torch.arange(60))[few])
