"""MemoryBank: rows by image whatever their storage order, checkpoints that load whole or not."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

from ntdne_kernels import MemoryBank, NTDNELoss
from ntdne_kernels.ops import bank_update
from tests import formulas

LABELS = torch.tensor([2, 0, -1, 1, 0, 2, 2, 1, 0, -1])


def bank_of(labels: torch.Tensor = LABELS, dim: int = 6, seed: int = 0, **options) -> MemoryBank:
    return MemoryBank(labels, dim, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_start_as_random_unit_vectors_that_follow_the_generator(dtype):
    images = torch.arange(10)
    rows = bank_of(dtype=dtype).rows(images)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(10), rtol=0, atol=0.01)
    assert torch.equal(rows, bank_of(dtype=dtype).rows(images))
    assert not torch.equal(rows, bank_of(dtype=dtype, seed=1).rows(images))
    assert (rows.float() @ rows.float().t() - torch.eye(10)).abs().max() < 0.99


def test_update_and_rows_speak_of_images(device):
    bank = bank_of().to(device)
    images = torch.tensor([7, 0, -1, 7, 2], device=device)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).to(device)
    before = bank.rows(torch.arange(10, device=device))
    expected = formulas.update_bank(before.cpu(), features.cpu(), images.cpu(), 0.3)
    assert bank.update_(features, images, 0.3) is bank
    after = bank.rows(torch.arange(10, device=device))
    torch.testing.assert_close(after.double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_stored_rows_stand_in_class_order():
    bank = bank_of()
    assert bank.labels[bank.order].tolist() == sorted(LABELS.tolist())
    for begin, end, label in zip(bank.offsets[:-1], bank.offsets[1:], bank.classes, strict=True):
        images = (label == LABELS).nonzero()[:, 0]
        assert torch.equal(bank.storage[begin:end], bank.rows(images))


def test_relabel_keeps_rows_with_their_images_and_forgets_scores_of_changed_ones():
    bank = bank_of()
    before = bank.rows(torch.arange(10))
    bank.last_log_p.copy_(-torch.arange(10.0))
    new = LABELS.clone()
    new[[0, 2]] = 1
    bank.relabel(new)
    assert torch.equal(bank.rows(torch.arange(10)), before)
    assert torch.equal(bank.labels, new)
    assert bank.labels[bank.order].tolist() == sorted(new.tolist())
    assert bank.last_log_p.isnan().nonzero()[:, 0].tolist() == [0, 2]


def test_a_bank_that_was_relabelled_in_inference_mode_loads_a_checkpoint():
    bank, saved = bank_of(), bank_of(seed=1).state_dict()
    with torch.inference_mode():
        bank.relabel(LABELS.clone())
    bank.load_state_dict(saved)
    assert torch.equal(bank.rows(torch.arange(10)), bank_of(seed=1).rows(torch.arange(10)))


def test_labels_changed_in_the_bank_itself_are_refused():
    """Which scores they leave behind could not be seen."""
    bank = bank_of()
    bank.labels[3] = 2
    with pytest.raises(ValueError, match="labels: expected a tensor of its own"):
        bank.relabel(bank.labels)


def test_a_bad_relabel_changes_nothing():
    bank = bank_of()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    for labels, error in ((LABELS[:5], ValueError), (LABELS.float(), TypeError), (LABELS - 1, ValueError)):
        with pytest.raises(error, match="labels: expected"):
            bank.relabel(labels)
    for name, tensor in bank.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_state_dict_holds_everything():
    bank, other = bank_of(seed=0), bank_of(seed=1)
    bank.last_log_p[3] = -0.5
    assert set(bank.state_dict()) == {"storage", "labels", "order", "scores"}
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.rows(torch.arange(10)), bank.rows(torch.arange(10)))
    assert other.last_log_p[3] == -0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (bank_of(LABELS[:9]), "expected 10 images of 6 values, the checkpoint holds shape \\(9, 6\\)"),
        (bank_of(dim=5), "expected 10 images of 6 values, the checkpoint holds shape \\(10, 5\\)"),
        (
            bank_of(LABELS.flip(0)),
            "labels differ at 8 of 10 images, first at image 0: -1 in the checkpoint, 2 here",
        ),
    ],
)
def test_a_checkpoint_of_another_archive_is_refused_and_nothing_is_loaded(other, message):
    bank = bank_of(seed=5)
    before = bank.rows(torch.arange(10))
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(other.state_dict())
    assert torch.equal(bank.rows(torch.arange(10)), before)
    assert torch.equal(bank.labels, LABELS)


def test_a_checkpoint_with_a_damaged_order_is_refused():
    bank, state = bank_of(), bank_of(seed=1).state_dict()
    state["order"] = state["order"].flip(0)
    with pytest.raises(RuntimeError, match="row order is not the class order"):
        bank.load_state_dict(state)


def test_a_checkpoint_without_rows_names_what_is_missing():
    state = bank_of().state_dict()
    del state["storage"]
    state["labels"] = state["labels"].flip(0)
    bank = bank_of()
    with pytest.raises(RuntimeError, match="the checkpoint lacks storage; nothing was loaded"):
        bank.load_state_dict(state)
    assert torch.equal(bank.labels, LABELS)


def test_a_checkpoint_without_a_bank_is_left_to_strict():
    bank = bank_of()
    before = bank.rows(torch.arange(10))
    assert len(bank.load_state_dict({}, strict=False).missing_keys) == 4
    assert torch.equal(bank.rows(torch.arange(10)), before)
    with pytest.raises(RuntimeError, match='Missing key.*"storage"'):
        bank.load_state_dict({})


def test_a_checkpoint_of_a_relabelled_archive_loads_after_relabel():
    bank, other = bank_of(seed=0), bank_of(seed=1)
    other.relabel(LABELS.flip(0))
    state = other.state_dict()
    bank.relabel(state["labels"])
    bank.load_state_dict(state)
    images = torch.arange(10)
    assert torch.equal(bank.labels, LABELS.flip(0))
    assert torch.equal(bank.rows(images), other.rows(images))
    bank.update_(torch.ones(1, 6), torch.tensor([4]), 0.0)
    assert torch.allclose(bank.rows(torch.tensor([4])), torch.full((1, 6), 6**-0.5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bank_of(LABELS.float()), TypeError, "labels: expected an integer tensor, got torch.float32"),
        (lambda: bank_of(LABELS[:0]), ValueError, "labels: expected at least one"),
        (lambda: bank_of(dim=0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: bank_of(dim=2.5), TypeError, "dim: expected an integer, got float"),
        (lambda: bank_of(dtype=torch.int8), TypeError, "dtype: expected float64, float32, float16 or bfloat16"),
        (
            lambda: bank_of().rows(torch.tensor([10])),
            IndexError,
            "index: expected -1 or a bank row from 0 to 9, got 10",
        ),
        (lambda: bank_of().rows(torch.tensor([-1])), IndexError, "index: expected images from 0 to 9, got -1"),
        (
            lambda: bank_of().update_(torch.ones(2, 6), torch.tensor([0, 10])),
            IndexError,
            "index: expected -1 or a bank row from 0 to 9, got 10 at row 1",
        ),
        (
            lambda: bank_of().update_(torch.eye(2, 6) * torch.tensor([[1], [0]]), torch.tensor([0, 1])),
            ValueError,
            "features: .* got norm 0.0 in row 1",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_skipped_rows_counts_what_a_gpu_left_out():
    bank = bank_of(device="cuda")
    before = bank.skipped_rows()
    bank.update_(torch.zeros(1, 6, device="cuda"), torch.tensor([0], device="cuda"))
    assert bank.skipped_rows() == before + 1


def test_a_cpu_skips_no_row_and_counts_none():
    bank = bank_of()
    for update in (torch.ops.ntdne_kernels.update_bank_, bank_update.update_bank_in_pytorch):
        with pytest.raises(RuntimeError, match="norm 0"):
            update(bank.storage, torch.zeros(1, 6), torch.tensor([0]), 0.5)
    assert bank.skipped_rows() == 0


def test_of_an_image_given_twice_the_higher_score_is_recorded():
    bank = bank_of()
    bank.last_log_p.fill_(-0.1)
    bank.record_(torch.tensor([-3.0, -1.0, -2.0, -9.0, -0.5]), torch.tensor([4, 4, 4, 0, -1]))
    assert bank.last_log_p[4] == -1
    assert bank.last_log_p[0] == -9
    assert (bank.last_log_p[[1, 2, 3, 5, 6, 7, 8, 9]] == -0.1).all()


@pytest.mark.parametrize("method", ["rows", "update_"])
def test_an_index_on_another_device_is_named(method):
    index = torch.zeros(1, dtype=torch.int64, device="meta")
    arguments = (index,) if method == "rows" else (torch.ones(1, 6), index)
    with pytest.raises(ValueError, match="index: expected the bank's device, cpu, got meta"):
        getattr(bank_of(), method)(*arguments)


def on(storage: str, tmp_path: Path, **options) -> MemoryBank:
    return bank_of(storage=storage, path=tmp_path / "bank" if storage == "disk" else None, **options)


@pytest.mark.parametrize("storage", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_elsewhere_hold_the_same_numbers(storage, dtype, device, tmp_path):
    results = []
    for kind in ("device", storage):
        made = torch.Generator().manual_seed(0)
        criterion = NTDNELoss(
            LABELS, 6, generator=made, dtype=dtype, storage=kind, path=tmp_path / "bank" if kind == "disk" else None
        ).to(device)
        assert criterion.memory.storage.device == (device if kind == "device" else torch.device("cpu"))
        assert criterion.memory.storage.is_pinned() == (kind == "host" and device.type == "cuda")
        for _ in range(2):
            features = torch.randn(4, 6, generator=made).to(device).requires_grad_()
            index = torch.tensor([3, 0, 3, -1], device=device)
            loss = criterion(features, index, labels=torch.ones_like(index))
            loss.backward()
            criterion.update_bank(features, index)
        criterion.refresh_indicator()
        criterion.memory.relabel(LABELS.flip(0).to(device))
        rows = criterion.memory.rows(torch.arange(10, device=device))
        assert rows.device.type == device.type
        results.append((loss.detach(), features.grad, rows, criterion.memory.last_log_p))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_bank_on_disk_is_taken_up_with_its_rows(tmp_path):
    bank = on("disk", tmp_path)
    bank.update_(torch.ones(2, 6), torch.tensor([3, 7]), 0.0)
    rows = bank.rows(torch.arange(10))
    del bank
    assert torch.equal(on("disk", tmp_path, seed=1).rows(torch.arange(10)), rows)
    with pytest.raises(ValueError, match=r"path: expected the file of this bank, .* labels \(file: .*, here: "):
        on("disk", tmp_path, labels=LABELS.flip(0))
    with pytest.raises(ValueError, match=r"shape \(file: \[10, 6\], here: \[10, 5\]\)"):
        on("disk", tmp_path, dim=5)


def test_a_bank_on_disk_that_was_relabelled_is_one_of_its_new_labels(tmp_path):
    bank = on("disk", tmp_path)
    bank.relabel(LABELS.flip(0))
    bank.update_(torch.ones(1, 6), torch.tensor([3]), 0.0)
    rows = bank.rows(torch.arange(10))
    del bank
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "bank.json"]
    with pytest.raises(ValueError, match="path: expected the file of this bank"):
        on("disk", tmp_path)
    assert torch.equal(on("disk", tmp_path, labels=LABELS.flip(0)).rows(torch.arange(10)), rows)


def test_a_relabel_finds_the_file_behind_a_link_and_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bank").symlink_to(tmp_path / "large" / "bank")
    monkeypatch.chdir(tmp_path / "work")
    bank = bank_of(storage="disk", path="bank")
    rows = bank.rows(torch.arange(10))
    monkeypatch.chdir(tmp_path)
    bank.relabel(LABELS.flip(0))
    del bank
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["bank", "bank.json"]
    assert [path.is_symlink() for path in (tmp_path / "work").iterdir()] == [True]
    again = bank_of(LABELS.flip(0), storage="disk", path=tmp_path / "work" / "bank")
    assert torch.equal(again.rows(torch.arange(10)), rows)


def test_a_relabel_that_stops_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    bank = on("disk", tmp_path)
    rows = bank.rows(torch.arange(10))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bank.relabel(LABELS.flip(0))
    assert torch.equal(bank.rows(torch.arange(10)), rows)
    assert torch.equal(bank.labels, LABELS)
    bank.relabel(LABELS.flip(0))  # over what that left
    assert torch.equal(bank.rows(torch.arange(10)), rows)


def test_a_start_that_stopped_is_made_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "_start_at_random", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            on("disk", tmp_path)
    assert torch.equal(on("disk", tmp_path).rows(torch.arange(10)), bank_of().rows(torch.arange(10)))


def test_a_move_that_fails_leaves_the_rows(tmp_path):
    bank = on("host", tmp_path)
    rows = bank.rows(torch.arange(10))
    with pytest.raises(RuntimeError):
        bank._apply(lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert torch.equal(bank.rows(torch.arange(10)), rows)


def test_a_checkpoint_is_loaded_into_the_file_also_when_it_is_to_be_assigned(tmp_path):
    bank = on("disk", tmp_path)
    bank.load_state_dict(bank_of(seed=1).state_dict(), assign=True)
    del bank
    assert torch.equal(on("disk", tmp_path).rows(torch.arange(10)), bank_of(seed=1).rows(torch.arange(10)))


def test_a_bank_on_disk_is_not_copied(tmp_path):
    with pytest.raises(TypeError, match="a bank on disk has the file .*bank for itself and cannot be copied"):
        copy.deepcopy(on("disk", tmp_path))
    with pytest.raises(TypeError, match="a bank on disk has the file .*bank for itself and cannot be copied"):
        pickle.dumps(on("disk", tmp_path))
    assert torch.equal(pickle.loads(pickle.dumps(bank_of())).rows(torch.arange(10)), bank_of().rows(torch.arange(10)))
    assert torch.equal(copy.deepcopy(bank_of()).rows(torch.arange(10)), bank_of().rows(torch.arange(10)))


def test_bad_labels_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="labels: expected -1"):
        on("disk", tmp_path, labels=LABELS - 2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_goes_from_one_storage_to_another(tmp_path):
    bank, other = on("disk", tmp_path, seed=0), on("host", tmp_path, seed=1)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.rows(torch.arange(10)), bank.rows(torch.arange(10)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "tape"}, "storage: expected one of 'device', 'host', 'disk', got 'tape'"),
        ({"storage": "disk"}, "path: expected a file for storage='disk'"),
        ({"path": "bank"}, "path: expected .* None otherwise, got"),
    ],
)
def test_a_storage_that_cannot_be_meant_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        bank_of(**options)
