"""Outliers, calibrated suggestions, and classes to merge or split."""

import pytest
import torch

from ntdne_kernels.audit import agreement_at, audit_labels, cut_class, find_alike_classes, find_outliers
from ntdne_kernels.audit.class_structure import Halves
from tests.audit.archives import blobs


@pytest.mark.parametrize("seed", range(5))
def test_no_image_of_a_normal_archive_stands_out(seed):
    density = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    assert find_outliers(density).outlying.sum() <= 2  # half an image is expected


def test_outliers_are_seen_by_their_density_and_do_not_hide_each_other():
    made = torch.Generator().manual_seed(0)
    density = torch.randn(1000, generator=made)
    density[:8] -= 12
    found = find_outliers(density)
    assert found.outlying.nonzero().squeeze(1).tolist() == list(range(8))
    assert (found.z[:8] > found.z[8:].max()).all()
    assert (found.expected[:8] < 0.5).all()


def test_an_image_in_the_wrong_class_is_no_outlier_and_one_of_no_class_is():
    made = torch.Generator().manual_seed(0)
    features = torch.randn(400, 12, generator=made)
    features[:200, 0] += 9
    features[200:, 1] += 9
    features[7] = 0
    features[7, 5] = -9
    labels = torch.arange(400) // 200
    labels[3] = 1
    found = find_outliers(audit_labels(features, labels, sigma=0.1).log_density)
    assert found.outlying[7]
    assert not found.outlying[3]
    assert int(found.z.argmax()) == 7


@pytest.mark.parametrize("N", [1, 2, 19])
def test_the_smallest_archives_have_no_outliers(N):
    assert not find_outliers(torch.full((N,), -torch.inf)).outlying.any()


def test_equal_densities_have_no_outliers():
    assert not find_outliers(torch.ones(100)).outlying.any()


def test_agreement_is_the_isotonic_regression_of_its_bins():
    from scipy.optimize import isotonic_regression

    made = torch.Generator().manual_seed(0)
    share = torch.rand(1000, generator=made).sort().values
    agrees = torch.rand(1000, generator=made) < share
    bins = agrees.double().reshape(20, 50).mean(dim=1)
    at = share[25::50]
    expected = torch.tensor(isotonic_regression(bins.numpy()).x)
    assert torch.allclose(agreement_at(share, agrees, at), expected)


@pytest.mark.parametrize("n", [1, 49, 101])
def test_agreement_of_few_images_is_a_share(n):
    found = agreement_at(torch.rand(n), torch.ones(n, dtype=torch.bool), torch.tensor([0.0, 0.5, 1.0]))
    assert found.tolist() == [1.0, 1.0, 1.0]


def test_suggestions_for_unlabelled_images_are_right_as_often_as_said():
    features, labels, true = blobs(N=2000, wrong=0)
    features = features + 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    hidden = torch.rand(2000, generator=torch.Generator().manual_seed(4)) < 0.5
    audit = audit_labels(features, torch.where(hidden, -1, labels))
    judged = audit.judged
    said = agreement_at(
        audit.suggested_share[judged], (audit.suggested == labels)[judged], audit.suggested_share[hidden]
    )
    right = (audit.suggested == true)[hidden].double()
    assert 0.5 < right.mean() < 0.95
    for low, high in ((0, 0.6), (0.6, 0.9), (0.9, 1.01)):
        some = (said >= low) & (said < high)
        assert abs(said[some].mean() - right[some].mean()) < 0.06


def test_a_class_of_two_names_is_named_and_no_other_pair():
    features, labels, _ = blobs(N=600, C=4, wrong=0.1)
    half = torch.rand(600, generator=torch.Generator().manual_seed(5)) < 0.5
    audit = audit_labels(features, torch.where((labels == 2) & half, 4, labels))
    found = find_alike_classes(audit.labels, audit.suggested)
    assert [(pair.one, pair.other) for pair in found] == [(2, 4)]
    audit = audit_labels(features, labels)
    assert find_alike_classes(audit.labels, audit.suggested) == []


def test_small_classes_are_not_called_alike():
    labels = torch.arange(58) % 2
    assert find_alike_classes(labels, torch.zeros(58, dtype=torch.int64)) == []


@pytest.mark.parametrize("D", [1, 2, 3, 8, 64])
def test_a_class_of_one_cloud_is_not_split(D):
    rows = torch.randn(300, D, generator=torch.Generator().manual_seed(D))
    assert not cut_class(rows).apart


@pytest.mark.parametrize("D", [2, 8, 64])
def test_two_clouds_under_one_name_are_split_into_them(D):
    rows = torch.randn(300, D, generator=torch.Generator().manual_seed(D))
    rows[:100] += 12 / D**0.5
    halves = cut_class(rows)
    assert halves.apart
    assert halves.second.nonzero().squeeze(1).tolist() == list(range(100))  # the smaller one


def test_a_cut_that_mixes_as_one_cloud_does_is_none():
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not Halves(nothing, mixing=0.1, expected=0.2).apart
    assert not Halves(nothing, mixing=0.2, expected=1.0).apart
    assert Halves(nothing, mixing=0.1, expected=0.4).apart


def test_equal_rows_are_one_class():
    assert not cut_class(torch.ones(50, 3)).apart
