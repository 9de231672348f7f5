"""Shares, scores, densities and nearest neighbours against plain PyTorch over all pairs."""

import numpy as np
import pytest
import torch
from torch import nn

from ntdne_kernels import MemoryBank
from ntdne_kernels.audit import (
    SIGMAS,
    audit_bank,
    audit_labels,
    choose_sigma,
    feature_bank,
    nearest_neighbours,
    neighbourhood,
)
from tests.audit.archives import blobs, shares, small_pieces


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("C", [1, 4, 20])
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_shares_and_scores_equal_the_formula(backend, device, C, sigma, pieces, monkeypatch):
    if pieces:
        small_pieces(monkeypatch)
    features, labels, _ = blobs(N=40, C=C)
    labels[::7] = -1
    found = audit_labels(
        features, labels, sigma=sigma, ridge=False, top=5, device=device, dtype=torch.float64, backend=backend
    )
    expected = shares(features, labels, sigma)
    best = expected.topk(min(5, expected.size(1)), dim=1).values
    torch.testing.assert_close(found.top_shares, best, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expected.gather(1, found.top_classes), best, rtol=1e-9, atol=1e-12)
    labelled = labels >= 0
    own = expected[labelled].gather(1, found.labels[labelled].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.log_score[labelled].double(), own.log(), rtol=1e-6, atol=1e-6)
    assert found.log_score[~labelled].isnan().all()
    rows = nn.functional.normalize(features, dim=1)
    density = (rows @ rows.t() / sigma).fill_diagonal_(-torch.inf).logsumexp(dim=1) - np.log(len(rows) - 1)
    torch.testing.assert_close(found.log_density.double(), density, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_round_only_the_rows(fused, device, dtype):
    features, labels, _ = blobs()
    found = audit_labels(features, labels, sigma=0.1, ridge=False, device=device, dtype=dtype, backend=fused)
    rows = feature_bank(features, labels, dtype=dtype).rows(torch.arange(len(features)))
    logits = (rows.double() @ rows.double().t() / 0.1).fill_diagonal_(-torch.inf)
    same = labels.unsqueeze(1) == labels
    expected = torch.softmax(logits, dim=1).mul(same).sum(dim=1)
    torch.testing.assert_close(found.score.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alike", [0, 3])
def test_sigma_is_the_middle_of_those_that_agree_best_with_the_labels(alike, device):
    features, labels, _ = blobs(C=3)
    features[:, 0] += alike  # features that are nearly alike want a smaller one
    labels[::7] = -1
    bank = feature_bank(features, labels, device=device, dtype=torch.float64)
    labelled = labels >= 0
    agreement = []
    for sigma in SIGMAS:
        largest = shares(features, labels, sigma).argmax(dim=1)
        agreement.append(float((largest == labels)[labelled].double().mean()))
    best = max(agreement)
    least = best - np.sqrt(best * (1 - best) / int(labelled.sum()))
    good = [sigma for sigma, value in zip(SIGMAS, agreement, strict=True) if value >= least]
    assert len(good) < len(SIGMAS)
    assert choose_sigma(bank) == good[(len(good) - 1) // 2]
    assert audit_bank(bank).sigma == audit_labels(features, labels).sigma == choose_sigma(bank)


def test_features_that_are_nearly_alike_get_a_small_sigma():
    features, labels, true = blobs(wrong=0.3)
    features[:, 0] += 30
    found = audit_labels(features, labels, ridge=False)
    assert found.sigma < 0.005
    assert float((found.suggested == true).double().mean()) > 0.9
    assert float((audit_labels(features, labels, sigma=0.1, ridge=False).suggested == true).double().mean()) < 0.9


def test_sigma_of_a_sample_is_that_of_the_whole_archive(monkeypatch):
    features, labels, _ = blobs(N=900)
    bank = feature_bank(features, labels)
    whole = SIGMAS.index(choose_sigma(bank))
    monkeypatch.setattr(neighbourhood, "SAMPLE_SIZE", 400)
    monkeypatch.setattr(neighbourhood, "PRODUCTS", 9000)  # ten images at a time
    assert abs(SIGMAS.index(choose_sigma(bank)) - whole) <= 2


def test_archive_without_labels_has_a_sigma_too():
    assert choose_sigma(feature_bank(torch.eye(3), torch.full((3,), -1))) in SIGMAS


def test_image_unlike_all_others_has_the_lowest_density():
    features, labels, _ = blobs(wrong=0)
    features[60] = -features.sum(dim=0)
    assert int(audit_labels(features, labels).log_density.argmin()) == 60


def test_nearest_neighbours_equal_those_of_all_pairs(device, monkeypatch):
    small_pieces(monkeypatch)
    features, labels, _ = blobs()
    bank = feature_bank(features, labels, device=device, dtype=torch.float64)
    images, similarity = nearest_neighbours(bank, torch.tensor([0, 77]), 6)
    rows = nn.functional.normalize(features, dim=1)
    expected = (rows @ rows.t()).fill_diagonal_(-torch.inf)[[0, 77]].topk(6, dim=1)
    assert torch.equal(images, expected.indices)
    torch.testing.assert_close(similarity.double(), expected.values, rtol=1e-6, atol=1e-6)
    assert nearest_neighbours(bank, torch.tensor([0]), 500)[0].shape == (1, 119)


@pytest.mark.parametrize(
    ("images", "k", "error", "message"),
    [
        ([0.5], 3, TypeError, "images: expected integers, got 0.5"),
        (torch.tensor([12]), 3, IndexError, "images: expected"),
        (torch.tensor([1]), 0, ValueError, "k: expected 1 or more neighbours, got 0"),
    ],
)
def test_bad_arguments_of_nearest_neighbours_are_named(images, k, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbours(MemoryBank(torch.arange(10) % 3, 8), images, k)
