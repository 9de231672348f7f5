"""Samples: images of an archive, augmented and normalised into tensors, or rows of an archive of features.

Shapes: n images of H × W pixels in B bands, or n rows of F values; b of them in a batch.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from ntdne_kernels.experiments.archive import Archive

FEATURE_NOISE = 0.4  # in units of the features' deviation
JITTER = 0.4  # of contrast, brightness and colours, as in the authors' code
STATISTICS_CHUNK = 256  # images read at a time


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from the bands of an image, and what they are then divided by: B numbers each, or F.

    Integers are first divided by the largest value of their type, floats are not.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    floats: bool = False


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation(archive: Archive, index: Tensor, bands: Sequence[int] = ()) -> Normalisation:
    """ImageNet's for colours of 8 bits; of other images each band is standardised over some of them.

    Features are centred, and all are divided by one number, the root of their mean variance.

    Args:
        archive: where the images or features are; they are read in their order, part by part.
        index: (n,) the training images.
        bands: those chosen of the files; they may be others than red, green and blue.

    Raises:
        ValueError: a feature of these images is not finite in float32, or the features are all alike there.
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
        values = (read_rows(images, chunk) if archive.of_features else images[chunk.numpy()]).reshape(-1, B) - offset
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        count += len(values)
    mean = total / max(count, 1)
    deviation = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))  # rounding may make it negative
    if archive.of_features:
        # Not each by its own: that gives directions in which features hardly differ the weight of those that tell
        # classes apart. AID, EfficientNet-Lite0, half of the labels wrong, without noise on the features: K-NN of the
        # trained head 74.3 against 76.3 %.
        deviation = np.full(B, np.sqrt(np.square(deviation).mean()))
        if not deviation[0] >= np.finfo(np.float32).tiny:  # float64 has room for smaller ones, which would become 0
            raise ValueError(f"features: expected rows that differ in float32, got {len(index)} alike")
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


class Normalise(nn.Module):
    """Features (b, F) of any float dtype to float32, normalised as a `Normalisation` says."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(normalisation.mean), persistent=False)
        self.register_buffer("deviation", torch.tensor(normalisation.deviation), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features."""
        return (features.float() - self.mean) / self.deviation


def read_rows(features: NDArray[Any], index: Tensor) -> NDArray[np.float32]:
    """Rows (b, F) of features (N, F), float32; ValueError where a value is not finite in it, naming the row."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows: NDArray[np.float32] = np.asarray(features[index.numpy()], np.float32)
        total = rows.sum(dtype=np.float64)
    if not np.isfinite(total):  # a NaN or infinity stays one in the sum, and float64 has room
        row = int(index[np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]])
        raise ValueError(f"features: expected finite numbers of float32, got others in row {row}")
    return rows


def _mixed(seed: int, position: int) -> int:
    """One seed of two: PyTorch's generator takes only 32 bits, so they are mixed into as many."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


def _as_read(batch: Any) -> Any:
    return batch


class _ArchiveDataset(Dataset[Any]):
    """Some images of an archive, whose file the workers of a DataLoader share, however they are started."""

    collate: Any
    images: Any

    def __init__(self, archive: Archive, index: Tensor, labels: Tensor) -> None:
        if index.shape != labels.shape or index.dim() != 1:
            raise ValueError(
                f"labels: expected one for each image of the index, got shapes {tuple(labels.shape)} and "
                f"{tuple(index.shape)}"
            )
        N = len(archive.images)
        outside = index[(index < 0) | (index >= N)]
        if len(outside):
            raise ValueError(f"index: expected images of the archive, 0 to {N - 1}, got {int(outside[0])}")
        self.images, self.index, self.labels = archive.images, index, labels

    def __len__(self) -> int:
        return len(self.index)

    # Pickling a memory map would copy its bytes, so the file's name is pickled instead.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": getattr(self.images, "filename", self.images)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        images = state["images"]
        mapped = images if isinstance(images, np.ndarray) else np.load(images, mmap_mode="r")
        self.__dict__ = state | {"images": mapped}


class ImageDataset(_ArchiveDataset):
    """Some images of an archive: samples (image (B, H, W), label, position), the position counted in this dataset.

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
        super().__init__(archive, index, labels)
        self.transform = transform
        self.seed = seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        position = range(len(self))[position]
        image = np.array(self.images[int(self.index[position])])
        if self.seed is not None:
            torch.default_generator.manual_seed(_mixed(self.seed, position))
        return self.transform(image), int(self.labels[position]), position

    collate = staticmethod(default_collate)


class FeatureDataset(_ArchiveDataset):
    """Some rows of an archive of features: samples (features (F,), label, position), the position counted here.

    A batch is read at once, through `__getitems__`, which a DataLoader calls where there is one. Its rows lie anywhere
    in the file, so the system is told not to read ahead of them: what it would read would not be used.

    Args:
        archive: where the features are.
        index: (n,) rows of the archive, in the order of the dataset.
        labels: (n,) label of each of these.
        normalisation: of the features.
        seed: of the noise that is added to each batch, which depends on that and on the first of its positions, which
            no other batch of an epoch has; None adds none.
    """

    def __init__(
        self, archive: Archive, index: Tensor, labels: Tensor, normalisation: Normalisation, seed: int | None = None
    ) -> None:
        super().__init__(archive, index, labels)
        self.normalise = Normalise(normalisation)
        self.seed = seed
        mapped = getattr(archive.images, "base", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        features, labels, positions = self.__getitems__([range(len(self))[position]])
        return features[0], labels[0], positions[0]

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: features (b, F), labels (b,), positions (b,)."""
        chosen = torch.tensor(positions)
        features = self.normalise(torch.from_numpy(read_rows(self.images, self.index[chosen])))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(_mixed(self.seed, positions[0]))
            features += FEATURE_NOISE * torch.randn(features.shape, generator=generator)
        return features, self.labels[chosen], chosen

    collate = staticmethod(_as_read)
