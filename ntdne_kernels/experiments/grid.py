"""The runs that `ntdne train` and `ntdne reproduce` are asked for: their settings, variants and folders."""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ntdne_kernels.experiments.argument_types import parse_value
from ntdne_kernels.experiments.arguments import WORDS
from ntdne_kernels.experiments.features import features_file
from ntdne_kernels.experiments.loss_registry import loss_name
from ntdne_kernels.experiments.settings import RATELESS, Settings, read_preset

PAPER_RATES = [0.1, 0.3, 0.5, 0.7]


class PlannedRun(NamedTuple):
    """A run as the command line and its preset describe it."""

    settings: Settings
    variant: str
    """The options of its loss that the command line gives, as "k=auto"; "" for none."""

    @property
    def subfolder(self) -> Path:
        """NOISE-RATE/LOSS VARIANT/seed-SEED, in the folder of the archive's runs."""
        settings = self.settings
        noise = settings.noise if settings.noise in RATELESS else f"{settings.noise}-{settings.rate}"
        loss = f"{settings.loss} {self.variant}" if self.variant else settings.loss
        return Path(noise) / loss / f"seed-{settings.seed}"


def planned_run(
    arguments: argparse.Namespace, values: dict[str, Any] | None = None, options: dict[str, Any] | None = None
) -> PlannedRun:
    """The run that the arguments describe.

    Args:
        arguments: of the command; they take precedence over the preset.
        values: settings that take precedence over the arguments.
        options: options of the loss that take precedence over the arguments.

    Raises:
        ValueError: there is no such preset, loss or option, or a setting is bad.
    """
    preset = _preset(arguments)
    preset_options = preset.pop("losses")
    names = {setting.name for setting in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    merged = {"loss": "NTDNE"} | preset | given | (values or {})
    if "rate" in given:
        _check_rate("--rate", [merged.get("noise", Settings.noise)])
    merged["loss"] = loss_name(merged["loss"])
    merged["classes"] = tuple(map(str, merged.get("classes", ())))
    merged["bands"] = tuple(merged.get("bands", ()))
    for name in ("data", "labels", "weights", "noise_file"):  # absolute, so that a run is the same one from any folder
        path = merged.get(name)
        if path and path not in WORDS and Path(path).exists():
            merged[name] = str(Path(path).resolve())
    overrides = _loss_options(arguments, merged["loss"]) | (options or {})
    merged["loss_options"] = preset_options.get(merged["loss"], {}) | overrides
    variant = ", ".join(f"{name}={'none' if value is None else value}" for name, value in overrides.items())
    return PlannedRun(Settings(**merged), variant)


def planned_grid(arguments: argparse.Namespace) -> list[PlannedRun]:
    """A run for each combination of noise, rate, loss and seed; noise that has no rate comes once. Errors as above."""
    preset = _preset(arguments)
    losses = list(dict.fromkeys(map(loss_name, arguments.losses)))
    noises = arguments.noises or [preset.get("noise", "uniform")]
    rates = arguments.rates or ([preset["rate"]] if "rate" in preset else PAPER_RATES)
    seeds = [preset.get("seed", 0)] if arguments.seeds is None else arguments.seeds
    if arguments.rates:
        _check_rate("--rates", noises)
    if arguments.k and "NTDNE" not in losses:
        raise ValueError("--k: expected NTDNE among --losses, whose threshold it is")
    planned = {}
    for noise, rate, loss, seed in itertools.product(noises, rates, losses, seeds):
        values = {"loss": loss, "noise": noise, "rate": rate, "seed": seed}
        for options in [{"k": k} for k in arguments.k] if arguments.k and loss == "NTDNE" else [{}]:
            run = planned_run(arguments, values, options)
            planned[run.subfolder] = run
    return list(planned.values())


def _check_rate(argument: str, noises: Sequence[str]) -> None:
    """ValueError where a rate is given for noise that has none."""
    if all(noise in RATELESS for noise in noises):
        raise ValueError(f"{argument}: expected none with noise {' and '.join(noises)}, which has no rate")


def _preset(arguments: argparse.Namespace) -> dict[str, Any]:
    """The preset that is named, or the one that suits the archive."""
    return read_preset(arguments.preset or ("features" if features_file(arguments.data) else "paper"))


def _loss_options(arguments: argparse.Namespace, loss: str) -> dict[str, Any]:
    """What --loss-option gives a loss."""
    several = arguments.command == "reproduce"
    trained = list(map(loss_name, arguments.losses)) if several else [loss]
    options = {}
    for text in arguments.loss_option:
        name, equals, value = text.partition("=")
        owner, dot, option = name.rpartition(".")
        if not equals or (several and not dot):
            expected = "LOSS.NAME=VALUE, as NTDNE.k=auto" if several else "NAME=VALUE, as k=auto"
            raise ValueError(f"--loss-option: expected {expected}, got {text!r}")
        if dot and loss_name(owner) not in trained:
            raise ValueError(f"--loss-option: {text!r} is for {loss_name(owner)}, which is not trained here")
        if not dot or loss_name(owner) == loss:
            options[option] = parse_value(value)
    return options
