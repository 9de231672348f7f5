"""The networks that turn images, or the features of another network, into features.

Shapes: b images of B bands, or b rows of F values; D features.
"""

import math
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torchvision import models

HEADS = ("head", "linear")  # on features; the others take images
HIDDEN, DROPOUT = 512, 0.2


def make_encoder(name: str, dim: int, weights: str = "", bands: int = 3) -> nn.Module:
    """A network from images (b, B, H, W), or for a head from features (b, F), to features (b, D), not normalised.

    Args:
        name: resnet18 or resnet50 (He et al. 2016; the last layer is Linear(·, D), as in the authors' code), or small:
            three convolutions, for images of some 8 to 32 pixels. On features head, with one hidden layer of 512
            values, or linear.
        dim: D.
        weights: "" starts at random; "imagenet" downloads torchvision's weights for all but the last layer; else a file
            with a state dict: of this network, or of one whose last layer has another width. Weights for three bands
            serve any number, see `_for_bands`.
        bands: B, or F for a head.

    Raises:
        ValueError: the weights cannot be read or downloaded, or belong to another network.

    Example:
        >>> import torch
        >>> make_encoder("small", dim=16)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 16])
    """
    if name in ("small", *HEADS):
        if weights == "imagenet":
            raise ValueError(f"weights: imagenet weights exist for resnet18 and resnet50, not for {name}")
        encoder: nn.Module = {"small": _small, "head": _head, "linear": _linear}[name](dim, bands)
    else:
        resnet: models.ResNet = getattr(models, name)()
        if weights == "imagenet":
            resnet.load_state_dict(imagenet_weights(name))
        resnet.fc = nn.Linear(resnet.fc.in_features, dim)
        if bands != 3:
            colours = resnet.conv1.weight.detach()
            resnet.conv1 = nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
            if weights == "imagenet":
                resnet.conv1.weight.data = _for_bands(colours, bands)
            else:
                nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        encoder = resnet
    if weights not in ("", "imagenet"):
        _load(encoder, Path(weights))
    return encoder.to(memory_format=torch.channels_last)  # the memory format in which convolutions are fastest


def for_encoder(batch: Tensor) -> Tensor:
    """A batch as encoders take it fastest: images (b, B, H, W) channels last, features (b, F) as they are."""
    return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch


def _for_bands(colours: Tensor, bands: int) -> Tensor:
    """First weights (out, 3, ...) as weights for B bands (out, B, ...), as timm's adapt_input_conv makes them.

    They are repeated, and scaled so that B equal bands give the same output as three.
    """
    return colours.repeat(1, math.ceil(bands / 3), 1, 1)[:, :bands] * (3 / bands)


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """The state dict that torchvision offers for a classification network, from its cache or the network.

    Raises:
        ValueError: it is in neither.
    """
    weights = models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        if not file.exists():  # fails quickly, before torch prints that it downloads
            urlopen(weights.url, timeout=60).close()
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
        return state
    except (OSError, RuntimeError) as error:  # the latter: a broken download
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"weights: imagenet weights are neither at {file} nor can they be downloaded ({reason}); put "
            f"{file.name} there, or give a file with a state dict"
        ) from None


def _small(dim: int, bands: int) -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(bands, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, dim),
    )


def _head(dim: int, values: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(values, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, dim)
    )


def _linear(dim: int, values: int) -> nn.Module:
    return nn.Sequential(nn.Linear(values, dim))  # its weights are called 0.weight, as `_load` expects of a last layer


def _load(encoder: nn.Module, path: Path) -> None:
    """Load a state dict. A last layer of another width keeps its random weights; a first one of 3 bands is adapted."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises exceptions of many types
        reason = (
            str(error).partition(". ")[0] or type(error).__name__
        )  # the rest advises loading with code execution allowed
        raise ValueError(f"weights: {path} holds no state dict that can be read: {reason}") from None
    own = encoder.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        raise ValueError(f"weights: {path} is no state dict of this network")
    first = next(iter(own))
    if isinstance(state[first], Tensor) and state[first].dim() == 4 and state[first].size(1) == 3 != own[first].size(1):
        state[first] = _for_bands(state[first], own[first].shape[1])
    last = next(reversed(own)).rpartition(".")[0]
    fitting = {
        key: value for key, value in state.items() if value.shape == own[key].shape or not key.startswith(f"{last}.")
    }
    try:
        encoder.load_state_dict(own | fitting)
    except RuntimeError as error:
        raise ValueError(f"weights: {path} does not fit: {' '.join(str(error).split())}") from None
