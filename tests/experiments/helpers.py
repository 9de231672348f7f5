"""What several test modules of the experiments share: tiny archives, made-up runs, and quick settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from ntdne_kernels.experiments.archive import open_archive
from ntdne_kernels.experiments.sources import ArchiveError

QUICK = ["--preset", "scratch", "--encoder", "small", "--image-size", "8", "--epochs", "2", "--batch-size", "16"]
QUICK += ["--split", "seeded", "--precision", "32-true", "--no-augment"]
CLASSES = ["Airport", "Beach", "$Café_1$"]

# Archives


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> None:
    """An image whose pixels are all (value, value + 1, value + 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value + 1, value + 2)).save(path)


def write_archive(folder: Path, sizes: dict[str, int]) -> Path:
    """Class folders with files 0.png, 1.png …; each image has a value of its own."""
    value = 0
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True)
        for i in range(size):
            write_image(folder / name / f"{i}.png", value)
            value += 1
    return folder


def write_bands(folder: Path, bands: int = 13, dtype: type = np.uint16, each: int = 5) -> Path:
    """Class folders of TIFFs, whose band b of image i is about 100·b + i, up to 3,000."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = (100 * np.arange(bands) + i + np.arange(64).reshape(8, 8, 1)).astype(dtype)
            tifffile.imwrite(folder / name / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    return folder


def spoil(path: Path, how: str) -> str:
    """Make the file unreadable; returns why it now is."""
    if how == "text":
        path.write_bytes(b"no image")
        return "not an image"
    if how == "empty":
        path.write_bytes(b"")
        return "not an image"
    if how == "dangling":
        path.unlink()
        path.symlink_to("nowhere.png")
        return "No such file or directory"
    if how == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1000])
        return "image file is truncated"
    assert how == "deep"
    path.write_bytes(b"P6 4 2 65535\n" + bytes(48))
    return "Pillow would keep 8 of the 16 bits; PNG and TIFF are read whole (3 bands of 16 bits, 4 × 2 pixels)"


def complaint(*arguments: object, **options: object) -> str:
    with pytest.raises(ArchiveError) as caught:
        open_archive(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Runs


def results_of(folder: Path) -> dict[str, Any]:
    """What a run's results.json holds."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def write_run(
    root: Path,
    loss: str = "NTDNE",
    rate: float = 0.5,
    *,
    metrics: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write the files of a run whose numbers are random but plausible; those given replace them.

    `changes` may name another dataset, noise, variant or seed.
    """
    about = {"dataset": "AID", "noise": "uniform", "variant": "", "seed": 0} | changes
    dataset, noise, variant, seed = about.values()
    random = np.random.default_rng([seed, len(loss), len(variant), round(10 * rate)])
    folder = root / f"{dataset} {noise} {rate}".replace("/", "") / f"{loss} {variant}" / f"seed-{seed}"
    folder.mkdir(parents=True)
    epochs = (settings or {}).get("epochs", 2)
    names = ("knn", "knn_given", "knn_distance", "knn_softmax", "nmi", "acc")
    names += ("map20_total", "map20_hits", "map20_min", "flip_auroc")
    history: list[dict[str, float]] = [
        {"epoch": epoch, "loss": 1.0, "lr": 0.1, "val_knn": 0.2 + 0.1 * epoch, "val_knn_given": 0.1}
        for epoch in range(epochs)
    ]
    if loss.startswith("NTDNE"):
        for row in history:
            row |= {"p10": 0.1, "p25": 0.2, "p50": 0.4, "p75": 0.5, "p90": 0.7, "threshold": 0.3, "pruned_share": 0.25}
    N, M = 40, 12
    flipped = random.random(N) < rate
    flipped[:2] = False, True
    results = {
        "settings": {"epochs": epochs, "image_size": 64, "seed": seed, "noise": noise, "rate": rate, "loss": loss}
        | {"loss_options": {}}
        | (settings or {}),
        "loss": loss,
        "rate": rate,
        "epochs": epochs,
        "classes": CLASSES,
        "counts": {"train": N, "validation": 6, "test": M, "flipped": int(flipped.sum()), "skipped": 0},
        "metrics": dict(zip(names, random.random(len(names)), strict=True)) if metrics is None else metrics,
        "history": history,
        "seconds": 61.0,
        "versions": {"torch": "2.14.1"},
    } | about
    (folder / "results.json").write_text(json.dumps(results))
    labels = np.arange(M) % len(CLASSES)
    np.savez(
        folder / "figures.npz",
        **{
            "test_features": random.normal(size=(M, 8)).astype(np.float32),
            "test_labels": labels,
            "scores": random.random(N).astype(np.float32),
            "flipped": flipped,
            "pr_recall": np.linspace(0, 1, 101),
            "pr_precision": np.linspace(1, random.random(), 101),
            "retrieval_images": random.integers(256, size=(4, 6, 8, 8, 3), dtype=np.uint8),
            "retrieval_labels": random.integers(len(CLASSES), size=(4, 6)),
        }
        | (arrays or {}),
    )
    return folder


# Features


def write_features(each: int = 30, classes: tuple[str, ...] = ("lake", "pond")) -> np.ndarray:
    """features.npy, float16 in clusters, and labels.npy, names, in this folder; gives the features."""
    source = np.random.default_rng(0)
    codes = np.repeat(np.arange(len(classes)), each)
    features = np.eye(len(classes), 10)[codes] + 0.2 * source.standard_normal((len(codes), 10))
    np.save("features.npy", features.astype(np.float16))
    np.save("labels.npy", np.array(classes)[codes])
    return features.astype(np.float16)
