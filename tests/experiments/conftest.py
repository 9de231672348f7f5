"""Tiny archives, and the command as a person would give it."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ntdne_kernels.experiments import cli

QUICK = ["--preset", "scratch", "--encoder", "small", "--image-size", "8", "--epochs", "2", "--batch-size", "16"]
QUICK += ["--split", "seeded", "--precision", "32-true", "--no-augment"]


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
    """A folder of two class folders with 20 TIFFs each, of 5 bands in 12 of 16 bits; the fourth tells the classes."""
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
