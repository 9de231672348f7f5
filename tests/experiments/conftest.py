"""Fixtures of the experiments: tiny archives, made-up runs and their report, and the command `ntdne`."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision import models

from ntdne_kernels.experiments import cli
from ntdne_kernels.experiments.archive import Archive, open_archive
from ntdne_kernels.experiments.report import write_report
from ntdne_kernels.experiments.sources import Decoding
from tests.experiments.helpers import write_archive, write_run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two class folders, bright and dark, with 20 pictures each."""
    source = np.random.default_rng(0)
    for name, low, high in (("bright", 120, 256), ("dark", 0, 136)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = source.integers(low, high, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02}.png")
    return tmp_path / "photos"


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of two class folders with 20 TIFFs each, of 5 bands of 16 bits; the fourth band tells the classes."""
    source = np.random.default_rng(0)
    for name, level in (("forest", 2500), ("water", 300)):
        (tmp_path / "scenes" / name).mkdir(parents=True)
        for i in range(20):
            pixels = source.integers(0, 1000, (10, 12, 5), dtype=np.uint16)
            pixels[..., 3] += np.uint16(level)
            path = tmp_path / "scenes" / name / f"{i:02}.tif"
            tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    return tmp_path / "scenes"


@pytest.fixture
def ntdne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command `ntdne`, in this process, in an empty folder and with an empty cache; gives its exit code."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> int:
        try:
            return cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return int(ended.code or 0)

    return run


@pytest.fixture(scope="session")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A state dict of a resnet18 with random weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(models.resnet18().state_dict(), path)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "scenes", {"Beach": 3, "Forest": 4})


@pytest.fixture
def archive(folder: Path, cache: Path) -> Archive:
    return open_archive(str(folder), 4, cache=cache)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded."""
    names: list[str] = []
    decode = Decoding.read

    def noting(decoding: Decoding, path: str) -> object:
        names.append(Path(path).name)
        return decode(decoding, path)

    monkeypatch.setattr(Decoding, "read", noting)
    return names


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two losses × two rates, a sweep of k at one of them, and a Siamese one of D = 2; a long name in each."""
    root = tmp_path_factory.mktemp("runs")
    everywhere = {"noise_file": "/a/folder/of_a_long_name/" * 5 + "noise.yaml"}
    for rate in (0.1, 0.5):
        write_run(root, "SNCA", rate, settings=everywhere)
        write_run(root, "NTDNE", rate, settings=everywhere | {"loss_options": {"k": 0.3}})
    for k in ("0.1", "0.2", "0.4", "auto", "none"):
        write_run(root, "NTDNE", 0.5, variant=f"k={k}", settings=everywhere)
    arrays = {"untrained_features": np.eye(12, 2), "test_features": np.random.default_rng(0).normal(size=(12, 2))}
    write_run(root, "Contrastive", 0.5, noise="none", dataset="digits", settings=everywhere, arrays=arrays)
    return root


@pytest.fixture(scope="session")
def report(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The folder of the grid's report, and its files."""
    output = tmp_path_factory.mktemp("report") / "of" / "runs"
    return output, write_report(grid, output)
