"""MemoryBank and fill_bank: rows by image whatever their storage order, checkpoints that load whole or not."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntdne_kernels import IndexedDataset, MemoryBank, fill_bank
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


def encoder_and_loader(images: int = 10) -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    encoder[1].eval()
    data = TensorDataset(torch.randn(images, 3), LABELS[:images])
    return encoder, DataLoader(IndexedDataset(data), batch_size=4, shuffle=True)


@pytest.mark.parametrize("progress", [True, False])
def test_fill_bank_writes_the_features_of_every_image(progress):
    bank, (encoder, loader) = bank_of(), encoder_and_loader()
    assert fill_bank(bank, encoder, loader, progress=progress) == 10
    images = loader.dataset.dataset.tensors[0]
    assert [module.training for module in encoder.modules()] == [True, True, False]
    expected = nn.functional.normalize(encoder.eval()(images), dim=1)
    torch.testing.assert_close(bank.rows(torch.arange(10)), expected.detach())


def test_fill_bank_restores_the_encoder_after_an_error():
    bank, (encoder, loader) = bank_of(dim=7), encoder_and_loader()
    with pytest.raises(ValueError, match="features: expected 7 columns"):
        fill_bank(bank, encoder, loader, progress=False)
    assert [module.training for module in encoder.modules()] == [True, True, False]


def test_fill_bank_says_which_share_of_the_archive_was_missing():
    bank, (encoder, loader) = bank_of(), encoder_and_loader(images=8)
    with pytest.warns(UserWarning, match="2 of 10 images were not in the loader"):
        assert fill_bank(bank, encoder, loader, progress=False) == 8


def test_fill_bank_wants_indices():
    bank, (encoder, _) = bank_of(), encoder_and_loader()
    with pytest.raises(TypeError, match="loader: expected batches \\(images, ..., index\\)"):
        fill_bank(bank, encoder, [torch.zeros(4, 3)], progress=False)


def test_fill_bank_refuses_labels_in_place_of_indices():
    bank, (encoder, loader) = bank_of(), encoder_and_loader()
    before = bank.rows(torch.arange(10))
    with pytest.raises(ValueError, match="loader: .* got the same index twice; does the batch end with labels"):
        fill_bank(bank, encoder, DataLoader(loader.dataset.dataset, batch_size=10), progress=False)
    assert torch.equal(bank.rows(torch.arange(10)), before)


def test_fill_bank_reports_progress_line_by_line_where_there_is_no_terminal(capsys):
    bank, (encoder, loader) = bank_of(), encoder_and_loader()
    fill_bank(bank, encoder, loader)
    assert "Filling the bank: 3 of 3 batches" in capsys.readouterr().err


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
