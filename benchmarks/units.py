"""Which constant to divide NTDNE by: training on archives of many and of uneven classes, and from random weights.

    python -m benchmarks.units --archive "mixture 300" --unit none images own --lr 0.01 0.03 0.1 --output units.csv
    python -m benchmarks.units --archive AID --rate 0.5 --sigma 0.05 0.1 0.2 --features FOLDER --output units.csv

NTDNE's gradient is SNCA's times p^q, and in a new bank p is near c, the share of the image's class. Divided by a unit
near c^q it begins at SNCA's size. Each combination of the options trains a head (digits: an encoder from random
weights) on wrong labels and adds a row to the file; those that the file has are skipped.

Shapes: N training images, M test images, C classes, D features.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.aerial.losses import CrossEntropyLoss
from ntdne_kernels import NTDNELoss
from ntdne_kernels.experiments.evaluation import knn_predict
from ntdne_kernels.experiments.losses import Criterion
from ntdne_kernels.experiments.noise import corrupt

D, BATCH, NEIGHBOURS = 32, 128, 10
MEASURES = ("knn", "knn_classes", "pruned", "median_p", "steepest", "seconds")
MOST = 30  # classes: with more of them a bounded unit is that of so many even ones


def of_images(c: Tensor, q: float) -> Tensor:
    """The mean of c^q over the images, from the shares c (C,) of the classes."""
    return (c * c**q).sum()


UNITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda c, q: torch.ones_like(c),
    "images": lambda c, q: of_images(c, q).expand_as(c),
    "classes": lambda c, q: (c**q).mean().expand_as(c),
    "root": lambda c, q: (c * c ** (q / 2)).sum().expand_as(c),
    "at least 30 classes": lambda c, q: of_images(c, q).clamp(min=MOST**-q).expand_as(c),
    "own": lambda c, q: c**q,
    "own, at least 30 classes": lambda c, q: c.clamp(min=1 / MOST) ** q,
    "own, mean of 30 classes": lambda c, q: c**q * (MOST**-q / of_images(c, q)).clamp(min=1),
}
"""The unit of each class (C,), from the shares (C,) of the classes in the archive, and q."""


class Run(NamedTuple):
    """A training. Cross-entropy ignores what only NTDNE has."""

    archive: str = "mixture 30"  # kind, classes, and "tail" where their sizes fall geometrically
    noise: str = "uniform"  # "shares": wrong labels are drawn by the shares of the classes
    rate: float = 0.3
    seed: int = 0
    method: str = "NTDNE"
    lr: float = 0.01
    unit: str = "images"
    q: float = 0.7
    k: str = "auto"  # or a number
    warmup: int = 0
    sigma: float = 0.1
    momentum: float = 0.5
    start: str = "random"  # of the bank; "filled": with the features of the untrained encoder
    epochs: int = 20


class Archive(NamedTuple):
    """Training and test images with right labels; the test images have even classes."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def sizes(C: int, largest: int, smallest: int) -> Tensor:
    """(C,) sizes of classes, falling geometrically."""
    return torch.logspace(np.log10(largest), np.log10(smallest), C).round().long()


def mixture(counts: Tensor, distance: float) -> Archive:
    """Normal clouds in 64 dimensions. Their C means lie on a sphere in the first 32, and the others are noise."""
    generator, C = torch.Generator().manual_seed(0), len(counts)
    means = distance * normalize(torch.randn(C, 32, generator=generator), dim=1)

    def draw(labels: Tensor) -> Tensor:
        images = torch.randn(len(labels), 64, generator=generator)
        images[:, :32] += means[labels]
        return images

    labels, test_labels = torch.arange(C).repeat_interleave(counts), torch.arange(C).repeat(-(-3000 // C))
    return Archive(draw(labels), labels, draw(test_labels), test_labels)


@functools.cache
def aid(folder: Path) -> Archive:
    """Features (10,000, 1280) of a pretrained network, by PCA to 256: features.npy and labels.npy of a folder."""
    features, labels = np.load(folder / "features.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    split = train_test_split(np.arange(len(labels)), train_size=4000, test_size=3000, stratify=labels, random_state=0)
    pca = PCA(256, random_state=0).fit(features[split[0]])
    train, test = (torch.tensor(pca.transform(features[part]), dtype=torch.float32) for part in split)
    scale = train.std()
    return Archive(train / scale, torch.tensor(labels[split[0]]), test / scale, torch.tensor(labels[split[1]]))


def first_of_classes(archive: Archive, counts: Tensor) -> Archive:
    """The first images of each class, as many as `counts` (C,) says."""
    rows = torch.cat([(archive.labels == label).nonzero()[:count, 0] for label, count in enumerate(counts.tolist())])
    return archive._replace(train=archive.train[rows], labels=archive.labels[rows])


def digits(_: Path) -> Archive:
    """1,437 scans of handwritten digits to train on and 360 others."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Archive(images[train], labels[train], images[test], labels[test])


ARCHIVES: dict[str, Callable[[Path], Archive]] = {
    "mixture 30": lambda _: mixture(sizes(30, 100, 100), 3.5),
    "mixture 300": lambda _: mixture(sizes(300, 10, 10), 6.0),
    "mixture 1000": lambda _: mixture(sizes(1000, 6, 6), 7.0),
    "mixture 30 tail": lambda _: mixture(sizes(30, 500, 10), 3.5),
    "mixture 300 tail": lambda _: mixture(sizes(300, 50, 2), 6.0),
    "AID": aid,
    "AID tail": lambda folder: first_of_classes(aid(folder), sizes(30, 150, 10)),
    "digits": digits,
}


def given_labels(labels: Tensor, run: Run) -> Tensor:
    """(N,) with a share of wrong labels."""
    shares = labels.bincount().double() / len(labels)
    others = (torch.ones_like(shares) if run.noise == "uniform" else shares).repeat(len(shares), 1)
    others = others.fill_diagonal_(0) / others.fill_diagonal_(0).sum(1, keepdim=True)
    matrix = run.rate * others + (1 - run.rate) * torch.eye(len(shares))
    return corrupt(labels, matrix, run.seed).labels


def make_encoder(archive: Archive) -> nn.Module:
    """A head for vectors, three convolutions for scans."""
    if archive.train.dim() == 2:
        return nn.Sequential(
            *(nn.Linear(archive.train.size(1), 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2)),
            nn.Linear(256, D),
        )
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, D)),
    )


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """(N, D) unit features in evaluation mode."""
    encoder.eval()
    features = torch.cat([encoder(part) for part in images.split(2048)])
    encoder.train()
    return normalize(features, dim=1)


def train(run: Run, archive: Archive) -> dict[str, float]:
    """Train, then classify the test images by their neighbours' right labels.

    Returns:
        knn: accuracy in % where test images come by the shares of the training classes; knn_classes: its mean over the
        classes; pruned: share of the training images; median_p: the median score; steepest: a batch's largest gradient
        by the unit features, over the median of the first epoch; seconds. All NaN where the training diverged.
    """
    given = given_labels(archive.labels, run)
    torch.manual_seed(run.seed)
    encoder = make_encoder(archive)
    criterion: Criterion = CrossEntropyLoss(given, D)
    if run.method == "NTDNE":
        criterion = NTDNELoss(
            given,
            D,
            sigma=run.sigma,
            q=run.q,
            k=run.k if run.k == "auto" else float(run.k),
            warmup_epochs=run.warmup,
            unit_slope=False,
            momentum=run.momentum,
            reduction="none",
        )
    shares = given.bincount(minlength=int(archive.labels.max()) + 1) / len(given)
    unit = UNITS[run.unit](shares, run.q)[given]
    if run.start == "filled" and isinstance(criterion, NTDNELoss):
        criterion.memory.update_(encode(encoder, archive.train), torch.arange(len(given)), momentum=0.0)
    steps = len(given) // BATCH
    parameters = [*encoder.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, run.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs * steps)
    norms, began = [], time.perf_counter()
    for epoch in range(run.epochs):
        criterion.set_epoch(epoch)
        for index in torch.randperm(len(given))[: steps * BATCH].split(BATCH):
            images = archive.train[index]
            # noise: the augmentation that features have
            features = encoder(images + 0.2 * torch.randn_like(images) if images.dim() == 2 else images)
            if not features.isfinite().all():
                return dict.fromkeys(MEASURES, math.nan)
            features.retain_grad()
            loss = criterion(features, index)
            loss = (loss / unit[index]).mean() if run.method == "NTDNE" else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            criterion.update_bank(features.detach(), index)
            norms.append((features.grad * features.detach().norm(dim=1, keepdim=True)).norm())
    seconds = time.perf_counter() - began
    found = knn_predict(encode(encoder, archive.test), encode(encoder, archive.train), archive.labels, K=NEIGHBOURS)
    right = (found == archive.test_labels).double()
    by_class = archive.test_labels.bincount(right) / archive.test_labels.bincount()
    log_p = criterion.memory.last_log_p if isinstance(criterion, NTDNELoss) else torch.tensor([torch.nan])
    found_measures = (
        100 * float((by_class * archive.labels.bincount() / len(given)).sum()),
        100 * float(by_class.mean()),
        float(criterion.pruned.float().mean()) if isinstance(criterion, NTDNELoss) else 0.0,
        float(log_p.nanmedian().exp()),
        float(torch.stack(norms).max() / torch.stack(norms[:steps]).median()),
        seconds,
    )
    return dict(zip(MEASURES, found_measures, strict=True))


def main() -> None:
    """The command."""
    summary = (__doc__ or "").splitlines()[0]
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.units", description=summary, formatter_class=formatter)
    choices: dict[str, Iterable[str]] = {"archive": ARCHIVES, "unit": UNITS, "method": ("NTDNE", "cross-entropy")}
    choices |= {"noise": ("uniform", "shares"), "start": ("random", "filled")}
    for name, default in Run._field_defaults.items():
        allowed = choices.get(name)
        parser.add_argument(f"--{name}", type=type(default), choices=allowed, nargs="+", default=[default], help=" ")
    parser.add_argument("--features", type=Path, default=Path(), help="folder of AID's features.npy and labels.npy")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "units.csv", help=" ")
    given = parser.parse_args()
    torch.set_num_threads(1)
    written: Path = given.output
    known = pd.read_csv(written, dtype=str)[list(Run._fields)] if written.exists() else pd.DataFrame()
    finished = set(known.itertuples(index=False, name=None))
    for values in itertools.product(*(getattr(given, name) for name in Run._fields)):
        run = Run(*values)
        if tuple(f"{value:.5g}" if isinstance(value, float) else str(value) for value in run) in finished:
            continue
        row = run._asdict() | train(run, ARCHIVES[run.archive](given.features))
        pd.DataFrame([row]).to_csv(written, mode="a", header=not written.exists(), index=False, float_format="%.5g")
        print(f"{run}: K-NN {row['knn']:.1f} %, mean over the classes {row['knn_classes']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
