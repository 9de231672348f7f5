"""Labels and indices as people have them, the same way wherever the package takes them."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntdne_kernels
from ntdne_kernels import LabelIndex, MemoryBank, NTDNELoss, SNCALoss, encode_labels, functional
from ntdne_kernels.audit import audit_labels
from ntdne_kernels.labels import as_index, as_labels

pd = pytest.importorskip("pandas")

CODES = [2, -1, 0, 2, 1, 0]
# As numpy.savetxt writes them in its default format and in shorter ones.
SAVED = ["2.000000000000000000e+00", "-1.0e+00", "0", " 2 ", "1.0", "0.0e0"]
WITHOUT_MISSING = {
    "list": CODES,
    "tuple": tuple(CODES),
    "int8": np.array(CODES, np.int8),
    "int16, big end first": np.array(CODES, ">i2"),
    "int32, backwards": np.array(CODES[::-1], np.int32)[::-1],
    "int64": np.array(CODES),
    "float64": np.array(CODES, float),
    "list of NumPy's": list(np.array(CODES, np.int16)),
    "list of tensors": list(torch.tensor(CODES)),
    "Series": pd.Series(CODES, index=range(50, 56)),
    "Series of int8": pd.Series(CODES, dtype="int8"),
    "Series of Int64": pd.Series(CODES, dtype="Int64"),
    "Categorical": pd.Categorical(CODES),
    "codes": pd.Series(["c", None, "a", "c", "b", "a"], dtype="category").cat.codes,
    "Index": pd.Index(CODES),
    "text": [str(code) for code in CODES],
    "text with blanks": [f" {code}\t" for code in CODES],
    "text of savetxt": SAVED,
    "array of text": np.array(SAVED),
    "array of bytes": np.array(SAVED, "S"),
    "Series of text": pd.Series(SAVED),
}
WITH_MISSING = {
    "None": [2, None, 0, 2, 1, 0],
    "NaN": np.array([2, np.nan, 0, 2, 1, 0], np.float32),
    "NA": pd.Series([2, None, 0, 2, 1, 0], dtype="Int64"),
    "blank text": ["2", "  ", "0", "2", "1", "0"],
}
KINDS = WITHOUT_MISSING | WITH_MISSING


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_container_are_the_integers_they_are(kind):
    labels = KINDS[kind]
    assert as_labels(labels).tolist() == CODES
    expected = torch.tensor(CODES)
    for loss in (NTDNELoss, SNCALoss):
        assert torch.equal(loss(labels, dim=4).memory.labels, expected)
    bank = MemoryBank(torch.zeros(6, dtype=torch.int64), 4)
    bank.relabel(labels)
    assert torch.equal(bank.labels, expected)
    found, index = LabelIndex.from_labels(labels), LabelIndex.from_labels(expected)
    assert all(torch.equal(a, b) for a, b in zip(found.layout, index.layout, strict=True))
    assert encode_labels(labels)[0].tolist() == CODES
    assert encode_labels(labels)[1] == (0, 1, 2)
    assert audit_labels(torch.randn(6, 4), labels).labels.tolist() == CODES


@pytest.mark.parametrize("kind", KINDS)
def test_functions_take_what_the_modules_take(kind):
    labels, rows = KINDS[kind], nn.functional.normalize(torch.randn(6, 4), dim=1)
    whole, index = torch.tensor(CODES), torch.arange(6)
    series = pd.Series(index.numpy(), index=range(9, 15))
    for index_of_a_kind in (index.tolist(), index.numpy(), series, index.to(torch.uint8)):
        for call in (functional.ntdne_loss, functional.snca_loss, functional.leave_one_out_log_scores):
            expected = call(rows, rows, whole, whole, index)
            assert torch.equal(call(rows, rows, labels, labels, index_of_a_kind), expected)
        bank, expected_bank = rows.flip(0).contiguous(), rows.flip(0).contiguous()
        functional.update_bank_(bank, rows, index_of_a_kind)
        assert torch.equal(bank, functional.update_bank_(expected_bank, rows, index))


@pytest.mark.parametrize("kind", ["list", "int16", "int64", "Series"])
def test_batches_of_any_container(kind):
    criterion, expected = (NTDNELoss(CODES, dim=4, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    features, index = torch.randn(3, 4), torch.tensor([4, 0, -1])
    given: Any = index.tolist() if kind == "list" else index.numpy()
    if kind != "list":
        given = pd.Series(given, index=[7, 8, 9]) if kind == "Series" else given.astype(kind)
    labels = [-1, -1, 2]
    assert torch.equal(
        criterion(features, given, labels=labels), expected(features, index, labels=torch.tensor(labels))
    )
    criterion.update_bank(features, given)
    expected.update_bank(features, index)
    assert torch.equal(criterion.memory.storage, expected.memory.storage)
    assert torch.equal(criterion.memory.rows(given[:2]), expected.memory.rows(index[:2]))


def test_labels_follow_the_features_to_their_device(device):
    criterion = NTDNELoss(CODES, dim=4, device=device)
    features = torch.randn(3, 4, device=device)
    loss = criterion(features, [0, 2, -1], labels=np.array([-1, -1, 1]))
    assert loss.device == features.device
    criterion.update_bank(features, [0, 2, 3])


@pytest.mark.parametrize(
    ("given", "codes", "classes"),
    [
        (torch.tensor([3, -1, 3, 7], dtype=torch.int16), [0, -1, 0, 1], (3, 7)),
        (np.array([3, 255, 3, 7], dtype=np.uint8), [0, 2, 0, 1], (3, 7, 255)),
        ([3, None, 3, 7], [0, -1, 0, 1], (3, 7)),
        (np.array([3.0, np.nan, 3.0, 7.0]), [0, -1, 0, 1], (3, 7)),
        (["oak", None, "ash", float("nan"), ""], [1, -1, 0, -1, -1], ("ash", "oak")),
        (["oak", " oak", "oak\n", "  "], [0, 0, 0, -1], ("oak",)),
        (np.array(["10", "9", "10", "b"]), [0, 1, 0, 2], ("10", "9", "b")),
        (["10", "9", "10", "-1"], [1, 0, 1, -1], (9, 10)),
        (["007", "7"], [0, 1], ("007", "7")),
        (["1.5", "2"], [0, 1], ("1.5", "2")),
        (["1.5e+01", "2e0"], [1, 0], (2, 15)),
        (["9223372036854775807", "1"], [1, 0], (1, 2**63 - 1)),
        (["9223372036854775808", "1"], [1, 0], ("1", "9223372036854775808")),
        (["1_0", "٣"], [0, 1], ("1_0", "٣")),
        (np.array([b"na\xefve", b"oak"]), [0, 1], ("na\udcefve", "oak")),
        (pd.Series(["oak", None, "ash"], dtype="category"), [1, -1, 0], ("ash", "oak")),
        ([], [], ()),
        ([None, None], [-1, -1], ()),
    ],
)
def test_encode_labels_numbers_integers_or_names(given, codes, classes):
    found, names = encode_labels(given)
    assert (found.tolist(), found.dtype, names) == (codes, torch.int64, classes)


def test_names_in_two_forms_of_unicode_are_one_class():
    nfc, nfd = "For\u00eat", "Fore\u0302t"
    assert encode_labels([nfd, "lac", nfc, None])[1] == (nfc, "lac")
    assert encode_labels([nfd, "lac", nfc, None])[0].tolist() == [0, 1, 0, -1]
    assert encode_labels([nfd, "lac"])[1] == (nfd, "lac")  # of one form names stay as they are


@pytest.mark.parametrize("take", [NTDNELoss, MemoryBank, lambda labels, dim: LabelIndex.from_labels(labels)])
def test_names_are_refused_with_the_line_that_numbers_them(take):
    labels = ["oak", "ash", None, "oak"]
    with pytest.raises(TypeError, match="^labels: expected integers, got names such as 'oak'; this line") as raised:
        take(labels, 4)
    scope: dict[str, Any] = {"ntdne_kernels": ntdne_kernels, "labels": labels}
    exec(str(raised.value).split(": ")[-1], scope)  # the line, as a user would copy it
    assert scope["labels"].tolist() == [1, 0, -1, 1]
    assert scope["classes"] == ("ash", "oak")
    take(scope["labels"], 4)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0.5, 1], TypeError, "labels: expected integers of 64 bits or names, got numbers such as 0.5"),
        (np.array([0, np.inf]), TypeError, "labels: expected integers of 64 bits or names, got numbers such as inf"),
        ([1, 2**63], TypeError, "of 64 bits or names, got numbers such as 9223372036854775808"),
        (np.array([2**64 - 1], np.uint64), TypeError, "got numbers such as 18446744073709551615"),
        ([True, False], TypeError, "labels: expected integers or names, got bool"),
        (np.array([True]), TypeError, "labels: expected integers or names, got bool"),
        ([1, "oak"], TypeError, "labels: expected integers or names, got int and str"),
        (pd.Series(pd.to_datetime(["2026-01-01"])), TypeError, "labels: expected integers or names, got datetime64"),
        ("oak", TypeError, "labels: expected integers or names, got str"),
        ({"oak": 1}, TypeError, "labels: expected integers or names, got dict"),
        ({1, 2}, TypeError, "labels: expected integers or names, got set"),
        (None, TypeError, "labels: expected integers or names, got NoneType"),
        ([[0], [1]], ValueError, "labels: expected one dimension, got list of list"),
        ([torch.tensor([0])], ValueError, "labels: expected one dimension, got list of Tensor"),
        (np.zeros((2, 1), int), ValueError, "labels: expected one dimension, got shape (2, 1)"),
        (pd.DataFrame({"label": [1]}), ValueError, "labels: expected one dimension, got shape (1, 1)"),
        ([0, -2], ValueError, "labels: expected -1 (unlabelled) or a class from 0, got -2 at row 1"),
    ],
)  # fmt: skip
def test_bad_labels_are_named(labels, error, message):
    for take in (NTDNELoss, encode_labels):
        with pytest.raises(error, match=re.escape(message)):
            take(labels)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([True], TypeError, "index: expected integers, got True"),
        (np.array([1.0]), TypeError, "index: expected integers, got float64"),
        (["1"], TypeError, "index: expected integers, got '1'"),
        (3, TypeError, "index: expected integers, got int"),
        (torch.tensor([1.0]), TypeError, "index: expected an integer tensor, got torch.float32"),
        (np.array([[1]]), ValueError, "index: expected one dimension, got shape (1, 1)"),
    ],
)
def test_a_bad_index_is_named(index, error, message):
    with pytest.raises(error, match=re.escape(message)):
        as_index(index)


def test_an_empty_index_is_allowed():
    assert torch.equal(as_index([]), torch.empty(0, dtype=torch.int64))


def test_labels_share_no_memory_with_what_they_were_made_of():
    array = np.array(CODES)
    labels = as_labels(array)
    labels += 1
    assert array.tolist() == CODES


def test_a_tensor_keeps_its_device_and_dtype(device):
    labels: Tensor = torch.tensor(CODES, dtype=torch.int8, device=device)
    assert as_labels(labels) is labels


def test_codes_of_names_are_the_same_in_training_and_audit():
    names = [[" oak ", " ash ", " elm "][image % 3] for image in range(30)]
    codes, classes = encode_labels(names)
    audit = audit_labels(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), names)
    assert audit.classes == classes == ("ash", "elm", "oak")
    assert torch.equal(audit.labels, codes)
    assert torch.equal(NTDNELoss(codes, dim=5).memory.labels, codes)


MASKED = np.ma.array([2, 0, 1, 2], mask=[False, True, False, False])


def test_masked_labels_are_unlabelled():
    assert as_labels(MASKED).tolist() == [2, -1, 1, 2]
    assert as_labels(MASKED[2:]).tolist() == [1, 2]
    assert encode_labels(np.ma.array(["oak", "ash"], mask=[True, False]))[0].tolist() == [-1, 0]
    assert encode_labels([1, np.ma.masked, 2])[0].tolist() == [0, -1, 1]


def test_masked_indices_and_features_are_refused():
    with pytest.raises(TypeError, match="index: expected integers, got None"):
        as_index(MASKED)
    with pytest.raises(TypeError, match="features: expected an array of values, got a masked one"):
        audit_labels(np.ma.masked_less(np.eye(4), 0.5), [0, 0, 1, 1])
