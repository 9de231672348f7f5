"""What decisions on some labels say of the others: knowledge, ranking, suspects, the calibrated rate.

Shapes: N images, C classes.
"""

import math
import re

import pytest
import torch
from torch import Tensor

from ntdne_kernels.audit import LabelAudit, audit_bank, audit_labels, feature_bank
from ntdne_kernels.audit import calibration as model
from ntdne_kernels.audit.calibration import calibrate
from tests.audit.archives import blobs, same


def hard(N: int = 1500, C: int = 5, *, one_way: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Classes that overlap, a fifth of the labels wrong: those of class c called c + 1, or any other."""
    made = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % C
    features = torch.eye(C, 10)[true] + 0.45 * torch.randn(N, 10, generator=made)
    shift = torch.ones(N).long() if one_way else torch.randint(1, C, (N,), generator=made)
    wrong = torch.rand(N, generator=made) < 0.2
    return features, torch.where(wrong, (true + shift) % C, true), true


def decided(first: LabelAudit, true: Tensor, n: int) -> dict[str, Tensor]:
    """Labels, given labels and the mask after n decisions from the top of the ranking."""
    checked = torch.zeros(len(true), dtype=torch.bool)
    checked[first.ranking[:n]] = True
    return {"labels": torch.where(checked, true, first.labels), "given": first.labels, "checked": checked}


def test_no_decisions_change_nothing():
    features, labels, _ = blobs()
    nothing = torch.zeros(120, dtype=torch.bool)
    expected = audit_labels(features, labels)
    assert same(audit_labels(features, labels, checked=nothing, given=labels, unsure=nothing), expected)
    assert expected.uncalibrated == "0 labels are checked, and 100 are needed"
    assert expected.wrong_probability.isnan().all()
    assert torch.equal(expected.ranking, expected.log_ratio.argsort(stable=True))


def test_given_label_is_judged_among_labels_as_they_are_now_known():
    features, labels, true = blobs()
    labels[::9] = -1
    checked = torch.arange(120) % 3 == 0
    known = torch.where(checked & (labels >= 0), true, labels)
    found = audit_labels(features, known, sigma=0.1, checked=checked, given=labels, top=4, dtype=torch.float64)
    plain = audit_labels(features, known, sigma=0.1, top=4, dtype=torch.float64)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.decided, known)
    assert torch.equal(found.top_shares, plain.top_shares)  # an image's label has no part in its shares
    shares = torch.zeros(120, 4).double().scatter_(1, found.top_classes, found.top_shares)
    j = labels >= 0
    own = shares[j].gather(1, labels[j].unsqueeze(1)).squeeze(1)
    other = shares[j].scatter(1, labels[j].unsqueeze(1), 0).amax(dim=1)
    torch.testing.assert_close(found.quality[j].double(), own / (own + other), rtol=1e-4, atol=1e-6)
    changed = checked & (labels != known)
    assert torch.equal(found.wrong, changed)
    assert changed.any()
    assert not torch.equal(found.log_ratio[changed], plain.log_ratio[changed])


def test_checked_labels_come_last_and_are_no_suspects_whatever_the_method():
    features, labels, _ = blobs()
    unsure = torch.arange(120) % 10 == 1
    checked = torch.arange(120) % 4 == 0  # wrong ones among them that a person has kept
    found = audit_labels(features, labels, checked=checked, unsure=unsure)
    assert audit_labels(features, labels).suspects()[checked].any()
    for method in ("rate", "otsu", "auto", 0.5):
        assert found.suspects(method).any()
        assert not found.suspects(method)[checked].any()
    order = found.ranking
    state = torch.where(checked, 2, unsure.long())[order]
    assert torch.equal(state, state.sort().values)
    assert torch.equal(found.log_ratio[order[state == 0]], found.log_ratio[order[state == 0]].sort().values)
    assert torch.equal(found.corrected()[checked], labels[checked])


def test_decided_classes_may_be_new_and_given_ones_may_vanish():
    features, labels, _ = blobs(C=3)
    names = [["ash", "elm", "oak"][code] for code in labels]
    known = ["yew" if name == "elm" else name for name in names]
    known[0] = None  # excluded
    checked = torch.tensor([name == "elm" for name in names])
    checked[0] = True
    found = audit_labels(features, known, checked=checked, given=names)
    assert found.classes == ("ash", "elm", "oak", "yew")
    assert [found.classes[code] for code in found.labels] == names
    assert found.decided[0] == -1
    assert {found.classes[code] for code in found.decided[1:]} == {"ash", "oak", "yew"}
    assert not (found.top_classes == 1).any()
    assert found.uncalibrated
    for method in ("rate", "otsu", "auto", 0.5):
        assert not found.suspects(method)[checked].any()
    codes = {name: code for code, name in enumerate(found.classes)}
    bank = feature_bank(features, torch.tensor([-1 if name is None else codes[name] for name in known]))
    given = torch.tensor([codes[name] for name in names])
    assert same(audit_bank(bank, classes=found.classes, checked=checked, given=given), found)


@pytest.mark.parametrize("one_way", [True, False])
def test_decisions_find_more_wrong_labels_and_estimate_their_rate(one_way):
    features, labels, true = hard(one_way=one_way)
    wrong = labels != true
    first = audit_labels(features, labels)
    found = audit_labels(features, **decided(first, true, 200))
    assert found.uncalibrated == ""
    rest = found.ranking[:150]
    assert not found.checked[rest].any()
    gain = int(wrong[rest].sum()) - int(wrong[first.ranking[200:350]].sum())
    assert gain > (10 if one_way else -5)
    rate = float(wrong.double().mean())
    assert abs(found.noise_rate - rate) < 0.03
    assert abs(first.noise_rate - rate) > 0.06
    of_others = found.wrong_probability[~found.checked]
    expected = (float(of_others.sum()) + int(found.wrong.sum())) / len(true)
    assert found.noise_rate == pytest.approx(expected, abs=1e-4)
    assert torch.equal(found.wrong_probability[found.checked], wrong[found.checked].double())
    suspects = found.suspects()
    assert (of_others[suspects[~found.checked]] > 0.5).all()
    assert float(wrong[suspects].double().mean()) > 0.6
    torch.testing.assert_close(found.joint.sum(), torch.tensor(1.0).double())


def test_images_chosen_by_their_features_do_not_bias_the_rate():
    features, labels, true = hard()
    first = audit_labels(features, labels)
    rate = float((labels != true).double().mean())
    middle = first.ranking.clone()
    for order in (first.ranking, middle[torch.randperm(1500, generator=torch.Generator().manual_seed(0))]):
        checked = torch.zeros(1500, dtype=torch.bool).index_fill_(0, order[:300], True)
        found = audit_labels(features, torch.where(checked, true, labels), checked=checked, given=labels)
        assert abs(found.noise_rate - rate) < 0.03


def test_too_few_decisions_of_either_kind_are_counted():
    features, labels, true = hard()
    first = audit_labels(features, labels)

    def uncalibrated(images: Tensor) -> tuple[str, LabelAudit]:
        checked = torch.zeros(1500, dtype=torch.bool).index_fill_(0, images, True)
        found = audit_labels(features, torch.where(checked, true, labels), checked=checked, given=labels)
        return found.uncalibrated, found

    right, wrong = ((labels == true) == kind for kind in (True, False))
    said, found = uncalibrated(wrong.nonzero().squeeze(1)[:99])
    assert said == "99 labels are checked, and 100 are needed"
    assert found.wrong_probability.isnan().all()
    images = torch.cat([right.nonzero().squeeze(1)[:4], wrong.nonzero().squeeze(1)[:120]])
    said, found = uncalibrated(images)
    assert said == "4 of the checked labels are right, and 10 are needed"
    assert not found.wrong_probability[found.judged].isnan().any()  # ranked by it, but no rate is named
    assert uncalibrated(right.nonzero().squeeze(1)[:120])[0] == "0 of the checked labels are wrong, and 10 are needed"
    assert first.noise_rate > 0


def test_doubt_is_lifted_once_half_of_the_wrong_labels_were_found():
    """Features are 40 clusters: 10 hold one class each, in the others six of ten images are of any class."""
    made = torch.Generator().manual_seed(3)
    place = torch.randint(40, (2000,), generator=made)
    other = (torch.rand(2000, generator=made) < 0.6) & (place >= 10)
    true = torch.where(other, torch.randint(5, (2000,), generator=made), place % 5)
    features = torch.eye(40)[place] + 0.05 * torch.randn(2000, 40, generator=made)
    labels = torch.where(torch.rand(2000, generator=made) < 0.1, (true + 1) % 5, true)
    rate = float((labels != true).double().mean())
    first = audit_labels(features, labels)
    assert first.noise_rate > rate + 0.25
    assert first.doubt
    few, many = (audit_labels(features, **decided(first, true, n)) for n in (100, 500))
    assert abs(few.noise_rate - rate) < 0.03
    assert few.doubt  # the rate is right, but little of it was seen
    assert 2 * int(many.wrong.sum()) > many.noise_rate * 2000
    assert abs(many.noise_rate - rate) < 0.03
    assert many.doubt == ""


def test_posterior_equals_plain_expectation_maximisation(monkeypatch):
    monkeypatch.setattr(model, "WEIGHTS", (1.5,))
    monkeypatch.setattr(model, "CONCENTRATIONS", (4.0,))
    made = torch.Generator().manual_seed(0)
    N, C = 60, 3
    q = torch.softmax(2 * torch.randn(N, C, generator=made, dtype=torch.float64), dim=1)
    given, right = torch.randint(C, (2, N), generator=made)
    checked = torch.arange(N) < 20
    right[~checked] = given[~checked]
    right[3] = -1  # excluded
    T = torch.full((C, C), 0.05).double().fill_diagonal_(0.9)  # [true, given]
    posterior = torch.zeros(N, C).double()
    for step in range(2 * model.STEPS):
        counts = torch.zeros(C, C).double()
        for i in range(N):
            if checked[i] and right[i] < 0:
                continue
            if checked[i]:
                counts[right[i], given[i]] += 1
                continue
            posterior[i] = q[i] ** 1.5 * T[:, given[i]]
            posterior[i] /= posterior[i].sum()
            counts[:, given[i]] += posterior[i]
        last = T.clone()
        common = 1 - counts.trace() / counts.sum()
        for c in range(C):
            wrong = counts[c].sum() - counts[c, c]
            rate = (wrong + 20 * common) / (counts[c].sum() + 20)
            for g in range(C):
                T[c, g] = 1 - rate if c == g else rate * (counts[c, g] + 4 / 2) / (wrong + 4)
        assert step == 0 or not torch.equal(T, last)
    top = q.sort(dim=1, descending=True)
    own = q.gather(1, given.unsqueeze(1)).squeeze(1).log()
    found = calibrate(given, right, checked, top.indices, top.values.log(), own)
    for pair, images in enumerate(found.confusions.images.tolist()):
        g, c = int(found.confusions.given[pair]), int(found.confusions.true[pair])
        assert images == pytest.approx(float(counts[c, g]), rel=1e-9)
    final = q**1.5 * T[:, given].T
    expected = 1 - (final / final.sum(dim=1, keepdim=True)).gather(1, given.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.log_odds.sigmoid()[~checked], expected[~checked])
    assert found.log_odds[3].isnan()
    others = checked & (right >= 0)
    assert torch.equal(found.log_odds[others], torch.where(right != given, math.inf, -math.inf)[others].double())


@pytest.mark.parametrize(("one_way", "least", "most"), [(True, 1.0, 3.2), (False, 30.0, 1e4)])
def test_concentration_tells_noise_of_few_confusions_from_uniform_noise(one_way, least, most):
    features, labels, true = hard(3000, one_way=one_way)
    first = audit_labels(features, labels)
    found = audit_labels(features, **decided(first, true, 600))
    assert least <= found._calibration.concentration <= most


@pytest.mark.parametrize("top", [1, 2])
def test_few_kept_classes_leave_finite_odds(top):
    features, labels, true = hard()
    found = audit_labels(features, **decided(audit_labels(features, labels), true, 300), top=top)
    assert not found.wrong_probability[found.judged].isnan().any()
    assert 0.1 < found.noise_rate < 0.35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checked": torch.ones(119, dtype=torch.bool)}, "checked: expected bools (120,), got torch.bool (119,)"),
        ({"unsure": torch.ones(120)}, "unsure: expected bools (120,), got torch.float32 (120,)"),
        ({"given": torch.zeros(3).long()}, "given: expected as many as labels, 120, got 3"),
        ({"given": torch.zeros(120).long()}, "given: expected the labels of images that are not checked, got another"),
    ],
)
def test_wrong_arguments_of_decisions_are_named(arguments, message):
    features, labels, _ = blobs()
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_labels(features, labels, **arguments)
