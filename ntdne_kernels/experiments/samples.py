"""Samples: images of an archive, augmented and normalised into tensors.

Shapes: n images of H × W pixels in B bands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ntdne_kernels.experiments.archive import Archive

JITTER = 0.4  # of contrast, brightness and colours, as in the authors' code
STATISTICS_CHUNK = 256  # images read at a time


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from the bands of an image, and what they are then divided by: B numbers each.

    Integers are first divided by the largest value of their type, floats are not.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    floats: bool = False


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation(archive: Archive, index: Tensor, bands: Sequence[int] = ()) -> Normalisation:
    """ImageNet's for colours of 8 bits; for all else the one that standardises each band over some images.

    Args:
        archive: where the images are.
        index: (n,) images to standardise over: the training images.
        bands: those chosen of the files; they may be others than red, green and blue.
    """
    images = archive.images
    B = images.shape[-1]
    if images.dtype == np.uint8 and B == 3 and not bands:
        return IMAGENET
    largest = np.iinfo(images.dtype).max if images.dtype.kind == "u" else 1
    # Squares of large values would cancel a small deviation, so the first image's mean is subtracted before.
    offset = images[int(index[0])].reshape(-1, B).mean(axis=0, dtype=np.float64) if len(index) else np.zeros(B)
    total, squares, count = np.zeros(B), np.zeros(B), 0
    for chunk in index.sort().values.split(STATISTICS_CHUNK):
        values = images[chunk.numpy()].reshape(-1, B) - offset
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        count += len(values)
    mean = total / max(count, 1)
    deviation = np.sqrt(squares / max(count, 1) - mean**2)
    deviation = np.where(deviation > 0, deviation, largest)  # a band that is the same everywhere
    return Normalisation(
        tuple(map(float, (mean + offset) / largest)),
        tuple(map(float, deviation / largest)),
        images.dtype.kind == "f",
    )


def transform(augment: bool, normalisation: Normalisation = IMAGENET) -> v2.Compose:
    """From an image (H, W, B) of an archive to (B, H, W) float32, normalised.

    Colours of 8 bits are augmented as in the authors' code: made grey, jittered, mirrored. That is done on Pillow
    images, as there, which on a CPU is also faster than on tensors. Other bands have no hue or saturation in general:
    their contrast and brightness are jittered, and they are mirrored.
    """
    augment_colours = [
        Image.fromarray,
        v2.RandomGrayscale(p=0.2),
        v2.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER, hue=JITTER),
        v2.RandomHorizontalFlip(),
        np.array,
    ]
    augment_bands = [_jittered, v2.RandomHorizontalFlip()]
    colours = normalisation == IMAGENET
    return v2.Compose(
        [
            *(augment_colours if augment and colours else []),
            v2.ToImage(),
            v2.ToPureTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=normalisation.mean, std=normalisation.deviation),
            *(augment_bands if augment and not colours else []),
        ]
    )


def _jittered(image: Tensor) -> Tensor:
    """The image (B, H, W) with a random contrast and brightness, the same for all bands."""
    contrast, brightness = torch.empty(2).uniform_(-JITTER, JITTER)
    mean = image.mean(dim=(1, 2), keepdim=True)
    jittered: Tensor = mean + (1 + contrast) * (image - mean) + brightness
    return jittered


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Some images of an archive: samples (image (B, H, W), label, position), the position counted in this dataset.

    Workers of a DataLoader share the archive's file, however they are started.

    Args:
        archive: where the images are.
        index: (n,) images of the archive, in the order of the dataset.
        labels: (n,) label of each of these.
        transform: from an image (H, W, B) to (B, H, W), see `transform`.
        seed: of what the transform draws: with its position it decides on a sample, whichever process makes it. None
            leaves that to PyTorch's generator.

    Raises:
        ValueError: index and labels differ in length, or an image is not in the archive.
    """

    def __init__(
        self,
        archive: Archive,
        index: Tensor,
        labels: Tensor,
        transform: Callable[[NDArray[Any]], Tensor],
        seed: int | None = None,
    ) -> None:
        if index.shape != labels.shape or index.dim() != 1:
            raise ValueError(
                f"labels: expected one for each image of the index, got shapes {tuple(labels.shape)} and "
                f"{tuple(index.shape)}"
            )
        N = len(archive.images)
        outside = index[(index < 0) | (index >= N)]
        if len(outside):
            raise ValueError(f"index: expected images of the archive, 0 to {N - 1}, got {int(outside[0])}")
        self.images = archive.images
        self.index = index
        self.labels = labels
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        position = range(len(self))[position]
        image = np.array(self.images[int(self.index[position])])
        if self.seed is not None:
            # PyTorch's generator takes only 32 bits of a seed, so position and seed are mixed into as many.
            mixed = np.random.SeedSequence([self.seed, position]).generate_state(1)
            torch.default_generator.manual_seed(int(mixed[0]))
        return self.transform(image), int(self.labels[position]), position

    # Pickling a memory map would copy its bytes, so the file's name is pickled instead.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": self.images.filename}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"images": np.load(state["images"], mmap_mode="r")}
