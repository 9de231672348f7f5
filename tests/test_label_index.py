"""LabelIndex and class_order: classes, order and ranges; fingerprints of labels."""

import array
import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntdne_kernels import LabelIndex, label_index
from ntdne_kernels.label_index import class_order, fingerprint
from ntdne_kernels.ops.layout import class_ranges

ROOT = Path(__file__).parent.parent
DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]


def chunks_of(size: int):
    """Labels are looked at so many at a time."""
    return mock.patch.object(label_index, "CHUNK", size)


@st.composite
def some_labels(draw) -> Tensor:
    """A few labels of any integer dtype, close together or far apart."""
    dtype = draw(st.sampled_from(DTYPES))
    lowest = max(-1, torch.iinfo(dtype).min)
    highest = draw(st.sampled_from([0, 1, 6, 40, 128, 32768, 2**31, 2**62]))
    value = st.integers(lowest, min(highest, torch.iinfo(dtype).max))
    return torch.tensor(draw(st.lists(value, min_size=1, max_size=60)), dtype=dtype)


def by_sorting(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes, offsets, order and position from one stable sort of all labels."""
    ordered, order = torch.sort(labels.to(torch.int64), stable=True)
    classes, counts = torch.unique_consecutive(ordered[ordered >= 0], return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]) + (ordered < 0).sum()
    return classes, offsets, order, torch.argsort(order)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@settings(max_examples=200)
@given(some_labels(), st.integers(1, 70))
def test_the_order_is_that_of_a_stable_sort(labels, chunk):
    with chunks_of(chunk):
        index = LabelIndex.from_labels(labels)
    expected = by_sorting(labels)
    in_order = torch.equal(expected[2], torch.arange(len(labels)))
    assert_same(tuple(index.layout), expected[: 2 if in_order else 4])
    assert index.size == len(labels)


@settings(max_examples=200)
@given(some_labels(), st.integers(1, 70), st.integers(1, 9))
def test_parts_of_the_order_make_up_the_whole(labels, chunk, ranks):
    N = len(labels)
    cut = math.ceil(N / ranks)
    with chunks_of(chunk):
        parts = [class_order(labels, cut * r, max(min(cut, N - cut * r), 0)) for r in range(ranks)]
    classes, offsets, order, position = by_sorting(labels)
    for part in parts:
        assert_same(part[:2], (classes, offsets))
    if torch.equal(order, torch.arange(N)):
        assert all(part[2:] == (None, None) for part in parts)
    else:
        assert_same((torch.cat([p[2] for p in parts]), torch.cat([p[3] for p in parts])), (order, position))


def test_many_labels_of_the_usual_chunks(device):
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 300_000, (2 * label_index.CHUNK + 17,), generator=source)
    index = LabelIndex.from_labels(labels.to(device))
    assert all(part.device.type == device.type for part in index.layout)
    assert_same(tuple(part.cpu() for part in index.layout), by_sorting(labels))


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


def test_labels_that_descend_only_between_two_chunks_have_an_order():
    with chunks_of(2):
        assert LabelIndex.from_labels(torch.tensor([0, 2, 1, 3])).order.tolist() == [0, 2, 1, 3]


def test_rows_of_a_class_keep_their_order():
    assert LabelIndex.from_labels(torch.tensor([1, 0, 1, 0, 1])).order.tolist() == [1, 3, 0, 2, 4]


def test_labels_may_be_a_memory_map(tmp_path):
    file = tmp_path / "labels"
    file.write_bytes(bytes([2, 0, 255, 2, 1]))
    labels = torch.from_file(str(file), size=5, dtype=torch.uint8)
    with chunks_of(2):
        index = LabelIndex.from_labels(labels)
    assert index.classes.tolist() == [0, 1, 2, 255]
    assert index.order.tolist() == [1, 4, 0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (3, TypeError, "labels: expected integers or names, got int"),
        (["oak", "ash"], TypeError, "labels: expected integers, got names such as 'oak'; .*encode_labels"),
        (torch.tensor([1.0]), TypeError, "labels: expected an integer tensor, got torch.float32"),
        (torch.tensor([True]), TypeError, "labels: expected an integer tensor, got torch.bool"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"labels: expected one dimension, got shape \(2, 2\)"),
        (torch.tensor(3), ValueError, r"labels: expected one dimension, got shape \(\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "labels: expected at least one"),
        (torch.tensor([0, -2]), ValueError, r"labels: expected -1 \(unlabelled\) or a class from 0, got -2 at row 1"),
    ],
)
def test_bad_labels_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        LabelIndex.from_labels(labels)
    if message != "labels: expected at least one":
        with pytest.raises(error, match=message):
            class_order(labels, 0, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_first_label_below_minus_one_is_named_in_whatever_chunk(dtype):
    labels = torch.tensor([0, 5, -1, 3, -4, -7, 2], dtype=dtype)
    for chunk in range(1, 9):
        with chunks_of(chunk), pytest.raises(ValueError, match=r"got -4 at row 4$"):
            LabelIndex.from_labels(labels)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 4), (2, 2), (3, 1), (1, -1)])
def test_a_part_that_is_not_inside_the_labels_is_named(first, count):
    with pytest.raises(ValueError, match=f"first, count: expected a part of 3 rows, got {count} rows from {first}"):
        class_order(torch.tensor([1, 0, 1]), first, count)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("part", [[], ["--rank", "1", "--ranks", "4"]])
def test_memory_does_not_grow_with_the_labels(part):
    # One sort of the 10^7 labels needs 229 MiB beyond its results.
    command = [sys.executable, "-m", "benchmarks.class_order", "10000000", "45", "int32", *part]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert int(re.search(r"(\d+) MiB", done.stdout)[1]) < 128


@given(some_labels(), st.integers(1, 70))
def test_a_fingerprint_is_the_hash_of_the_values(labels, chunk):
    with chunks_of(chunk):
        found = fingerprint(labels)
    assert found == hashlib.sha256(array.array("q", labels.tolist()).tobytes()).hexdigest()
    wide = labels.to(torch.int64)
    assert fingerprint(wide) == found
    assert fingerprint(torch.stack([wide, -wide], dim=1)[:, 0]) == found


def test_other_labels_have_another_fingerprint(device):
    labels = torch.tensor([3, -1, 0, 0], device=device)
    others = [labels[:-1], labels.flip(0), labels + 1, labels[:0]]
    assert len({fingerprint(each) for each in [labels, *others]}) == 5
    assert fingerprint(labels) == fingerprint(labels.cpu().to(torch.int8))


def test_what_has_no_fingerprint_is_named():
    with pytest.raises(TypeError, match="labels: expected an integer tensor, got torch.float32"):
        fingerprint(torch.tensor([1.0]))
