"""Quality, ranking, suspects, corrections and confusions, also of odd archives.

Shapes: C classes.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

from ntdne_kernels.audit import METHODS, audit_labels, feature_bank, fit_ridge, otsu_threshold, result
from tests.audit.archives import blobs, shares


@pytest.mark.parametrize("sigma", [0.1, "auto"])
def test_wrong_labels_rank_first_and_get_the_right_suggestion(sigma):
    features, labels, true = blobs(wrong=0.2)
    found = audit_labels(features, labels, sigma=sigma, ridge=False)
    wrong = labels != true
    assert wrong[found.ranking[: int(wrong.sum())]].all()
    assert torch.equal(found.suggested, true)
    assert torch.equal(found.suspects(), wrong)
    assert torch.equal(found.corrected(), true)
    assert abs(found.noise_rate - float(wrong.double().mean())) < 0.02


def test_wrong_labels_rank_first_with_the_ridge_too():
    features, labels, true = blobs(wrong=0.2)
    found = audit_labels(features, labels)
    wrong = labels != true
    assert found.ridge
    assert wrong[found.ranking[: int(wrong.sum())]].all()
    assert torch.equal(found.suggested, true)
    assert abs(found.noise_rate - float(wrong.double().mean())) < 0.02


@pytest.mark.parametrize("method", [*METHODS, 0.3])
def test_each_method_finds_the_wrong_labels_of_well_separated_classes(method):
    features, labels, true = blobs(N=400, wrong=0.15)
    suspects = audit_labels(features, labels).suspects(method)
    wrong = labels != true
    assert float((suspects & wrong).sum() / suspects.sum()) > 0.9
    assert float((suspects & wrong).sum() / wrong.sum()) > 0.9


def test_clean_archive_has_no_suspects():
    assert not audit_labels(*blobs(N=400, wrong=0)[:2]).suspects("rate").any()


def test_transition_equals_that_of_the_noise():
    features, labels, true = blobs(N=4000, C=3, wrong=0.3)
    found = audit_labels(features, labels)
    counts = torch.zeros(3, 3, dtype=torch.float64).index_put_(
        (true, labels), torch.ones(4000).double(), accumulate=True
    )
    torch.testing.assert_close(found.transition, counts / counts.sum(dim=1, keepdim=True), rtol=0, atol=0.02)
    torch.testing.assert_close(found.joint, counts / 4000, rtol=0, atol=0.01)
    assert float(found.joint.sum()) == pytest.approx(1)


@pytest.mark.parametrize("top", [1, 2, 9])
def test_quality_equals_its_formula(top):
    features, labels, _ = blobs()
    labels[::9] = -1
    found = audit_labels(features, labels, sigma=0.1, ridge=False, dtype=torch.float64, top=top)
    p = shares(features, labels, 0.1)
    j = found.judged
    own = p[j].gather(1, labels[j].unsqueeze(1)).squeeze(1)
    other = p[j].scatter(1, labels[j].unsqueeze(1), 0).amax(dim=1)
    torch.testing.assert_close(found.quality[j].double(), own / (own + other), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.label_share[j], own, rtol=1e-5, atol=1e-9)
    assert torch.equal(found.quality[found.ranking][: int(j.sum())], found.quality[j].sort().values)


def test_shares_of_neighbours_and_ridge_are_multiplied():
    features, labels, _ = blobs(C=5)
    labels[::9] = -1
    found = audit_labels(features, labels, sigma=0.1, dtype=torch.float64)
    bank = feature_bank(features, labels, dtype=torch.float64)
    ridge = fit_ridge(bank).log_shares(bank, bank.positions(torch.arange(120))).exp()
    expected = (shares(features, labels, 0.1) * ridge).sqrt()
    expected /= expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.top_shares, expected.sort(dim=1, descending=True).values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expected.gather(1, found.top_classes), found.top_shares, rtol=1e-6, atol=1e-7)
    j = found.judged
    torch.testing.assert_close(
        found.label_share[j], expected[j].gather(1, labels[j].unsqueeze(1)).squeeze(1), rtol=1e-5, atol=1e-9
    )
    alone = audit_labels(features, labels, sigma=0.1, ridge=False, dtype=torch.float64)
    assert torch.equal(found.log_score.nan_to_num(), alone.log_score.nan_to_num())


def test_quality_is_0_without_a_neighbour_of_the_label_and_1_where_all_carry_it():
    far = torch.tensor([[1.0, 0], [1, 0], [1, 1], [-1, 0], [-1, 0.01], [-1, 0.02]])
    quality = audit_labels(far, [0, 0, 1, 1, 1, 1], sigma=0.001).quality
    assert quality.tolist() == pytest.approx([1, 1, 0, 1, 1, 1])


@pytest.mark.parametrize("top", [1, 10])
def test_right_labels_of_tight_classes_keep_their_quality(top):
    features, labels, true = blobs(N=240, C=6, wrong=0.02, seed=3)
    features = nn.functional.one_hot(true, 8).double() + 0.01 * features
    features[::40], labels[::40] = -features[::40], -1  # far away, and counted in all sums
    found = audit_labels(features, labels, sigma=0.03, top=top)
    wrong = (labels != true) & found.judged
    assert wrong.any()
    assert (found.quality[wrong] < 0.2).all()
    assert (found.quality[found.judged & ~wrong] > 0.6).all()


def test_otsu_threshold_explains_most_of_the_variance():
    values = torch.tensor([0.9, 0.1, 0.2, 0.85, 0.15, 0.8, 0.95])
    threshold = otsu_threshold(values)

    def within(cut: float) -> float:
        groups = [values[values < cut], values[values >= cut]]
        return sum(float(((group - group.mean()) ** 2).sum()) for group in groups if len(group))

    assert threshold == pytest.approx(0.8)
    assert within(threshold) == min(within(float(cut)) for cut in values)
    assert otsu_threshold(values[:1]) == float("-inf")


def test_image_alone_in_its_class_and_unlabelled_ones_are_not_judged():
    features, labels, _ = blobs(C=3)
    labels[5], labels[8] = 9, -1
    found = audit_labels(features, labels)
    assert found.classes == (0, 1, 2, 9)
    assert (~found.judged).nonzero().squeeze(1).tolist() == [5, 8]
    assert found.score[5] == 0
    assert found.quality[[5, 8]].isnan().all()
    assert set(found.ranking[-2:].tolist()) == {5, 8}
    assert found.suggested[8] == 8 % 3  # an unlabelled image has neighbours too
    for method in (*METHODS, 0.3):
        assert not found.suspects(method)[[5, 8]].any()


@pytest.mark.parametrize("labels", [torch.full((6,), -1), torch.arange(6), torch.zeros(6, dtype=torch.int64)])
def test_archive_without_labels_or_of_singles_or_of_one_class_has_no_suspects(labels):
    found = audit_labels(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), labels)
    for method in METHODS:
        assert not found.suspects(method).any()
        assert torch.equal(found.corrected(method), found.labels)
    assert found.noise_rate == 0
    assert len(found.ranking) == 6
    C = len(found.classes)
    torch.testing.assert_close(found.transition, torch.eye(C, dtype=torch.float64))


def test_confident_learning_equals_plain_loops():
    made = torch.Generator().manual_seed(1)
    features = torch.randn(90, 3, generator=made)
    labels = torch.cat([torch.zeros(60), torch.ones(20), torch.full((6,), 2), torch.full((4,), -1)]).long()
    labels[85] = 3  # alone
    found = audit_labels(features, labels, sigma=0.3, ridge=False, dtype=torch.float64)
    p = shares(features, labels, 0.3)
    judged = [i for i in range(90) if labels[i] >= 0 and i != 85]
    means = {c: np.mean([float(p[i, c]) for i in judged if labels[i] == c]) for c in range(3)}
    counts = np.zeros((4, 4))
    of_another_class = 0
    for i in judged:
        sure = [c for c in means if p[i, c] >= means[c]]
        if not sure:
            assert found.confident_classes[i] == -1
            continue
        guess = max(sure, key=lambda c: float(p[i, c]))
        if int(p[i].argmax()) == int(labels[i]) and guess != int(labels[i]):
            guess, of_another_class = int(labels[i]), of_another_class + 1
        assert found.confident_classes[i] == guess
        counts[labels[i], guess] += 1
    assert of_another_class > 0
    for c in means:
        counts[c, c] = max(counts[c, c], 1)
        counts[c] *= sum(int(labels[i] == c) for i in judged) / counts[c].sum()
    np.testing.assert_allclose(found.joint.numpy().T, counts / len(judged), atol=1e-12)
    assert found.noise_rate == pytest.approx(1 - counts.trace() / len(judged))
    lowest = [i for i in found.ranking.tolist() if i in judged and int(p[i].argmax()) != int(labels[i])]
    expected = sorted(lowest[: round(found.noise_rate * len(judged))])
    assert found.suspects("rate").nonzero().squeeze(1).tolist() == expected
    cut = otsu_threshold(found.quality[found.judged])
    assert found.suspects("otsu").nonzero().squeeze(1).tolist() == sorted(i for i in lowest if found.quality[i] < cut)
    assert len(expected) > 3


def test_score_equal_to_k_is_pruned():
    found = audit_labels(torch.eye(3).repeat_interleave(2, 0)[:5], [0, 1, 0, 0, 1], sigma=1.0)
    k = float(found.score[1])
    assert 0 < k < 1
    assert found.suspects(k)[1]


def test_equal_scores_of_a_class_are_confident_whatever_the_rounding():
    labels = torch.arange(3).repeat_interleave(4)
    for sigma in (0.05, 0.1, 0.35, 1.0, 2.95):
        found = audit_labels(torch.eye(3).repeat_interleave(4, 0), labels, sigma=sigma)
        assert torch.equal(found.confident_classes, labels)


def test_single_image_is_not_judged():
    found = audit_labels(torch.ones(1, 3), [4])
    assert not found.judged.any()
    assert found.top_shares.tolist() == [[0.0]]


def test_bad_method_names_the_choices():
    found = audit_labels(*blobs()[:2])
    with pytest.raises(ValueError, match="method: expected one of 'rate', 'otsu', 'auto'"):
        found.suspects("best")
    with pytest.raises(ValueError, match=re.escape("method: expected a number in (0, 1), got 2")):
        found.suspects(2)


def test_too_many_classes_for_a_matrix_are_refused(monkeypatch):
    monkeypatch.setattr(result, "MAX_DENSE_CLASSES", 3)
    found = audit_labels(*blobs()[:2])
    with pytest.raises(ValueError, match="joint: expected at most 3 classes, got 4; use confusions"):
        _ = found.transition
    assert found.noise_rate > 0


@pytest.mark.parametrize(("old", "new"), [("witnesses", "sample"), ("votes", "neighbour_labels")])
def test_old_names_still_work_with_a_warning_at_the_callers_line(old, new):
    found = audit_labels(*blobs()[:2])
    with pytest.warns(DeprecationWarning, match=f"LabelAudit.{old}: use {new}") as caught:
        assert getattr(found, old) is getattr(found, new)
    assert [warning.filename for warning in caught] == [__file__]
