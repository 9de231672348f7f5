"""Archives other than the user's folders: those of libraries, scikit-learn's digits, made gratings."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from sklearn.datasets import load_digits

from ntdne_kernels.experiments import sources
from ntdne_kernels.experiments.archive import open_archive
from tests.experiments.helpers import complaint, write_archive

# Archives of libraries


def test_eurosat_is_read_where_torchvision_unpacks_it(cache):
    write_archive(cache / "datasets" / "eurosat" / "2750", {"AnnualCrop": 3, "SeaLake": 3})
    archive = open_archive("eurosat", 4, cache=cache)
    assert archive.name == "EuroSAT"
    assert archive.classes == ["AnnualCrop", "SeaLake"]
    assert archive.files[0] == "AnnualCrop/0.png"


def test_an_absent_eurosat_is_not_fetched_unasked(cache):
    assert complaint("eurosat", 4, cache=cache).startswith(
        f"eurosat is not in {cache}/datasets/eurosat/2750; --download fetches it (Dataset not found."
    )


def test_a_failing_download_is_one_line(cache, monkeypatch):
    def fail(root: Path, download: bool) -> None:
        raise OSError("no route\nto host" if download else "not asked")

    monkeypatch.setattr(sources, "EuroSAT", fail)
    message = complaint("eurosat", 4, cache=cache, download=True)
    assert message == f"eurosat is not in {cache}/datasets/eurosat/2750 (no route to host)"


def test_resisc45_asks_for_torchgeo_where_it_is_needed(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    assert "fetching it needs torchgeo (pip install torchgeo); or give the folder with its class folders" in complaint(
        "resisc45", 4, cache=cache, download=True
    )
    write_archive(cache / "datasets" / "NWPU-RESISC45", {"airplane": 3, "wetland": 3})
    assert open_archive("resisc45", 4, cache=cache).name == "NWPU-RESISC45"


def test_resisc45_is_fetched_by_torchgeo(cache, monkeypatch):
    class RESISC45:
        def __init__(self, root: Path, split: str = "train", download: bool = False, checksum: bool = False) -> None:
            if not download:
                raise LookupError("Dataset not found\nin `root`.")
            assert checksum
            write_archive(root / "NWPU-RESISC45", {"airplane": 3, "wetland": 4})

    torchgeo, datasets = ModuleType("torchgeo"), ModuleType("torchgeo.datasets")
    datasets.RESISC45 = RESISC45  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchgeo", torchgeo)
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", datasets)
    assert "; --download fetches it (Dataset not found in `root`.)" in complaint("resisc45", 4, cache=cache)
    archive = open_archive("resisc45", 4, cache=cache, download=True)
    assert archive.classes == ["airplane", "wetland"]
    assert archive.labels.tolist() == [0] * 3 + [1] * 4


def test_digits_are_scikit_learns_class_by_class(cache):
    archive = open_archive("digits", 8, cache=cache)
    digits = load_digits()
    assert archive.name == "digits"
    assert archive.classes == list("0123456789")
    assert len(archive.files) == len(set(archive.files)) == 1797
    assert archive.labels.tolist() == sorted(digits.target.tolist())
    for i in range(0, 1797, 100):
        number = int(archive.files[i].removeprefix("digit "))
        assert digits.target[number] == archive.labels[i]
        expected = np.round(digits.images[number] * 255 / 16)[..., None].repeat(3, axis=2)
        assert (archive.images[i] == expected).all()


def test_digits_3_and_8(cache):
    archive = open_archive("digits", 16, cache=cache, classes=["8", "3"])
    assert archive.classes == ["3", "8"]
    assert archive.images.shape == (183 + 174, 16, 16, 3)
    assert archive.labels.tolist() == [0] * 183 + [1] * 174


# Made archives


def test_made_archives_have_the_size_and_classes_they_are_asked_for(cache):
    archive = open_archive("made:50x4", 16, cache=cache)
    assert archive.images.shape == (50, 16, 16, 3)
    assert archive.labels.tolist() == [0] * 13 + [1] * 13 + [2] * 12 + [3] * 12
    assert archive.classes == ["0", "1", "2", "3"]
    assert archive.files == [""] * 50
    assert open_archive("made:50", 16, cache=cache).classes == list("0123456789")
    assert open_archive("made:50x12", 16, cache=cache).classes == [f"{c:02}" for c in range(12)]


def test_made_images_are_the_same_every_time_and_in_every_larger_archive(tmp_path):
    first = open_archive("made:190x2", 16, cache=tmp_path / "1")
    again = open_archive("made:190x2", 16, cache=tmp_path / "2")
    larger = open_archive("made:300x2", 16, cache=tmp_path / "1")
    one = open_archive("made:190x3", 16, cache=tmp_path / "1", classes=["0", "2"])
    assert (first.images == again.images).all()
    for c in (0, 1):
        few, many = first.images[first.labels == c], larger.images[larger.labels == c]
        assert len(few) == 95  # more than are drawn at a time
        assert (few == many[:95]).all()
    whole = open_archive("made:190x3", 16, cache=tmp_path / "1")
    assert (one.images[one.labels == 1] == whole.images[whole.labels == 2]).all()


def test_no_two_made_images_are_equal(cache):
    images = open_archive("made:300x3", 8, cache=cache).images
    assert len(np.unique(images.reshape(300, -1), axis=0)) == 300


def test_made_classes_differ_in_orientation_and_frequency(cache):
    archive = open_archive("made:400x4", 32, cache=cache)
    waves = np.abs(np.fft.fft2(archive.images.mean(-1) - archive.images.mean((1, 2, 3))[:, None, None]))
    y, x = np.divmod(waves[:, :17].reshape(400, -1).argmax(1), 32)  # the strongest wave; the other half mirrors it
    steep, fine = np.arctan2(y, x) > np.pi / 4, np.hypot(x, y) > 4  # frequencies are 2 to 8
    assert (
        steep + 2 * fine == archive.labels.numpy()
    ).mean() > 0.8  # not 1: cells touch, and frequencies are rounded to whole waves
