"""LabelIndex: classes, order and ranges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntdne_kernels import LabelIndex
from ntdne_kernels.ops.leave_one_out import class_ranges


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40))
def test_every_class_is_one_range_of_the_order(values):
    labels = torch.tensor(values)
    index = LabelIndex.from_labels(labels)
    order = torch.arange(len(labels)) if index.order is None else index.order
    assert sorted(order.tolist()) == list(range(len(values)))
    assert index.classes.tolist() == sorted(set(values) - {-1})
    assert index.offsets[0] == values.count(-1)
    for label, (begin, end) in zip(
        range(-1, 9), class_ranges(torch.arange(-1, 9), index.classes, index.offsets).tolist(), strict=True
    ):
        rows = set(order[begin:end].tolist())
        assert rows == ({j for j, value in enumerate(values) if value == label} if label >= 0 else set())
    if index.position is not None:
        assert torch.equal(order[index.position], torch.arange(len(values)))
        assert torch.equal(index.position[order], torch.arange(len(values)))


def test_sorted_labels_need_no_order():
    index = LabelIndex.from_labels(torch.tensor([-1, 0, 0, 2]))
    assert index.order is None
    assert index.position is None


def test_rows_of_a_class_keep_their_order():
    assert LabelIndex.from_labels(torch.tensor([1, 0, 1, 0, 1])).order.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, 2], TypeError, "labels: expected an integer tensor, got list"),
        (torch.tensor([1.0]), TypeError, "labels: expected an integer tensor, got torch.float32"),
        (torch.tensor([True]), TypeError, "labels: expected an integer tensor, got torch.bool"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"labels: expected one dimension, got shape \(2, 2\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "labels: expected at least one"),
        (torch.tensor([0, -2]), ValueError, r"labels: expected -1 \(unlabelled\) or a class from 0, got -2 at row 1"),
    ],
)
def test_bad_labels_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        LabelIndex.from_labels(labels)
