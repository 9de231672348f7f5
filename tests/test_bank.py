"""MemoryBank: rows by image whatever their storage order, checkpoints that load whole or not, and what is done to a
module's tensors from outside."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from ntdne_kernels import MemoryBank, NTDNELoss
from ntdne_kernels.bank import memory_bank, module
from ntdne_kernels.bank.state import entries_of
from ntdne_kernels.ops import bank_update
from tests import formulas, ranks

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
    before = bank.skipped_rows()  # by all compiled code of the process
    for update in (torch.ops.ntdne_kernels.update_bank_, bank_update.update_bank_in_pytorch):
        with pytest.raises(RuntimeError, match="norm 0"):
            update(bank.storage, torch.zeros(1, 6), torch.tensor([0]), 0.5)
    assert bank.skipped_rows() == before


def test_of_an_image_given_twice_the_higher_score_is_recorded():
    bank = bank_of()
    bank.last_log_p.fill_(-0.1)
    bank.record_(torch.tensor([-3.0, -1.0, -2.0, -9.0, -0.5]), torch.tensor([4, 4, 4, 0, -1]))
    assert bank.last_log_p[4] == -1
    assert bank.last_log_p[0] == -9
    assert (bank.last_log_p[[1, 2, 3, 5, 6, 7, 8, 9]] == -0.1).all()


def test_former_names_work_and_say_the_new_ones():
    bank, images = bank_of(), torch.arange(10)
    for old, new in (
        ("index", "label_index"),
        ("kind", "storage_kind"),
        ("places", "positions"),
        ("take", "stored_rows"),
    ):
        with pytest.warns(DeprecationWarning, match=f"MemoryBank.{old} is now called {new}"):
            getattr(bank, old)
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert torch.equal(bank.take(bank.places(images)), bank.rows(images))
        assert torch.equal(bank.index.offsets, bank.offsets)
        assert bank.kind == "device"


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
        patch.setattr(memory_bank, "fill_at_random", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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


# What others do to the tensors of a module. The labels are more than float16 and int8 tell apart.
MANY = torch.randint(-1, 3000, (4000,), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Encoder and criterion in one module, which averaging and wrapping take as a whole."""

    def __init__(self, labels: Tensor = MANY, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        made = torch.Generator().manual_seed(0)
        options = {"k": 0.3, "warmup_epochs": 0, "unit_slope": False, "indicator": "stored"} | options
        self.criterion = NTDNELoss(labels, 6, generator=made, **options)

    def forward(self, images: Tensor, index: Tensor) -> Tensor:
        return self.criterion(self.encoder(images), index)

    def train_on(self, seed: int) -> None:
        made, memory = torch.Generator().manual_seed(seed), self.criterion.memory
        index = torch.randint(0, len(memory), (64,), generator=made).to(memory.device)
        images = torch.randn(64, 4, generator=made).to(memory.device)
        self(images, index).backward()
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                parameter -= 0.1 * parameter.grad
        self.criterion.update_bank(self.encoder(images), index)


def tensors(memory: MemoryBank) -> dict[str, Tensor]:
    names = ("storage", "labels", "order", "position", "classes", "offsets", "scores")
    return {name: getattr(memory, name).clone().cpu() for name in names}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)


def loss_of(criterion: NTDNELoss) -> Tensor:
    index = torch.arange(50, device=criterion.memory.device)
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)).to(criterion.memory.device)
    return criterion.eval()(features, index).cpu()


AVERAGES = {
    "equal": {},
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema": {"avg_fn": get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_averaged_copy_has_the_bank_of_the_model_that_is_trained(use_buffers, average, device):
    model = Model().to(device)
    averaged = AveragedModel(model, use_buffers=use_buffers, **average)
    alone = Model().to(device)
    for seed in range(5):
        model.train_on(seed)
        averaged.update_parameters(model)
        alone.train_on(seed)
    assert_same(tensors(model.criterion.memory), tensors(alone.criterion.memory))
    assert_same(tensors(averaged.module.criterion.memory), tensors(alone.criterion.memory))
    assert not torch.equal(averaged.module.encoder[0].weight, model.encoder[0].weight)
    assert torch.equal(loss_of(averaged.module.criterion), loss_of(alone.criterion))
    model.train_on(5)  # the copy stays as it was when last averaged, or looked at
    assert_same(tensors(averaged.module.criterion.memory), tensors(alone.criterion.memory))
    averaged.update_parameters(model)
    saved = averaged.state_dict()
    assert torch.equal(saved["module.criterion.memory.storage"], model.criterion.memory.storage)
    with torch.inference_mode():
        assert torch.equal(loss_of(averaged.module.criterion), loss_of(model.criterion))
    update_bn([torch.randn(8, 4).to(device)], averaged.module.encoder)


def test_an_averaged_copy_of_another_dtype_follows_new_labels_too():
    model = Model()
    averaged = AveragedModel(model, use_buffers=True)
    averaged.module.to(torch.bfloat16)
    model.train_on(0)
    model.criterion.memory.relabel(MANY.flip(0) % 7)
    averaged.update_parameters(model)
    memory = averaged.module.criterion.memory
    expected = tensors(model.criterion.memory)
    assert memory.storage.dtype == torch.bfloat16
    assert_same(tensors(memory), expected | {"storage": expected["storage"].to(torch.bfloat16)})


def test_a_copy_that_nothing_averages_keeps_its_rows():
    model = Model()
    model.train_on(0)
    copied, expected = copy.deepcopy(model), tensors(model.criterion.memory)
    model.train_on(1)
    for buffer in copied.buffers():  # as DistributedDataParallel writes those of rank 0
        buffer.copy_(buffer.clone())
    assert_same(tensors(copied.criterion.memory), expected)


def test_a_copy_that_is_trained_itself_keeps_what_it_learned():
    model = Model()
    copied, twin = copy.deepcopy(model), Model()
    copied.train_on(1)
    twin.train_on(1)
    for own, theirs in zip(copied.buffers(), model.buffers(), strict=True):
        own.copy_(theirs)
    assert_same(tensors(copied.criterion.memory), tensors(twin.criterion.memory))


def test_an_averaged_copy_of_what_is_no_more_is_refused_until_it_is_given_a_bank():
    model, other = Model(), Model()
    averaged = AveragedModel(model)
    reloaded = pickle.loads(pickle.dumps(averaged))
    del model
    for found in (averaged, reloaded):
        memory = found.module.criterion.memory
        assert_same(tensors(memory), tensors(other.criterion.memory))  # nothing was averaged yet
        found.update_parameters(other)
        for use in (loss_of, lambda criterion: criterion.state_dict(), copy.deepcopy):
            with pytest.raises(RuntimeError, match="copied from is no more: .* memory.load_state_dict"):
                use(found.module.criterion)
        memory.load_state_dict(other.criterion.memory.state_dict())
        assert torch.equal(loss_of(found.module.criterion), loss_of(other.criterion))


def lightning_of(folder: Path, epochs: int, *callbacks, resume: Path | None = None):
    """A module trained by Lightning, and what it saw while validating with averaged weights."""
    pl = pytest.importorskip("lightning.pytorch")
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(64))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    seen = []

    class Module(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(MANY[:64])

        def training_step(self, batch):
            images, index = batch
            features = self.model.encoder(images)
            self.model.criterion.update_bank(features, index)
            return self.model.criterion(features, index)

        def validation_step(self, batch):
            seen.append((tensors(self.model.criterion.memory), self.model.encoder[0].weight.clone()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    saving = pl.callbacks.ModelCheckpoint(folder, save_last=True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[saving, *callbacks], **options)
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module.model, seen, Path(saving.last_model_path)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_average_of_weights_leaves_the_bank_alone(tmp_path):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def averaging() -> object:
        return callbacks.EMAWeightAveraging(decay=0.9)

    plain, _, _ = lightning_of(tmp_path / "plain", 3)
    model, seen, saved = lightning_of(tmp_path / "averaged", 3, averaging())
    expected = tensors(plain.criterion.memory)
    assert_same(tensors(model.criterion.memory), expected)
    assert not torch.equal(model.encoder[0].weight, plain.encoder[0].weight)
    for memory, _ in seen:
        assert torch.equal(memory["labels"], MANY[:64])
        torch.testing.assert_close(memory["storage"].norm(dim=1), torch.ones(64))
    assert not torch.equal(seen[-1][1], plain.encoder[0].weight)  # they were averaged weights
    found = torch.load(saved, weights_only=False)
    for name in ("storage", "labels", "order"):
        assert torch.equal(found["state_dict"][f"model.criterion.memory.{name}"], expected[name])

    _, _, early = lightning_of(tmp_path / "early", 2, averaging())
    resumed, _, _ = lightning_of(tmp_path / "resumed", 3, averaging(), resume=early)
    assert_same(tensors(resumed.criterion.memory), expected)
    assert torch.equal(resumed.encoder[0].weight, model.encoder[0].weight)
    swa, _, _ = lightning_of(tmp_path / "swa", 3, callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1))
    assert torch.equal(swa.criterion.memory.labels, MANY[:64])
    torch.testing.assert_close(swa.criterion.memory.storage.norm(dim=1), torch.ones(64))


def averaged_state(memory: MemoryBank, other: MemoryBank, *, integers: bool) -> None:
    """As timm's ModelEma (integers) and ModelEmaV3 average: over the tensors that state_dict holds."""
    for own, theirs in zip(memory.state_dict().values(), other.state_dict().values(), strict=True):
        if integers or own.is_floating_point():
            own.copy_(0.9 * own + 0.1 * theirs)
        else:
            own.copy_(theirs)


@pytest.mark.parametrize("integers", [True, False])
def test_an_average_over_state_dicts_is_refused_at_the_next_use_and_can_be_undone(integers, device):
    model = Model().to(device)
    copied = copy.deepcopy(model)
    model.train_on(0)
    memory = copied.criterion.memory
    averaged_state(memory, model.criterion.memory, integers=integers)
    averaged = {name: tensor.detach().clone() for name, tensor in entries_of(memory._shard).items()}
    changed = "the labels of \\d+ of 4000 images were changed" if integers else "the row of image \\d+ has length 0\\."
    for use in (
        loss_of,
        lambda criterion: criterion.update_bank(torch.ones(1, 6, device=device), torch.tensor([0], device=device)),
        lambda criterion: criterion.memory.rows(torch.tensor([0], device=device)),
        lambda criterion: criterion.refresh_indicator(),
        lambda criterion: criterion.state_dict(),
        copy.deepcopy,
        pickle.dumps,
    ):
        with pytest.raises(RuntimeError, match=f"{changed}.* average over .* memory.load_state_dict\\(state\\)"):
            use(copied.criterion)
    memory.load_state_dict(model.criterion.memory.state_dict())
    assert_same(tensors(memory), tensors(model.criterion.memory))
    fresh = Model().to(device).criterion.memory
    problem = "labels differ at" if integers else "row \\d+ of the checkpoint has length 0\\."
    before = tensors(fresh)
    with pytest.raises(RuntimeError, match=f"{problem}.*averag"):
        fresh.load_state_dict(averaged)
    assert_same(tensors(fresh), before)


def test_an_average_over_the_floats_of_state_dicts_is_refused_at_the_next_use():
    model = Model()
    copied = copy.deepcopy(model)
    model.train_on(0)
    theirs = model.criterion.memory.state_dict()
    for name, own in copied.criterion.memory.state_dict().items():
        if own.is_floating_point():
            own.mul_(0.5).add_(theirs[name], alpha=0.5)
    with pytest.raises(RuntimeError, match="the row of image \\d+ has length 0\\."):
        loss_of(copied.criterion)


def test_rows_that_are_written_as_unit_vectors_are_taken():
    bank = bank_of()
    bank.storage.copy_(bank.storage.flip(0))
    bank.rows([0])
    bank.storage[3] *= 2
    with pytest.raises(RuntimeError, match="has length 2 instead of 1"):
        bank.rows([0])


@pytest.mark.parametrize("compiled", ["update_bank", "forward", "both", ""])
def test_training_never_looks_at_the_rows(compiled, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "check_unit_rows", looks.append)
    criterion = NTDNELoss(LABELS, dim=6)
    forward, update = criterion, criterion.update_bank
    if compiled in ("forward", "both"):
        forward = torch.compile(forward, backend="eager")
    if compiled in ("update_bank", "both"):
        update = torch.compile(update, backend="eager")
    features, index = torch.randn(4, 6, requires_grad=True), torch.arange(4)
    for _ in range(4):
        forward(features, index).backward()
        update(features, index)
        criterion.memory.rows(index)
    assert not looks
    criterion.memory.storage.mul_(2)
    criterion.memory.rows(index)
    assert looks


def test_a_bank_of_inference_mode_can_be_trained():
    with torch.inference_mode():
        criterion = NTDNELoss(LABELS, dim=6)
        copied = copy.deepcopy(criterion)
        halved = copy.deepcopy(criterion).half()
    for each in (criterion, copied, halved, copy.deepcopy(halved)):
        features = torch.randn(4, 6, requires_grad=True)
        each(features, torch.arange(4)).backward()
        each.update_bank(features, torch.arange(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_float32_whatever_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert bank_of().last_log_p.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_a_bank_is_made_under_another_default_device():
    with torch.device("meta"):
        assert MemoryBank([0, 1, 1], dim=8).order.tolist() == [0, 1, 2]


def test_labels_written_in_place_are_refused_until_they_are_given_by_relabel():
    bank = bank_of()
    rows = bank.rows(torch.arange(10))
    bank.last_log_p.fill_(-1)
    bank.labels[3] = 2
    with pytest.raises(
        RuntimeError, match="the labels of 1 of 10 images were changed, first that of image 3 from 1 to 2"
    ):
        bank.rows(torch.arange(10))
    labels = LABELS.clone()
    labels[3] = 2
    bank.relabel(labels)
    assert torch.equal(bank.labels, labels)
    assert torch.equal(bank.rows(torch.arange(10)), rows)
    assert bank.last_log_p.isnan().nonzero()[:, 0].tolist() == [3]
    bank.order.copy_(bank.order.flip(0))
    with pytest.raises(RuntimeError, match="the order of the rows was changed"):
        bank.update_(torch.ones(1, 6), torch.tensor([0]))
    bank.labels = bank.labels.float()
    bank.order = torch.argsort(labels, stable=True)
    assert torch.equal(bank.rows(torch.arange(10)), rows)  # the same numbers are no fault


CONVERSIONS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "to": (lambda model: model.to(torch.float16), torch.float16),
    "type": (lambda model: model.type(torch.float16), torch.float16),
    "back": (lambda model: model.half().float(), torch.float32),
    "to_empty": (lambda model: model.to_empty(device="cpu"), None),
    "share_memory": (lambda model: model.share_memory(), torch.float32),
    "apply": (lambda model: model.apply(lambda part: [x.zero_() for x in part.buffers(recurse=False)]), torch.float32),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_a_module_reach_the_rows_alone(name):
    convert, dtype = CONVERSIONS[name]
    rounded = torch.float16 if name == "back" else dtype
    model = Model()
    model.train_on(0)
    memory = model.criterion.memory
    expected = tensors(memory)
    rows = expected.pop("storage")
    with deterministic():  # what to_empty does not write is NaN
        convert(model)
    assert_same({name: getattr(memory, name) for name in expected}, expected)
    if dtype is None:
        with pytest.raises(RuntimeError, match="has length nan instead of 1: .*to_empty"):
            loss_of(model.criterion)
        model.criterion.load_state_dict(Model().criterion.state_dict())
        assert torch.equal(loss_of(model.criterion), loss_of(Model().criterion))
        return
    assert memory.storage.dtype == dtype
    torch.testing.assert_close(memory.storage.float(), rows, rtol=0, atol=torch.finfo(rounded).eps)
    memory.update_(torch.ones(1, 6), torch.tensor([5]), 0.0)
    torch.testing.assert_close(memory.rows(torch.tensor([5])).float(), torch.full((1, 6), 6**-0.5), rtol=0, atol=0.01)
    assert loss_of(model.criterion).isfinite()


class deterministic:
    """Fills what PyTorch leaves unwritten."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_rows_cannot_have_is_refused_and_changes_nothing(dtype):
    memory = bank_of()
    before = tensors(memory)
    with pytest.raises(TypeError, match=f"memory: rows are float64, .*, and cannot be {dtype}"):
        memory.type(dtype)
    assert_same(tensors(memory), before)


def test_functional_call_takes_other_parameters_and_no_other_bank():
    model, other = Model(), Model()
    other.train_on(0)
    index, images = torch.arange(50), torch.randn(50, 4)
    model.eval()
    expected = model(images, index)
    given = dict(model.named_parameters()) | {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(torch.func.functional_call(model, given, (images, index)), expected)
    labels = {"criterion.memory.labels": MANY.flip(0)}
    with pytest.raises(RuntimeError, match="labels of .* images were changed"):
        torch.func.functional_call(model, labels, (images, index))
    with pytest.raises(AttributeError, match="storage"):
        torch.func.functional_call(model, {"criterion.memory.storage": other.criterion.memory.storage}, (images, index))
    assert torch.equal(model(images, index), expected)


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach PyTorch's dispatcher: on a GPU each may be a launch."""

    def __enter__(self) -> "Dispatched":
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_looking_for_changes_runs_nothing_and_an_update_is_one_operation():
    model = Model()
    copied = copy.deepcopy(model)
    features, index = torch.ones(1, 6), torch.tensor([0])
    for memory in (model.criterion.memory, copied.criterion.memory):
        for _ in range(2):
            with Dispatched() as looking:
                memory.check_untouched()
                assert memory.storage is memory.storage
            with Dispatched() as writing:
                memory.update_(features, index)
            assert looking.names == []
            assert writing.names == ["aten.detach.default", "ntdne_kernels.update_bank_.default"]


@pytest.mark.gpu
def test_a_gpu_update_of_a_bank_is_one_launch():
    bank = bank_of(device="cuda")
    features, index = torch.ones(2, 6, device="cuda"), torch.tensor([3, 1], device="cuda")
    bank.update_(features, index)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bank.update_(features, index)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 1
    assert "update_bank_kernel" in launches[0]


def test_a_compiled_update_of_a_bank_is_that_of_an_eager_one(device):
    eager, compiled = bank_of(device=device), bank_of(device=device)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    index = torch.tensor([7, 0, -1, 7, 2], device=device)
    step = torch.compile(lambda features, index: compiled.update_(features * 2, index, 0.5), fullgraph=True)
    for _ in range(2):
        eager.update_(features * 2, index, 0.5)
        step(features, index)
    assert torch.equal(compiled.storage, eager.storage)
    assert not compiled.fresh


def wrapped_by_fsdp(wrap: str) -> dict[str, Tensor]:
    model = Model()
    if wrap == "fully_shard":
        fully_shard(model)
    else:
        model.encoder[1] = nn.Identity()  # BatchNorm's buffers are cast, and do not multiply float32 then
        casting = MixedPrecision(buffer_dtype=torch.float16)
        model = FullyShardedDataParallel(model, mixed_precision=casting, device_id=torch.device("cpu"))
    criterion = model.criterion
    model.train()(torch.randn(64, 4), torch.arange(64)).backward()
    criterion.update_bank(torch.ones(1, 6), torch.tensor([5]))
    return tensors(criterion.memory)


@pytest.mark.parametrize("wrap", ["fully_shard", "FullyShardedDataParallel"])
def test_fsdp_leaves_the_bank_alone(wrap):
    """One rank: its parameters are all there, and its buffers are cast."""
    (found,) = ranks.run(wrapped_by_fsdp, 1, wrap)
    expected = Model()
    expected.criterion.update_bank(torch.ones(1, 6), torch.tensor([5]))
    scores = found.pop("scores")
    assert scores.dtype == torch.float32
    assert int((~scores.isnan()).sum()) == int((MANY[:64] >= 0).sum())
    assert_same(found, {name: x for name, x in tensors(expected.criterion.memory).items() if name != "scores"})
