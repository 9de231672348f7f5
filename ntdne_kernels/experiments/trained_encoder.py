"""encoder.pt: a trained encoder in one file, with what is needed to use it.

Shapes: b images of H × W pixels in B bands, or b rows of F values; D features.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ntdne_kernels.experiments.encoders import for_encoder, make_encoder
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.images import resized
from ntdne_kernels.experiments.problem import Problem
from ntdne_kernels.experiments.samples import Normalisation, Normalise, transform
from ntdne_kernels.experiments.settings import Settings

ENCODER = "encoder.pt"
FORMAT = 1


class TrainedEncoder(nn.Module):
    """A trained encoder: features (b, F) of the network it was trained on, or images (b, B, H, W), to features (b, D).

    Features are given as they are: they are normalised here. Images are given as `transform` makes them. The result
    is not normalised to unit length.

    Attributes:
        network: the encoder without normalisation.
        name: of the network, see `make_encoder`.
        dim: D.
        normalisation: of the F values or B bands; `len(normalisation.mean)` is F or B.
        classes: names of the classes it was trained on.
        image_size: pixels a side of an image; None where it takes features.
        bands: of each image file, counted from 1, as `images.decode` takes them; () for all.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        normalisation: Normalisation,
        *,
        classes: Sequence[str] = (),
        image_size: int | None = None,
        bands: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.name, self.dim, self.normalisation = name, dim, normalisation
        self.classes, self.image_size, self.bands = list(classes), image_size, tuple(bands)
        self.normalise = Normalise(normalisation) if image_size is None else nn.Identity()
        self.network = make_encoder(name, dim, bands=len(normalisation.mean))

    def forward(self, batch: Tensor) -> Tensor:
        """Features (b, D), float32, of raw features (b, F) of any float dtype, or of images that `transform` made.

        Raises:
            ValueError: the batch has not the shape that the encoder was trained on.
        """
        values = len(self.normalisation.mean)
        if self.image_size is None:
            self._check(batch, batch.dim() == 2 and batch.size(1) == values, f"features of shape (b, {values})")
        else:
            of_images = batch.dim() == 4 and batch.size(1) == values
            self._check(batch, of_images, f"images of shape (b, {values}, H, W), as `transform` makes them")
        features: Tensor = self.network(for_encoder(self.normalise(batch)))
        return features.float()

    def transform(self, image: ArrayLike) -> Tensor:
        """An image (H, W, B) as `images.decode` gives it, or a picture of Pillow's, resized and normalised.

        Returns:
            (B, image_size, image_size) float32, one image of a batch.

        Raises:
            ValueError: the encoder takes features, or images of another number of bands.
        """
        pixels = np.asarray(image)
        if self.image_size is None:
            raise ValueError("transform: this encoder takes features, which it normalises by itself")
        values = len(self.normalisation.mean)
        if pixels.ndim != 3 or pixels.shape[2] != values:
            raise ValueError(f"image: expected shape (H, W, {values}), got {pixels.shape}")
        prepared: Tensor = transform(False, self.normalisation)(np.array(resized(pixels, self.image_size)))
        return prepared

    def _check(self, batch: Tensor, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"batch: expected {expected}, got shape {tuple(batch.shape)}")


def save_encoder(network: nn.Module, settings: Settings, problem: Problem, path: Path) -> None:
    """Write the encoder of a run as encoder.pt, whole or not at all."""
    saved = {
        "format": FORMAT,
        "name": settings.encoder,
        "dim": settings.dim,
        "normalisation": dataclasses.asdict(problem.normalisation),
        "classes": problem.classes,
        "image_size": None if problem.archive.of_features else settings.image_size,
        "bands": settings.bands,
        "state_dict": {key: value.cpu() for key, value in network.state_dict().items()},
    }
    write_whole(path, lambda file: torch.save(saved, file))


def load_encoder(path: str | Path, device: str | torch.device = "cpu") -> TrainedEncoder:
    """The encoder of a finished run, in eval mode and without gradients.

        encoder = load_encoder("runs/features/uniform-0.5/NTDNE/seed-0")
        found = encoder(features)                   # raw features (b, F): a run on features

    and for a run on images, `decode` being that of `ntdne_kernels.experiments.images`:

        found = encoder(torch.stack([encoder.transform(decode(path, encoder.bands)) for path in paths]))

    Args:
        path: encoder.pt, or the folder of the run that wrote it.
        device: where it runs.

    Raises:
        ValueError: there is no such file, or it is no encoder.pt that can be read.
    """
    path = Path(path)
    path = path / ENCODER if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"encoder: {path} is no file; a finished run of ntdne train has an {ENCODER}")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if saved.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        state = saved.pop("state_dict")
        normalisation = Normalisation(**saved.pop("normalisation"))
        encoder = TrainedEncoder(saved.pop("name"), saved.pop("dim"), normalisation, **saved)
        encoder.network.load_state_dict(state)
    except Exception as error:  # torch.load raises exceptions of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"encoder: {path} is no {ENCODER} that can be read: {reason}") from None
    return encoder.to(device).eval().requires_grad_(False)
