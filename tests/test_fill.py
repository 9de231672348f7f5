"""fill_bank: every image's features, on one process or several, and a pass that is taken up where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from ntdne_kernels import IndexedDataset, MemoryBank, checkpoint, fill, fill_bank
from tests import ranks

LABELS = torch.tensor([2, 0, -1, 1, 0, 2, 2, 1, 0, -1])
INDEX = torch.arange(4)


def new_bank(dim: int = 6) -> MemoryBank:
    return MemoryBank(LABELS, dim, generator=torch.Generator().manual_seed(0))


def encoder_and_loader(images: int = 10) -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    encoder[1].eval()
    data = TensorDataset(torch.randn(images, 3), LABELS[:images])
    return encoder, DataLoader(IndexedDataset(data), batch_size=4, shuffle=True)


@pytest.mark.parametrize("progress", [True, False])
def test_fill_bank_writes_the_features_of_every_image(progress):
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    assert fill_bank(bank, encoder, loader, progress=progress) == 10
    images = loader.dataset.dataset.tensors[0]  # type: ignore[attr-defined]
    assert [module.training for module in encoder.modules()] == [True, True, False]
    expected = nn.functional.normalize(encoder.eval()(images), dim=1)
    torch.testing.assert_close(bank.rows(torch.arange(10)), expected.detach())


def test_fill_bank_restores_the_encoder_after_an_error():
    bank, (encoder, loader) = new_bank(dim=7), encoder_and_loader()
    with pytest.raises(ValueError, match="features: expected 7 columns"):
        fill_bank(bank, encoder, loader, progress=False)
    assert [module.training for module in encoder.modules()] == [True, True, False]


def test_fill_bank_warns_how_many_images_were_missing():
    bank, (encoder, loader) = new_bank(), encoder_and_loader(images=8)
    with pytest.warns(UserWarning, match="2 of 10 images were not in the loader"):
        assert fill_bank(bank, encoder, loader, progress=False) == 8


def test_fill_bank_refuses_batches_without_indices():
    bank, (encoder, _) = new_bank(), encoder_and_loader()
    with pytest.raises(TypeError, match="loader: expected batches \\(images, ..., index\\)"):
        fill_bank(bank, encoder, [torch.zeros(4, 3)], progress=False)


@pytest.mark.parametrize("key", ["pixel_values", "image", "images", "img"])
def test_fill_bank_takes_batches_with_keys(key):
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    images = loader.dataset.dataset.tensors[0]  # type: ignore[attr-defined]
    keyed = IndexedDataset([{"file": "a.png", key: image, "label": 0} for image in images])
    assert fill_bank(bank, encoder, DataLoader(keyed, batch_size=4, shuffle=True), progress=False) == 10
    expected = nn.functional.normalize(encoder.eval()(images), dim=1)
    torch.testing.assert_close(bank.rows(torch.arange(10)), expected.detach())


@pytest.mark.parametrize(
    ("batch", "found"),
    [({"image": torch.zeros(4, 3)}, "image"), ({"x": torch.zeros(4, 3), "index": INDEX}, "x, index")],
)
def test_fill_bank_names_the_keys_it_found_where_some_are_missing(batch, found):
    bank, (encoder, _) = new_bank(), encoder_and_loader()
    with pytest.raises(TypeError, match=f"loader: .* under the keys 'index' and 'pixel_values' .*; got keys {found}$"):
        fill_bank(bank, encoder, [batch], progress=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_indices_have_any_integer_dtype_and_minus_one_may_repeat(dtype):
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    images = loader.dataset.dataset.tensors[0]  # type: ignore[attr-defined]
    none = torch.tensor([-1, -1]).to(dtype) if dtype.is_signed else torch.tensor([], dtype=dtype)
    index = torch.cat([torch.arange(10, dtype=dtype), none])
    assert fill_bank(bank, encoder, [(images[index.long()], index)], progress=False) == 10
    torch.testing.assert_close(
        bank.rows(torch.arange(10)), nn.functional.normalize(encoder.eval()(images), dim=1).detach()
    )


def test_fill_bank_refuses_labels_in_place_of_indices():
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    before = bank.rows(torch.arange(10))
    with pytest.raises(ValueError, match="loader: .* got the same index twice; does the batch end with labels"):
        fill_bank(bank, encoder, DataLoader(loader.dataset.dataset, batch_size=10), progress=False)  # type: ignore[attr-defined]
    assert torch.equal(bank.rows(torch.arange(10)), before)


def test_fill_bank_reports_its_progress_on_standard_error(capsys):
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    fill_bank(bank, encoder, loader)
    assert "Filling the bank: 3 of 3 batches" in capsys.readouterr().err


class Scans(Dataset[tuple[Tensor, int]]):
    """23 made images; keeps which of them were read, and may have one that cannot be."""

    def __init__(self, unreadable: int = -1) -> None:
        self.images = torch.randn(23, 3, generator=torch.Generator().manual_seed(8))
        self.read: list[int] = []
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, image: int) -> tuple[Tensor, int]:
        if image == self.unreadable:
            raise OSError(f"image {image} is damaged")
        self.read.append(image)
        return self.images[image], 0


def fill_scans(
    folder: Path | None = None,
    unreadable: int = -1,
    save_seconds: float = 0,
    disk: Path | None = None,
    shared: bool | None = None,
) -> dict[str, Any]:
    """Fill a bank of the scans; on ranks a shared one. How many were filled, what was read, the rows or the error."""
    fill.SAVE_SECONDS = save_seconds
    shared = distributed.is_initialized() if shared is None else shared
    scans = Scans(unreadable)
    bank = MemoryBank(
        torch.arange(23) % 4,
        6,
        generator=torch.Generator().manual_seed(1),
        process_group=distributed.group.WORLD if shared else None,
        storage="device" if disk is None else "disk",
        path=disk,
    )
    data = IndexedDataset(scans)
    sampler = DistributedSampler(data, shuffle=False) if shared else None
    torch.manual_seed(0)
    encoder = nn.Linear(3, 6)
    found: dict[str, Any] = {}
    try:
        found["filled"] = fill_bank(
            bank, encoder, DataLoader(data, batch_size=2, sampler=sampler), progress=False, resume=folder
        )
    except (OSError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    expected = nn.functional.normalize(encoder(scans.images), dim=1).detach()
    return found | {"read": scans.read, "error of rows": float((bank.rows(torch.arange(23)) - expected).abs().max())}


@pytest.mark.parametrize("W", [2, 3])
def test_a_shared_bank_is_filled_by_all_ranks(W):
    for found in ranks.run(fill_scans, W):
        assert found["filled"] == 23
        assert len(found["read"]) == -(-23 // W)
        assert found["error of rows"] < 1e-6


def fill_unevenly() -> tuple[int, Tensor, Tensor]:
    """Rank 1 has no batch; the encoder is wrapped, and indices are int32."""
    torch.manual_seed(0)
    encoder = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)))
    bank = MemoryBank(torch.arange(23) % 4, 6, process_group=distributed.group.WORLD)
    images, index = Scans().images, torch.arange(23, dtype=torch.int32)
    batches = [(images[:20], index[:20]), (images[20:], index[20:])] if distributed.get_rank() == 0 else []
    filled = fill_bank(bank, encoder, batches, progress=False)
    return filled, bank.rows(index), nn.functional.normalize(encoder.module.eval()(images), dim=1).detach()


def test_a_rank_without_batches_takes_part():
    for filled, rows, expected in ranks.run(fill_unevenly, 2, timeout=60):
        assert filled == 23
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_a_resumed_pass_fills_the_missing_images_on_any_number_of_ranks(before, after, tmp_path):
    started = ranks.run(fill_scans, before, tmp_path, 17) if before > 1 else [fill_scans(tmp_path, 17)]
    failed = [found["error"] for found in started]
    assert any("image 17 is damaged" in text for text in failed)
    assert all("image 17 is damaged" in text for text in failed)
    finished = ranks.run(fill_scans, after, tmp_path) if after > 1 else [fill_scans(tmp_path)]
    for found in finished:
        assert found["filled"] == 23
        assert found["error of rows"] < 1e-6
    read_before = [image for found in started for image in found["read"]]
    read_after = [image for found in finished for image in found["read"]]
    assert 17 in read_after
    assert set(read_before) | set(read_after) == set(range(23))
    assert len(read_after) < 23 - 8  # what is missing, and what DistributedSampler gives twice
    assert list(tmp_path.iterdir()) == []  # the next pass is a new one


def fill_alone(folder: Path, first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each rank fills a bank of its own, first stopped at another image; rank 2 fills none."""
    rank = distributed.get_rank()
    if rank == 2:
        return {}, {}
    own = folder / f"{rank}"
    return fill_scans(own, first + rank, shared=False), fill_scans(own, shared=False)


def test_ranks_with_banks_of_their_own_fill_and_resume_independently(tmp_path):
    for rank, (stopped, finished) in enumerate(ranks.run(fill_alone, 3, tmp_path, 8, timeout=60)[:2]):
        assert f"image {8 + rank} is damaged" in stopped["error"]
        assert finished["error of rows"] < 1e-6
        assert sorted(finished["read"]) == list(range(8, 23))


def test_checkpoints_of_a_pass_hold_no_rows_of_a_bank_on_disk(tmp_path, monkeypatch):
    saved, folder = [], tmp_path / "pass"
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda _, state, *rest, **more: saved.append(set(state)))
    fill_scans(folder, 17, disk=tmp_path / "bank")
    assert saved == [{"filled"}] * 8
    monkeypatch.undo()
    fill_scans(folder, 17, disk=tmp_path / "bank")
    finished = fill_scans(folder, disk=tmp_path / "bank")
    assert finished["filled"] == 23
    assert finished["error of rows"] < 1e-6
    assert sorted(finished["read"]) == list(range(16, 23))


def test_a_pass_whose_bank_file_was_lost_starts_from_the_beginning(tmp_path):
    fill_scans(tmp_path / "pass", 17, disk=tmp_path / "bank")
    (tmp_path / "bank").unlink()
    (tmp_path / "bank.json").unlink()
    with pytest.warns(UserWarning, match="the bank's file is newer than the pass"):
        finished = fill_scans(tmp_path / "pass", disk=tmp_path / "bank")
    assert finished["error of rows"] < 1e-6
    assert sorted(finished["read"]) == list(range(23))


def test_a_pass_is_not_saved_before_its_interval_ends(tmp_path):
    assert fill_scans(tmp_path, 17, save_seconds=600)["error"] == "OSError: image 17 is damaged"
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_loaders_whose_images_it_cannot_skip(tmp_path):
    bank, (encoder, loader) = new_bank(), encoder_and_loader()
    with pytest.raises(TypeError, match=r"loader: resume needs DataLoader\(IndexedDataset\(dataset\).*got list"):
        fill_bank(bank, encoder, list(loader), resume=tmp_path)
    with pytest.raises(TypeError, match="loader: .* got TensorDataset"):
        fill_bank(bank, encoder, DataLoader(loader.dataset.dataset), resume=tmp_path)  # type: ignore[attr-defined]
    batches = DataLoader(loader.dataset, batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(TypeError, match="loader: .* got one with a batch_sampler"):
        fill_bank(bank, encoder, batches, resume=tmp_path)
