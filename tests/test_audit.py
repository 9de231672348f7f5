"""The audit: shares and scores against b×N PyTorch, what is suspect, odd archives, and bad input.

Shapes: N images, D features, C classes.
"""

import dataclasses
import math
import re
import warnings
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntdne_kernels import MemoryBank, NTDNELoss, audit
from ntdne_kernels.audit import LabelAudit, audit_bank, audit_labels, feature_bank, nearest_neighbours


def blobs(N: int = 120, C: int = 4, *, wrong: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, 8) around C directions, labels (N,) of which a share is wrong, and the true ones (N,)."""
    made = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % C
    centres = nn.functional.normalize(torch.randn(C, 8, generator=made, dtype=torch.float64), dim=1)
    features = centres[true] + 0.15 * torch.randn(N, 8, generator=made, dtype=torch.float64)
    shift = torch.randint(1, max(C, 2), (N,), generator=made)
    flipped = torch.rand(N, generator=made) < wrong
    return features, torch.where(flipped, (true + shift) % C, true), true


def shares(features: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """(N, C) as the formula reads, C the classes that occur."""
    rows = nn.functional.normalize(features.double(), dim=1)
    logits = (rows @ rows.t() / sigma).fill_diagonal_(-torch.inf)
    p = torch.softmax(logits, dim=1)
    return torch.stack([p[:, labels == c].sum(dim=1) for c in labels.unique().tolist() if c >= 0], dim=1)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of queries, blocks of classes, chunks of the bank and reads also in a small archive."""
    chunks_of = audit.chunks_of
    monkeypatch.setattr(audit, "chunks_of", lambda bank, device, length: chunks_of(bank, device, min(length, 13)))
    monkeypatch.setattr(audit, "QUERIES", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(audit, "CLASSES", 3)
    monkeypatch.setattr(audit, "VALUES", 400)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("C", [1, 4, 60])
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_shares_and_scores_are_those_of_the_formula(backend, device, C, sigma, pieces, monkeypatch):
    if pieces:
        small_pieces(monkeypatch)
    features, labels, _ = blobs(C=C)
    labels[::7] = -1
    found = audit_labels(features, labels, sigma=sigma, top=5, device=device, dtype=torch.float64, backend=backend)
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
def test_other_dtypes_round_the_rows_alone(fused, device, dtype):
    features, labels, _ = blobs()
    found = audit_labels(features, labels, device=device, dtype=dtype, backend=fused)
    rows = feature_bank(features, labels, dtype=dtype).rows(torch.arange(len(features)))
    logits = (rows.double() @ rows.double().t() / 0.1).fill_diagonal_(-torch.inf)
    same = labels.unsqueeze(1) == labels
    expected = torch.softmax(logits, dim=1).mul(same).sum(dim=1)
    torch.testing.assert_close(found.score.double(), expected, rtol=1e-5, atol=1e-6)


def test_wrong_labels_rank_first_and_get_the_right_suggestion():
    features, labels, true = blobs(wrong=0.2)
    found = audit_labels(features, labels)
    wrong = labels != true
    assert wrong[found.ranking[: int(wrong.sum())]].all()
    assert torch.equal(found.suggested, true)
    assert torch.equal(found.suspects(), wrong)
    assert torch.equal(found.corrected(), true)
    assert abs(found.noise_rate - float(wrong.double().mean())) < 0.02


@pytest.mark.parametrize("method", [*audit.METHODS, 0.3])
def test_each_method_finds_the_wrong_labels_of_well_apart_classes(method):
    features, labels, true = blobs(N=400, wrong=0.15)
    suspects = audit_labels(features, labels).suspects(method)
    wrong = labels != true
    assert float((suspects & wrong).sum() / suspects.sum()) > 0.9
    assert float((suspects & wrong).sum() / wrong.sum()) > 0.9


def test_clean_archive_has_no_suspects():
    assert not audit_labels(*blobs(N=400, wrong=0)[:2]).suspects("rate").any()


def test_transition_is_that_of_the_noise():
    features, labels, true = blobs(N=4000, C=3, wrong=0.3)
    found = audit_labels(features, labels)
    counts = torch.zeros(3, 3, dtype=torch.float64).index_put_(
        (true, labels), torch.ones(4000).double(), accumulate=True
    )
    torch.testing.assert_close(found.transition, counts / counts.sum(dim=1, keepdim=True), rtol=0, atol=0.02)
    torch.testing.assert_close(found.joint, counts / 4000, rtol=0, atol=0.01)
    assert float(found.joint.sum()) == pytest.approx(1)


@pytest.mark.parametrize("top", [2, 9])
def test_quality_is_the_surprise_expected_against_that_of_the_label(top):
    features, labels, _ = blobs()
    labels[::9] = -1
    found = audit_labels(features, labels, dtype=torch.float64, top=top)
    p = shares(features, labels, 0.1)
    kept = p.topk(min(top, 4), dim=1).values
    rest = (1 - kept.sum(dim=1)).clamp(min=0)
    others = {2: 2, 9: 1}[top]
    entropy = -(kept * kept.log()).sum(dim=1) - rest * (rest / others).clamp(min=1e-300).log()
    j = found.judged
    own = p[j].gather(1, labels[j].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.quality[j].double(), entropy[j] / (entropy[j] - own.log()), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.quality[found.ranking][: int(j.sum())], found.quality[j].sort().values)


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
    threshold = audit.otsu_threshold(values)

    def within(cut: float) -> float:
        groups = [values[values < cut], values[values >= cut]]
        return sum(float(((group - group.mean()) ** 2).sum()) for group in groups if len(group))

    assert threshold == pytest.approx(0.8)
    assert within(threshold) == min(within(float(cut)) for cut in values)
    assert audit.otsu_threshold(values[:1]) == float("-inf")


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
    for method in (*audit.METHODS, 0.3):
        assert not found.suspects(method)[[5, 8]].any()


@pytest.mark.parametrize("labels", [torch.full((6,), -1), torch.arange(6), torch.zeros(6, dtype=torch.int64)])
def test_archive_without_labels_or_of_singles_or_of_one_class_has_no_suspects(labels):
    found = audit_labels(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), labels)
    for method in audit.METHODS:
        assert not found.suspects(method).any()
        assert torch.equal(found.corrected(method), found.labels)
    assert found.noise_rate == 0
    assert len(found.ranking) == 6
    C = len(found.classes)
    torch.testing.assert_close(found.transition, torch.eye(C, dtype=torch.float64))


def test_confident_learning_is_that_of_loops():
    made = torch.Generator().manual_seed(1)
    features = torch.randn(90, 3, generator=made)
    labels = torch.cat([torch.zeros(60), torch.ones(20), torch.full((6,), 2), torch.full((4,), -1)]).long()
    labels[85] = 3  # alone
    found = audit_labels(features, labels, sigma=0.3, dtype=torch.float64)
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
    cut = audit.otsu_threshold(found.quality[found.judged])
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_copies_are_found_and_those_with_other_labels_reported(dtype, monkeypatch):
    small_pieces(monkeypatch)
    features, labels, _ = blobs(wrong=0)
    features[77], features[50], features[101] = features[3], features[4], features[4]
    labels[77] = labels[3]
    labels[50], labels[101] = labels[4], (labels[4] + 1) % 4
    found = audit_labels(features, labels, dtype=dtype)
    expected = torch.full((120,), -1)
    expected[77], expected[50], expected[101] = 3, 4, 4
    assert torch.equal(found.duplicate_of, expected)
    assert found.conflicting.nonzero().squeeze(1).tolist() == [4, 50, 101]


def test_unlabelled_copy_conflicts_with_nothing():
    features, labels, _ = blobs(wrong=0)
    features[9], labels[9] = features[1], -1
    found = audit_labels(features, labels)
    assert int(found.duplicate_of[9]) == 1
    assert not found.conflicting.any()


def test_rows_whose_hashes_collide_are_no_copies(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.zeros(1, dtype=torch.int64))  # all factors 1
    features = torch.eye(8)[[0, 1, 2, 0]]
    assert audit_labels(features, [0, 1, 0, 1]).duplicate_of.tolist() == [-1, -1, -1, 0]


def test_copies_among_rows_that_differ_in_signs_alone_are_found():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    found = audit_labels(torch.cat([signs, signs]), torch.zeros(128, dtype=torch.int64), dtype=torch.float64)
    assert found.duplicate_of.tolist() == [-1] * 64 + list(range(64))


def test_zeros_of_either_sign_are_the_same():
    found = audit_labels(torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, -0.0]]), [0, 0, 1])
    assert found.duplicate_of.tolist() == [-1, -1, 0]


def test_image_of_a_class_that_is_not_there_has_the_lowest_density():
    features, labels, _ = blobs(wrong=0)
    features[60] = -features.sum(dim=0)
    assert int(audit_labels(features, labels).log_density.argmin()) == 60


def test_nearest_neighbours_are_those_of_all_pairs(device, monkeypatch):
    small_pieces(monkeypatch)
    features, labels, _ = blobs()
    bank = feature_bank(features, labels, device=device, dtype=torch.float64)
    images, similarity = nearest_neighbours(bank, torch.tensor([0, 77]), 6)
    rows = nn.functional.normalize(features, dim=1)
    expected = (rows @ rows.t()).fill_diagonal_(-torch.inf)[[0, 77]].topk(6, dim=1)
    assert torch.equal(images, expected.indices)
    torch.testing.assert_close(similarity.double(), expected.values, rtol=1e-6, atol=1e-6)
    assert nearest_neighbours(bank, torch.tensor([0]), 500)[0].shape == (1, 119)


def same(one: LabelAudit, other: LabelAudit) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(LabelAudit))
    )


@pytest.mark.parametrize("kind", ["float32", "float16", ">f4", "read-only", "strided", "frame", "tensor"])
def test_features_of_any_container_give_the_same(kind, tmp_path):
    features, labels, _ = blobs()
    array = features.numpy().astype("float16").astype("float32")
    expected = audit_labels(torch.from_numpy(array), labels)
    if kind == "frame":
        given = pytest.importorskip("pandas").DataFrame(array, index=range(500, 620))
    elif kind == "tensor":
        given = torch.from_numpy(array).requires_grad_()
    elif kind == "strided":
        given = np.repeat(array, 2, axis=1)[:, ::2]
    elif kind == "read-only":
        np.save(tmp_path / "features.npy", array)
        given = np.load(tmp_path / "features.npy", mmap_mode="r")
    else:
        given = array.astype(kind)
    assert same(audit_labels(given, labels), expected)


def test_bank_of_a_criterion_is_audited_as_it_stands(device):
    features, labels, _ = blobs()
    labels = labels * 10
    criterion = NTDNELoss(labels, dim=8, device=device, warmup_epochs=0)
    criterion.update_bank(features.to(device), torch.arange(len(features), device=device))
    criterion.memory.update_(features.to(device), torch.arange(len(features), device=device), momentum=0.0)
    assert same(audit_bank(criterion.memory), audit_labels(features, labels, device=device))
    criterion.refresh_indicator()
    torch.testing.assert_close(
        audit_bank(criterion.memory).log_score, criterion.memory.last_log_p.cpu(), rtol=1e-5, atol=1e-5
    )
    assert audit_bank(criterion.memory, classes=list("abcd")).classes == ("a", "b", "c", "d")


def test_scratch_folder_gives_the_same_and_keeps_nothing(tmp_path):
    features, labels, _ = blobs()
    assert same(audit_labels(features, labels, scratch=tmp_path), audit_labels(features, labels))
    assert not list(tmp_path.iterdir())


def test_archive_larger_than_memory_is_refused_with_the_way_out(tmp_path, monkeypatch):
    features, labels, _ = blobs()
    monkeypatch.setattr(audit, "free_memory", lambda: 1000.0)
    with pytest.raises(
        ValueError, match=r"120 × 8 float32 takes 0.0 GB, and 0.0 GB of memory are free; give a scratch"
    ):
        audit_labels(features, labels)
    audit_labels(features, labels, scratch=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_rows_that_are_not_finite_or_zero_are_all_named(value, tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    features, labels, _ = blobs()
    features[[3, 70, 119]] = value
    with pytest.raises(
        ValueError, match=r"^features: expected rows of a positive, finite norm, got others at 3 of 120: 3, 70, 119$"
    ):
        audit_labels(features, labels, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    features[:] = value
    with pytest.raises(ValueError, match=r"120 of 120: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        audit_labels(features, labels)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.ones(119, 8)}, ValueError, "labels: expected one for each of the 119 rows of features"),
        ({"features": torch.ones(120)}, ValueError, "of at least one value, got shape (120,)"),
        ({"features": torch.ones(0, 8)}, ValueError, "of at least one value, got shape (0, 8)"),
        ({"features": [[1.0]]}, ValueError, "of at least one value, got list"),
        ({"features": torch.ones(120, 8).int()}, TypeError, "features: expected float values, got torch.int32"),
        ({"features": np.array([["a"]] * 120)}, TypeError, "features: expected float values, got <U1"),
        ({"labels": torch.full((120,), -2)}, ValueError, "labels: expected -1 (unlabelled) or a class from 0, got -2"),
        ({"labels": np.zeros((120, 1), int)}, ValueError, "labels: expected one dimension, got shape (120, 1)"),
        ({"labels": np.full(120, 0.5)}, TypeError, "labels: expected integers of 64 bits or names, got numbers"),
        ({"labels": [True] * 120}, TypeError, "labels: expected integers or names, got bool"),
        ({"labels": [1, 2**70] * 60}, TypeError, "labels: expected integers"),
        ({"labels": np.array([np.inf] * 120)}, TypeError, "labels: expected integers of 64 bits or names, got"),
        ({"dtype": "float32"}, TypeError, "dtype: expected float64, float32, float16 or bfloat16, got 'float32'"),
        ({"labels": [1, "a"] * 60}, TypeError, "labels: expected integers or names, got int and str"),
        ({"sigma": 0}, ValueError, "sigma: expected a number in (0, inf), got 0"),
        ({"top": 0}, ValueError, "top: expected a number of classes from 1, got 0"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"scratch": "nowhere/at/all"}, OSError, "scratch: expected a folder, got nowhere/at/all"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changed, error, message):
    features, labels, _ = blobs()
    with pytest.raises(error, match=re.escape(message)):
        audit_labels(**{"features": features, "labels": labels} | changed)


def test_rows_too_short_for_the_dtype_are_named_before_they_are_normalised():
    features, labels, _ = blobs()
    features[110] *= 1e-40
    with pytest.raises(ValueError, match="got others at 1 of 120: 110$"):
        audit_labels(features, labels)
    audit_labels(features, labels, dtype=torch.float64)


def test_bank_with_rows_that_are_not_finite_is_refused():
    bank = feature_bank(*blobs()[:2])
    bank.storage[bank.position[77]] = torch.nan
    with pytest.raises(
        ValueError, match="^bank: expected rows of a positive, finite norm, got others at 1 of 120: 77$"
    ):
        audit_bank(bank)


def test_what_is_no_bank_is_refused_by_name():
    criterion = NTDNELoss(torch.tensor([0, 1]), dim=3)
    with pytest.raises(
        TypeError, match=r"^bank: expected a MemoryBank, got NTDNELoss; a criterion's is criterion.memory"
    ):
        audit_bank(criterion)


def test_default_device_of_the_caller_holds_nothing_of_an_audit():
    features, labels, _ = blobs()
    expected = audit_labels(features, labels)
    with torch.device("meta"):
        found = audit_labels(features, labels.tolist())
        assert same(found, expected)
        assert torch.equal(found.transition, expected.transition)


def test_bank_that_nothing_was_written_to_is_warned_of():
    bank = MemoryBank(torch.arange(10) % 3, 8)
    with pytest.warns(UserWarning, match="bank: its rows are still the random ones of its start"):
        audit_bank(bank)
    saved = bank.update_(torch.randn(10, 8), torch.arange(10)).state_dict()
    loaded = MemoryBank(torch.arange(10) % 3, 8)
    loaded.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit_bank(bank)
        audit_bank(loaded)


@pytest.mark.parametrize(
    ("images", "k", "error", "message"),
    [
        ([0.5], 3, TypeError, "images: expected integers, got 0.5"),
        (torch.tensor([12]), 3, IndexError, "images: expected"),
        (torch.tensor([1]), 0, ValueError, "k: expected 1 or more neighbours, got 0"),
    ],
)
def test_neighbours_that_cannot_be_meant_are_named(images, k, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbours(MemoryBank(torch.arange(10) % 3, 8), images, k)


def test_random_numbers_of_the_caller_stay_as_they_are():
    before = torch.get_rng_state()
    audit_labels(*blobs()[:2])
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_are_looked_at_before_the_features():
    class Unread:
        shape = (3, 2)

    with pytest.raises(ValueError, match="^sigma"):
        audit_labels(Unread(), [0, 1, 0], sigma=-1)


def test_bad_method_names_the_choices():
    found = audit_labels(*blobs()[:2])
    with pytest.raises(ValueError, match="method: expected one of 'rate', 'otsu', 'auto'"):
        found.suspects("best")
    with pytest.raises(ValueError, match=re.escape("method: expected a number in (0, 1), got 2")):
        found.suspects(2)


def test_too_many_classes_for_a_matrix_are_refused(monkeypatch):
    monkeypatch.setattr(audit, "MOST_DENSE_CLASSES", 3)
    found = audit_labels(*blobs()[:2])
    with pytest.raises(ValueError, match="joint: expected at most 3 classes, got 4; use confusions"):
        _ = found.transition
    assert found.noise_rate > 0


def test_names_that_are_not_one_per_class_are_refused():
    bank = MemoryBank(torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="classes: expected 2 names, got 1"):
        audit_bank(bank, classes=["a"])


# Whether the features can carry a rate


def flipped(true: Tensor, rate: float) -> Tensor:
    made = torch.Generator().manual_seed(1)
    C = int(true.max()) + 1
    wrong = torch.rand(len(true), generator=made) < rate
    return torch.where(wrong, (true + torch.randint(1, C, true.shape, generator=made)) % C, true)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_good_features_carry_the_rate_and_chance_does_not(rate):
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
    alike = audit_labels(pixels + 500, labels)
    assert alike.noise_rate > 0.8
    assert alike.doubt


def test_features_that_confuse_classes_in_places_do_not_carry_a_rate():
    """Of 40 places 10 hold one class each, and in the others six of ten images are of any class."""
    made = torch.Generator().manual_seed(3)
    place = torch.randint(40, (2000,), generator=made)
    other = (torch.rand(2000, generator=made) < 0.6) & (place >= 10)
    true = torch.where(other, torch.randint(5, (2000,), generator=made), place % 5)
    features = torch.eye(40)[place] + 0.05 * torch.randn(2000, 40, generator=made)
    found = audit_labels(features, true)
    assert found.noise_rate > 0.25  # of labels that are all right
    assert found.doubt == "neighbours contradict labels in some places only, as features that confuse classes make them"


def test_evidence_is_counted_as_it_reads():
    features, labels, _ = blobs(N=60, C=3)
    labels[::9] = -1
    found = audit_labels(features, labels, dtype=torch.float64)
    assert found.witnesses.tolist() == (labels >= 0).nonzero()[:, 0].tolist()
    agree = pairs = 0
    fours: dict[int, list[int]] = {0: [], 1: [], 2: []}
    images: dict[int, int] = {0: 0, 1: 0, 2: 0}
    for image, votes in zip(found.witnesses.tolist(), found.votes.tolist(), strict=True):
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
    error = math.sqrt(chance * (1 - chance) / len(found.witnesses))
    assert evidence.significance == pytest.approx((agree / pairs - chance) / error)
    rates = {own: 1 - sum(hits) / len(hits) for own, hits in fours.items()}
    expected = sum(images[own] * rate for own, rate in rates.items()) / sum(images.values())
    assert evidence.rate_at_best == pytest.approx(expected)
    unlike = {own: [] for own in images}
    for image, votes in zip(found.witnesses.tolist(), found.votes.tolist(), strict=True):
        unlike[int(found.suggested[image])] += [vote != int(found.suggested[image]) for vote in votes if vote >= 0]
    expected = sum(images[own] * sum(wrong) / len(wrong) for own, wrong in unlike.items()) / sum(images.values())
    assert evidence.rate == pytest.approx(expected)


def test_classes_too_small_to_ask_are_named():
    features, labels, _ = blobs(N=40, C=10, wrong=0)
    found = audit_labels(features, labels)
    assert found.votes.shape == (40, 0)
    assert math.isnan(found.evidence.agreement)
    assert found.doubt.startswith("most images have fewer than")
    assert audit_labels(features, torch.zeros(40, dtype=torch.int64)).doubt == ""


def test_a_sample_of_a_large_archive_is_asked(monkeypatch):
    features, labels, _ = blobs(N=600, C=3)
    whole = audit_labels(features, labels)
    monkeypatch.setattr(audit, "WITNESSES", 300)
    part = audit_labels(features, labels)
    assert (whole.votes.shape, part.votes.shape) == ((600, 10), (300, 10))
    assert part.evidence.rate_at_best == pytest.approx(whole.evidence.rate_at_best, abs=0.05)
    assert part.evidence.agreement == pytest.approx(whole.evidence.agreement, abs=0.1)
