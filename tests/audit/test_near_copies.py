"""Near copies: what is found, what is not, and how they are grouped."""

import math

import pytest
import torch
from torch import nn

from ntdne_kernels.audit import audit_labels, feature_bank, find_near_copies, group_copies, near_copies
from ntdne_kernels.audit.near_copies import NearCopies
from tests.audit.archives import blobs, small_pieces

ALONE = torch.full((7,), -1)


def crowded(N: int = 600, seed: int = 0) -> torch.Tensor:
    """Features (N, 24), half of them in a crowd that is more alike than near copies elsewhere are."""
    made = torch.Generator().manual_seed(seed)
    features = torch.randn(N, 24, generator=made)
    features[::2] = 6 + 0.3 * features[::2]
    return features


def copied(features: torch.Tensor, images: list[int], noise: float) -> torch.Tensor:
    made = torch.Generator().manual_seed(1)
    copies = features[images]
    return torch.cat([features, copies + noise * copies.std() * torch.randn(copies.shape, generator=made)])


def pairs_of(features: torch.Tensor, sigma: float | str = "auto") -> list[tuple[int, int]]:
    labels = torch.arange(len(features)) % 2
    found = audit_labels(features, labels, sigma=sigma)
    pairs = find_near_copies(feature_bank(features, labels), found.duplicate_of, found.log_density, found.sigma)
    return sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_archives_without_copies_have_none(seed):
    assert pairs_of(crowded(seed=seed)) == []


def test_copies_are_found_in_thin_places_though_others_crowd_nearer(monkeypatch):
    small_pieces(monkeypatch)
    monkeypatch.setattr("ntdne_kernels.audit.nearest.QUERY_BLOCK", 64)
    features = copied(crowded(), [1, 51, 301], noise=0.2)
    rows = nn.functional.normalize(features, dim=1)
    crowd = (rows[:600:2] @ rows[:600:2].t()).fill_diagonal_(0).max()
    assert all(rows[image] @ rows[600 + i] < crowd for i, image in enumerate([1, 51, 301]))
    assert pairs_of(features) == [(1, 600), (51, 601), (301, 602)]


def test_the_bound_of_the_sums_leaves_out_no_pair(monkeypatch):
    made = torch.Generator().manual_seed(3)
    features = torch.randn(1000, 24, generator=made)
    noise = torch.linspace(0.05, 0.6, 200).unsqueeze(1)  # from near copies to none
    features = torch.cat([features, features[:200] + noise * torch.randn(200, 24, generator=made)])
    found = pairs_of(features, sigma=0.01)  # the largest term is nearly the sum
    monkeypatch.setattr(near_copies, "SLACK", math.inf)  # all are looked at
    assert pairs_of(features, sigma=0.01) == found
    assert 50 < len(found) < 190


def test_copies_in_a_crowd_of_exact_copies_are_found():
    features = crowded()
    features = torch.cat([features, features[[1]].expand(15, -1), features[[1]] + 0.02])
    assert pairs_of(features) == [(1, 615)]
    labels = torch.arange(len(features)) % 2
    assert audit_labels(features, labels).copy_group[615] == -1  # exact copies alone, unless others are asked for
    found = audit_labels(features, labels, near_copies=True)
    assert (found.copy_group >= 0).nonzero().squeeze(1).tolist() == [1, *range(600, 616)]
    assert set(found.copy_group[600:].tolist()) == {1}


def test_both_images_of_a_pair_must_be_far_nearer_to_each_other():
    features = crowded()
    features[1::2] = features[:600:2].mean(dim=0)  # one dense place, and an image beside it that is alone
    features[1::2] += 1e-3 * torch.randn(300, 24, generator=torch.Generator().manual_seed(2))
    found = audit_labels(features, torch.arange(600) % 2)
    assert not (found.copy_group[::2] >= 0).any()


def test_half_an_archive_of_copies_is_found_as_well():
    features = copied(crowded(), list(range(1, 600, 2)), noise=0.05)
    assert len(set(pairs_of(features)) & {(1 + 2 * i, 600 + i) for i in range(300)}) > 270


def test_small_archives_have_no_near_copies():
    features, labels, _ = blobs(N=39)
    features[3] = features[7] + 1e-4
    assert (audit_labels(features, labels, near_copies=True).copy_group == -1).all()


def test_a_chain_is_cut_where_it_drifts():
    chain = NearCopies(torch.arange(6), torch.arange(1, 7), torch.ones(6))
    groups = group_copies(ALONE, chain)
    for first in groups.unique().tolist():
        assert (groups == first).sum() <= 3


def test_a_group_has_all_copies_of_its_middle_and_begins_with_its_first():
    star = NearCopies(torch.tensor([0, 2, 2, 2]), torch.tensor([2, 3, 5, 6]), torch.ones(4))
    assert group_copies(ALONE, star).tolist() == [0, -1, 0, 0, -1, 0, 0]


def test_exact_copies_are_in_the_group_of_their_first():
    duplicate_of = torch.tensor([-1, -1, 1, -1, 3, -1, -1])
    groups = group_copies(duplicate_of, NearCopies(torch.tensor([0]), torch.tensor([3]), torch.ones(1)))
    assert groups.tolist() == [0, 1, 1, 0, 0, -1, -1]
