"""An archive's images on a device, and their augmentation there, a batch at a time.

Shapes: B images of a batch of H × W pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


class Images:
    """An archive's images (n, H, W, 3) as bytes on a device."""

    def __init__(self, images: NDArray[np.uint8], device: str) -> None:
        self.bytes = torch.from_numpy(np.array(images)).to(device)
        self.mean, self.deviation = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, DEVIATION))

    def batch(self, index: Tensor, augment: bool) -> Tensor:
        """Normalised float32 images (B, 3, H, W) in the encoder's memory format."""
        pixels = self.bytes[index].permute(0, 3, 1, 2) / 255
        if augment:
            pixels = augmented(pixels)
        return ((pixels - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)


def augmented(pixels: Tensor) -> Tensor:
    """Augment images (B, 3, H, W) in [0, 1] as `archive.transform` does: grey, colour jitter, mirrored.

    Each image is drawn for on its own. Only the order of the four jitters is the same in the whole batch.
    """

    def drawn(low: float, high: float) -> Tensor:
        return torch.empty(len(pixels), 1, 1, 1, device=pixels.device).uniform_(low, high)

    pixels = torch.where(drawn(0, 1) < 0.2, rgb_to_grayscale(pixels, 3), pixels)
    jitters = [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.6, 1.4), (hue, -0.4, 0.4)]
    for i in torch.randperm(len(jitters)).tolist():
        jitter, low, high = jitters[i]
        pixels = jitter(pixels, drawn(low, high))
    return torch.where(drawn(0, 1) < 0.5, pixels.flip(3), pixels)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor."""
    return (pixels * factor).clamp(0, 1)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean grey."""
    mean = rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, factor).clamp(0, 1)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its own grey version."""
    return torch.lerp(rgb_to_grayscale(pixels), pixels, factor).clamp(0, 1)


def hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue (of HSV) by a share of the circle."""
    value = pixels.amax(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    sixths = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green),
    ) / torch.where(chroma > 0, chroma, 1)
    channel = torch.arange(5, 0, -2, device=pixels.device).view(3, 1, 1)
    angle = (channel + sixths + 6 * shift) % 6
    return value - chroma * torch.minimum(angle, 4 - angle).clamp(0, 1)
