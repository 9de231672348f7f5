"""Splits: the authors' own, seeded ones, and what cannot be split."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntdne_kernels.experiments.splits import split


@pytest.mark.parametrize("sizes", [[3, 4, 5], [10, 700, 33], [220, 420, 290, 360]])
def test_the_authors_split_is_the_one_of_their_code(sizes):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    train, validation, test = [], [], []
    position = 0
    for size in sizes:
        files = list(range(position, position + size))
        position += size
        random.seed(42)
        random.shuffle(files)
        train += files[: int(0.7 * len(files))]
        validation += files[int(0.7 * len(files)) : int(0.8 * len(files))]
        test += files[int(0.8 * len(files)) :]
    found = split(labels, "authors", 0)
    assert found.train.tolist() == train
    assert found.validation.tolist() == validation
    assert found.test.tolist() == test
    assert all(torch.equal(a, b) for a, b in zip(found, split(labels, "authors", 1), strict=True))


def test_nwpu_resisc45_has_the_22005_training_images_of_the_authors():
    parts = split(torch.arange(45).repeat_interleave(700), "authors", 0)  # int(0.7 * 700) is 489
    assert [len(part) for part in parts] == [22_005, 45 * 71, 45 * 140]


@given(st.lists(st.integers(3, 60), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans(), st.randoms())
def test_a_seeded_split_shares_out_every_class(sizes, seed, mixed, order):
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    if mixed:
        order.shuffle(labels)
    labels = torch.tensor(labels)
    parts = split(labels, "seeded", seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == torch.int64
        assert labels[part].tolist() == sorted(labels[part].tolist())  # type: ignore[attr-defined]
    for c, size in enumerate(sizes):
        train, validation, test = (int((labels[part] == c).sum()) for part in parts)  # type: ignore[attr-defined]
        assert train >= 2
        assert test >= 1
        for found, share in ((train, 0.7), (validation, 0.1), (test, 0.2)):
            assert abs(found - share * size) < 1 + 1e-9
    assert all(torch.equal(a, b) for a, b in zip(parts, split(labels, "seeded", seed), strict=True))


def test_seeds_give_different_splits():
    labels = torch.arange(3).repeat_interleave(40)
    first, second = (split(labels, "seeded", seed).train for seed in (0, 1))
    assert set(first.tolist()) != set(second.tolist())
    within = [set((first[labels[first] == c] - 40 * c).tolist()) for c in range(3)]
    assert within[0] != within[1] != within[2]


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="how: expected 'seeded' or 'authors', got 'random'"):
        split(torch.zeros(5, dtype=torch.int64), "random", 0)
    with pytest.raises(ValueError, match="labels: expected at least 3 images in each class, got 2 in class 1"):
        split(torch.tensor([0, 0, 0, 1, 1]), "seeded", 0)
