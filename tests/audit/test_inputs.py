"""What an audit takes, and what it refuses by name."""

import re
import warnings

import numpy as np
import pytest
import torch

from ntdne_kernels import MemoryBank, NTDNELoss
from ntdne_kernels.audit import audit_bank, audit_labels, cut_class, feature_bank, inputs, nearest_neighbours
from tests.audit.archives import blobs, same, small_pieces


@pytest.mark.parametrize("kind", ["float32", "float16", ">f4", "read-only", "strided", "frame", "tensor"])
def test_features_of_any_container_give_the_same_audit(kind, tmp_path):
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


def test_scratch_folder_gives_the_same_audit_and_keeps_nothing(tmp_path):
    features, labels, _ = blobs()
    assert same(audit_labels(features, labels, scratch=tmp_path), audit_labels(features, labels))
    assert not list(tmp_path.iterdir())


def test_archive_larger_than_memory_is_refused_and_scratch_named(tmp_path, monkeypatch):
    features, labels, _ = blobs()
    monkeypatch.setattr(inputs, "free_memory", lambda: 1000.0)
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
        ({"sigma": "best"}, ValueError, "sigma: expected one of 'auto', got 'best'"),
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


def test_other_arguments_are_checked_before_features_are_read():
    class Unread:
        shape = (3, 2)

    with pytest.raises(ValueError, match="^sigma"):
        audit_labels(Unread(), [0, 1, 0], sigma=-1)


def test_default_device_of_the_caller_is_not_used():
    features, labels, _ = blobs()
    expected = audit_labels(features, labels)
    with torch.device("meta"):
        found = audit_labels(features, labels.tolist())
        assert same(found, expected)
        assert torch.equal(found.transition, expected.transition)


def test_random_numbers_of_the_caller_stay_as_they_are():
    before = torch.get_rng_state()
    audit_labels(*blobs()[:2])
    assert torch.equal(torch.get_rng_state(), before)


def test_bank_of_a_criterion_is_audited_as_it_stands(device):
    features, labels, _ = blobs()
    labels = labels * 10
    criterion = NTDNELoss(labels, dim=8, device=device, warmup_epochs=0)
    criterion.update_bank(features.to(device), torch.arange(len(features), device=device))
    criterion.memory.update_(features.to(device), torch.arange(len(features), device=device), momentum=0.0)
    assert same(audit_bank(criterion.memory), audit_labels(features, labels, device=device))
    criterion.refresh_indicator()
    torch.testing.assert_close(
        audit_bank(criterion.memory, sigma=criterion.sigma).log_score,
        criterion.memory.last_log_p.cpu(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert audit_bank(criterion.memory, classes=list("abcd")).classes == ("a", "b", "c", "d")


def test_bank_with_rows_that_are_not_finite_is_refused():
    bank = feature_bank(*blobs()[:2])
    bank.storage[bank.position[77]] = torch.nan
    with pytest.raises(
        RuntimeError, match="^memory: the row of image 77 has length nan instead of 1: something outside"
    ):
        audit_bank(bank)


def test_rows_that_were_written_without_a_trace_are_looked_at():
    bank = feature_bank(*blobs()[:2])
    bank.storage.numpy()[3] = 0
    with pytest.raises(RuntimeError, match="has length 0 instead of 1"):
        audit_bank(bank)


def test_criterion_in_place_of_its_bank_is_refused():
    criterion = NTDNELoss(torch.tensor([0, 1]), dim=3)
    with pytest.raises(
        TypeError, match=r"^bank: expected a MemoryBank, got NTDNELoss; a criterion's is criterion.memory"
    ):
        audit_bank(criterion)


def test_bank_with_random_rows_is_warned_of():
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


def test_names_must_be_one_per_class():
    bank = MemoryBank(torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="classes: expected 2 names, got 1"):
        audit_bank(bank, classes=["a"])


@pytest.mark.parametrize(
    ("sparse", "found"),
    [(torch.Tensor.to_sparse, "torch.sparse_coo"), (torch.Tensor.to_sparse_csr, "torch.sparse_csr")],
)
def test_sparse_features_are_refused(sparse, found):
    features, labels, _ = blobs()
    with pytest.raises(TypeError, match=f"^features: expected a dense tensor or array, got {found}$"):
        audit_labels(sparse(features), labels)


def test_sparse_matrices_of_scipy_are_refused():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    features, labels, _ = blobs()
    with pytest.raises(TypeError, match="^features: expected a dense tensor or array, got csr_matrix$"):
        audit_labels(scipy_sparse.csr_matrix(features.numpy()), labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_audit_does_not_depend_on_the_default_dtype(dtype):
    features, labels, _ = blobs()
    expected = audit_labels(features, labels, near_copies=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = audit_labels(features, labels, near_copies=True)
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)


def test_an_audit_does_not_depend_on_the_default_device():
    features, labels, _ = blobs()
    checked = torch.arange(len(labels)) % 4 == 0
    expected = audit_labels(features, labels, near_copies=True, checked=checked, given=labels)
    with torch.device("meta"):
        found = audit_labels(features, labels, near_copies=True, checked=checked, given=labels)
        assert found.suspects().sum() == expected.suspects().sum()
    assert same(found, expected)


def test_neighbours_among_others_are_as_many_as_there_are(device):
    bank = feature_bank(*blobs()[:2], device=device)
    found, _ = nearest_neighbours(bank, [0], 3, among=[1, 2, 3])
    assert sorted(found[0].tolist()) == [1, 2, 3]
    assert nearest_neighbours(bank, [0], 3, among=[5])[0].tolist() == [[5]]
    assert nearest_neighbours(bank, [0, 1], 3, among=[1, 2, 3])[0].size(1) == 2
    assert sorted(nearest_neighbours(bank, [0], 3, among=[2, 2, 3, 3])[0][0].tolist()) == [2, 3]
    assert nearest_neighbours(bank, [1], 3, among=[1])[0].size(1) == 0
    with pytest.raises(IndexError, match="^among: expected images from 0 to 119, got -1$"):
        nearest_neighbours(bank, [0], 3, among=[-1, 2])


def test_a_class_of_one_row_is_not_cut():
    with pytest.raises(ValueError, match="^rows: expected 2 or more, got 1$"):
        cut_class(torch.ones(1, 4))
