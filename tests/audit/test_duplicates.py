"""Exact copies, and copies under another label."""

import pytest
import torch

from ntdne_kernels.audit import audit_labels
from tests.audit.archives import blobs, small_pieces


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_copies_are_found_and_conflict_under_other_labels(dtype, monkeypatch):
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


def test_a_copy_whose_label_was_put_right_conflicts_no_more():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    features[5] = features[1]
    known = torch.arange(20) % 2
    given, checked = known.clone(), torch.arange(20) == 5
    given[5] = 0
    assert audit_labels(features, given).conflicting.nonzero().squeeze(1).tolist() == [1, 5]
    assert not audit_labels(features, known, checked=checked, given=given).conflicting.any()
