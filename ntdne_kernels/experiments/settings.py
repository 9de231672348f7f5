"""The settings of a run, and the presets they start from."""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.loss_registry import LOSSES, loss_name

PRESETS = ("paper", "authors", "scratch", "features")
RATELESS = ("none", "matrix")  # noise that has no rate
SMALLEST_IMAGE = 4  # pixels: less would be pooled away by the encoders
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}


def _setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a run depends on. A run can be continued only with the same settings.

    `data` and each field's help are the arguments of `ntdne train`.

    Raises:
        ValueError: a value is outside its range or choices.
    """

    data: str
    labels: str = _setting(
        "",
        "of features: .npy, .npz, .parquet, .csv, .txt, .pt, .jsonl, or FiftyOne's samples.json; without it a column "
        "of the features' file, or labels.npy beside it. Of images: the labels.csv of ntdne relabel, or another list "
        "of path and label, where images that are not in it are left out; without it the folders",
    )
    features_column: str = _setting("", "of features: the column that holds them, where its name is not a usual one")
    label_column: str = _setting("", "the column of the labels, likewise")
    image_size: int = _setting(256, "images are resized to this many pixels squared")
    classes: tuple[str, ...] = _setting((), "keep only these classes")
    unseen_classes: int = _setting(
        0, "classes, drawn by the seed, kept out of training: for the few-shot and unknown-class tasks"
    )
    bands: tuple[int, ...] = _setting(
        (), "the bands of each file to take, counted from 1, as 4,3,2: each is standardised over the training images"
    )
    max_pixels: int = _setting(
        MAX_PIXELS,
        "files of more pixels count as unreadable, as one can be made to fill the memory; more admits scenes",
    )
    skip_unreadable: bool = _setting(False, "count and leave out images that cannot be read")
    split: str = _setting(
        "seeded", "70/10/20 of each class by the seed, or the authors' (with their flips)", ("seeded", "authors")
    )
    noise: str = _setting(
        "uniform", "how training labels are made wrong", ("none", "uniform", "label-dependent", "matrix")
    )
    rate: float = _setting(
        0.5, "noise rate η, the share of wrong labels, from 0 to 1, of uniform and label-dependent noise"
    )
    noise_file: str = _setting(
        "",
        "for label-dependent noise a YAML file of true class: wrong class (AID and NWPU-RESISC45 have the authors' map "
        "built in); for matrix noise a .csv or .npy file, rows P(given label | true class)",
    )
    draw: str = _setting(
        "multinomial", "draw each flip by itself, or exact counts in each class", ("multinomial", "exact")
    )
    loss: str = _setting("NTDNE", "the loss", tuple(LOSSES))
    loss_options: dict[str, Any] = field(default_factory=dict)
    encoder: str = _setting(
        "resnet18",
        "the network; small is for tiny images; on features head, with a hidden layer, or linear",
        ("resnet18", "resnet50", "small", "head", "linear"),
    )
    weights: str = _setting("", "imagenet (downloaded by torchvision), or a file with a state dict; else from scratch")
    dim: int = _setting(128, "D, values of a feature")
    epochs: int = _setting(100, "passes over the training images")
    batch_size: int = _setting(256, "images of a step")
    lr: float = _setting(0.01, "learning rate: the first one; the highest one of one-cycle")
    schedule: str = _setting("step", "of the learning rate", ("constant", "step", "one-cycle"))
    lr_step: int = _setting(30, "epochs between the falls of a step schedule")
    lr_decay: float = _setting(0.5, "factor of each fall")
    momentum: float = _setting(0.9, "of SGD, with Nesterov; one-cycle moves it from 0.95 to 0.85 and back instead")
    weight_decay: float = _setting(1e-4, "of SGD")
    augment: bool = _setting(True, "train on augmented images: grey, colour jitter, flip; or on features with noise")
    bank_dtype: str = _setting(
        "float32",
        "of the bank of NTDNE and SNCA; bfloat16 takes half the memory, and is the fastest on recent CPUs and GPUs",
        ("float32", "bfloat16", "float16"),
    )
    precision: str = _setting("32-true", "of the encoder, as Lightning names it", ("32-true", "bf16-mixed", "16-mixed"))
    seed: int = _setting(0, "of splits, flips, first weights, batches and augmentation")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            expected = type(setting.default) if setting.metadata else type(value)
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise ValueError(f"{setting.name}: expected {_TYPE_NAMES[expected]}, got {value!r}")
            if choices and value not in choices:
                raise ValueError(f"{setting.name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("dim", "epochs", "batch_size", "lr_step", "max_pixels"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        valid = all(type(band) is int and band >= 1 for band in self.bands)
        self._check("bands", valid, "whole numbers from 1, as 4,3,2")
        self._check("image_size", self.image_size >= SMALLEST_IMAGE, f"at least {SMALLEST_IMAGE}")
        for name in ("unseen_classes", "seed", "weight_decay"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "lr_decay"):
            self._check(name, getattr(self, name) > 0, "a positive number")
        self._check("rate", 0 <= self.rate <= 1, "a number from 0 to 1")
        if self.noise in RATELESS:
            object.__setattr__(self, "rate", 0.0)  # that of a preset would be recorded as if it counted
        self._check("momentum", 0 < self.momentum < 1, "a number between 0 and 1")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, one of PRESETS or a YAML file, with `losses`: options by loss's name.

    Raises:
        ValueError: there is no such preset or file, or it holds something else than settings.
    """
    path = Path(str(resources.files(__package__) / "presets" / f"{name}.yaml")) if name in PRESETS else Path(name)
    try:
        preset = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"preset: expected one of {', '.join(PRESETS)} or a YAML file, got {name!r} ({error.strerror})"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"preset: {path} is not YAML: {' '.join(str(error).split())}") from None
    known = {setting.name for setting in dataclasses.fields(Settings)} - {"data", "loss_options"} | {"losses"}
    if not isinstance(preset, dict) or not preset.keys() <= known:
        unknown = sorted(map(str, set(preset) - known)) if isinstance(preset, dict) else [type(preset).__name__]
        raise ValueError(f"preset: {path} has no use for {', '.join(unknown)}; settings are {', '.join(sorted(known))}")
    losses = preset.get("losses", {})
    if not isinstance(losses, dict) or not all(isinstance(options, dict) for options in losses.values()):
        raise ValueError(f"preset: expected losses in {path} as 'loss: {{option: value}}' for each")
    for name in ("classes", "bands"):
        if not isinstance(preset.get(name, []), list):
            raise ValueError(f"preset: expected a list of {name} in {path}, got {preset[name]!r}")
    return preset | {"losses": {loss_name(loss): options for loss, options in losses.items()}}
