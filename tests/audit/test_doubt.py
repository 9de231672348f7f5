"""Whether the audit knows when features carry no noise rate.

Shapes: C classes.
"""

import math
from itertools import combinations, permutations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ntdne_kernels.audit import audit_labels, doubt
from tests.audit.archives import blobs


def flipped(true: Tensor, rate: float) -> Tensor:
    made = torch.Generator().manual_seed(1)
    C = int(true.max()) + 1
    wrong = torch.rand(len(true), generator=made) < rate
    return torch.where(wrong, (true + torch.randint(1, C, true.shape, generator=made)) % C, true)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_good_features_carry_a_noise_rate_and_random_ones_do_not(rate):
    digits = load_digits()
    pixels, true = torch.tensor(digits.data), torch.tensor(digits.target)
    labels = flipped(true, rate)
    found = audit_labels(pixels, labels)
    assert found.doubt == ""
    assert found.noise_rate == pytest.approx(float((labels != true).double().mean()), abs=0.04)
    assert found.evidence.rate_at_best == pytest.approx(found.noise_rate, abs=0.04)
    made = torch.Generator().manual_seed(2)
    assert audit_labels(torch.randn(pixels.shape, generator=made), labels).doubt
    # All features nearly alike, as an untrained encoder makes them: neighbours are good, the rate is not.
    alike = audit_labels(pixels + 500, labels, sigma=0.1, ridge=False)
    assert alike.noise_rate > 0.8
    assert alike.doubt


def test_features_that_confuse_classes_in_places_carry_no_noise_rate():
    """Features are 40 clusters: 10 hold one class each, in the others six of ten images are of any class."""
    made = torch.Generator().manual_seed(3)
    place = torch.randint(40, (2000,), generator=made)
    other = (torch.rand(2000, generator=made) < 0.6) & (place >= 10)
    true = torch.where(other, torch.randint(5, (2000,), generator=made), place % 5)
    features = torch.eye(40)[place] + 0.05 * torch.randn(2000, 40, generator=made)
    found = audit_labels(features, true)
    assert found.noise_rate > 0.25  # of labels that are all right
    assert found.doubt == "neighbours contradict labels in some places only, as features that confuse classes make them"


def test_evidence_equals_plain_counting():
    features, labels, _ = blobs(N=60, C=3)
    labels[::9] = -1
    found = audit_labels(features, labels, sigma=0.1, ridge=False, dtype=torch.float64)
    assert found.sample.tolist() == (labels >= 0).nonzero()[:, 0].tolist()
    agree = pairs = 0
    fours: dict[int, list[int]] = {0: [], 1: [], 2: []}
    images: dict[int, int] = {0: 0, 1: 0, 2: 0}
    for image, votes in zip(found.sample.tolist(), found.neighbour_labels.tolist(), strict=True):
        votes = [vote for vote in votes if vote >= 0]
        agree += sum(one == other for one, other in combinations(votes, 2))
        pairs += math.comb(len(votes), 2)
        own = int(found.suggested[image])
        images[own] += 1
        for *three, fourth in permutations(votes, 4):
            if three == [own] * 3:
                fours[own].append(fourth == own)
    sizes = torch.bincount(labels[labels >= 0]).double()
    chance = float((sizes / sizes.sum()).square().sum())
    foretold = float((found.joint.sum(dim=1) * found.transition.square().sum(dim=1)).sum())
    evidence = found.evidence
    assert evidence.agreement == pytest.approx((agree / pairs - chance) / (foretold - chance))
    error = math.sqrt(chance * (1 - chance) / len(found.sample))
    assert evidence.significance == pytest.approx((agree / pairs - chance) / error)
    rates = {own: 1 - sum(hits) / len(hits) for own, hits in fours.items()}
    expected = sum(images[own] * rate for own, rate in rates.items()) / sum(images.values())
    assert evidence.rate_at_best == pytest.approx(expected)
    unlike = {own: [] for own in images}
    for image, votes in zip(found.sample.tolist(), found.neighbour_labels.tolist(), strict=True):
        unlike[int(found.suggested[image])] += [vote != int(found.suggested[image]) for vote in votes if vote >= 0]
    expected = sum(images[own] * sum(wrong) / len(wrong) for own, wrong in unlike.items()) / sum(images.values())
    assert evidence.rate == pytest.approx(expected)


def test_classes_too_small_for_nearest_neighbours_are_a_reason_for_doubt():
    features, labels, _ = blobs(N=40, C=10, wrong=0)
    found = audit_labels(features, labels)
    assert found.neighbour_labels.shape == (40, 0)
    assert math.isnan(found.evidence.agreement)
    assert found.doubt.startswith("most images have fewer than")
    assert audit_labels(features, torch.zeros(40, dtype=torch.int64)).doubt == ""


def test_evidence_of_a_sample_is_near_that_of_the_whole_archive(monkeypatch):
    features, labels, _ = blobs(N=600, C=3)
    whole = audit_labels(features, labels)
    monkeypatch.setattr(doubt, "SAMPLE_SIZE", 300)
    part = audit_labels(features, labels)
    assert (whole.neighbour_labels.shape, part.neighbour_labels.shape) == ((600, 10), (300, 10))
    assert part.evidence.rate_at_best == pytest.approx(whole.evidence.rate_at_best, abs=0.05)
    assert part.evidence.agreement == pytest.approx(whole.evidence.agreement, abs=0.1)
