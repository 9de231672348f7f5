"""A run in its folder, where it is trained, continued and evaluated.

{output}/settings.yaml   what the run is; the folder is refused to other runs
{output}/last.ckpt       after each epoch
{output}/results.json    when it is finished, with figures.npz and encoder.pt
"""

import dataclasses
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ntdne_kernels.experiments import results
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.files import locked, write_whole
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.samples import IMAGENET, Normalisation
from ntdne_kernels.experiments.settings import RATELESS, Settings
from ntdne_kernels.experiments.training import CHECKPOINT, train

SETTINGS = "settings.yaml"


@dataclass(frozen=True)
class Machine:
    """What a run needs of the machine; its result should not depend on it.

    Attributes:
        cache: folder of decoded images; None: in the user's cache folder.
        download: let torchvision or torchgeo download an archive.
        workers: processes that load images for each device.
        accelerator: "auto", "cpu" or "gpu".
        devices: GPUs or processes to train on.
        storage: where the bank lives, see `train`.
    """

    cache: Path | None = None
    download: bool = False
    workers: int = 0
    accelerator: str = "auto"
    devices: int = 1
    storage: str = "device"

    @property
    def evaluation_device(self) -> str:
        """The device that features are computed on: "cuda" or "cpu"."""
        return "cuda" if self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def run(settings: Settings, variant: str, folder: Path, machine: Machine) -> dict[str, Any] | None:
    """Train and evaluate a run, from where it was stopped.

    Args:
        settings: what the run is.
        variant: what reports call a run that differs from the preset by options of its loss, as "k=auto".
        folder: of the run.
        machine: where it takes place.

    Returns:
        The results; None in processes of devices other than the first.

    Raises:
        ValueError: the folder holds another run, or one of other images or labels than the archive has now, a setting
            does not fit the archive, or another process trains there.
    """
    finished = finished_results(settings, folder)
    if finished is not None:
        check_unchanged([(settings, folder)], machine)
        return finished
    first = getattr(rank_zero_only, "rank", 0) == 0  # the other ranks are of the same run
    with locked(folder) if first else nullcontext():
        problem = make_problem(settings, machine.cache, machine.download)
        _announce(settings, variant, folder)
        _print(problem.archive.notes)
        trained = train(
            settings,
            problem,
            folder,
            workers=machine.workers,
            accelerator=machine.accelerator,
            devices=machine.devices,
            storage=machine.storage,
        )
        if trained is None:
            return None
        device = machine.evaluation_device
        return results.evaluate(
            trained.encoder, settings, problem, trained.history, folder, variant=variant, device=device
        )


def evaluate(folder: Path, machine: Machine) -> dict[str, Any]:
    """Evaluate once more the encoder of a run, as far as it is trained.

    Raises:
        ValueError: the folder holds no trained run, or the archive is not the one that it was trained on.
    """
    settings, variant, encoder, history, _ = trained(folder)
    problem = make_problem(settings, machine.cache, machine.download)
    _check_problem(folder, settings, problem.fingerprint)
    return results.evaluate(
        encoder, settings, problem, history, folder, variant=variant, device=machine.evaluation_device
    )


def check_unchanged(finished: Iterable[tuple[Settings, Path]], machine: Machine) -> None:
    """Check that finished runs, given with their folders, were trained on what their settings name now.

    Raises:
        ValueError: one was trained on other images or labels.
    """
    fingerprints: dict[str, str] = {}  # the losses of a table share a problem
    for settings, folder in finished:
        shared = repr(dataclasses.replace(settings, loss=Settings.loss, loss_options={}))
        if shared not in fingerprints:
            fingerprints[shared] = make_problem(settings, machine.cache, machine.download).fingerprint
        _check_problem(folder, settings, fingerprints[shared])


def _check_problem(folder: Path, settings: Settings, fingerprint: str) -> None:
    """ValueError where the run in a folder was trained on another problem than the one with the fingerprint."""
    saved = torch.load(folder / CHECKPOINT, map_location="cpu", mmap=True, weights_only=True)
    if saved["problem"] != fingerprint:
        raise ValueError(
            f"run: {folder} had other images or given labels than {settings.data} has now; give another --output"
        )


class TrainedRun(NamedTuple):
    """What a run has left in its folder, as far as it is trained."""

    settings: Settings
    variant: str
    encoder: nn.Module
    history: list[dict[str, float]]
    """A row of metrics for each epoch."""
    normalisation: Normalisation


def trained(folder: Path) -> TrainedRun:
    """The run in a folder, as far as it is trained.

    Raises:
        ValueError: the folder holds no trained run, or a file of it is broken.
    """
    settings, variant = read_settings(folder)
    path = folder / CHECKPOINT
    if not path.exists():
        raise ValueError(f"run: {folder} has no {CHECKPOINT}: not one epoch was finished")
    prefix = "encoder."
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
        bands = Normalisation(**checkpoint["normalisation"]) if "normalisation" in checkpoint else IMAGENET
        encoder = make_encoder(settings.encoder, settings.dim, bands=len(bands.mean))
        encoder.load_state_dict({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
        return TrainedRun(settings, variant, encoder, checkpoint["history"], bands)
    except Exception as error:  # torch.load raises exceptions of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"run: {path} is no checkpoint of this run that can be read: {reason}") from None


def finished_results(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The results of this run, or None where it is not finished; ValueError where the folder holds another run."""
    if not (folder / CHECKPOINT).exists():
        return None
    there, _ = read_settings(folder)
    differing = [
        f"{name} {getattr(there, name)!r} there, {value!r} now"
        for name, value in vars(settings).items()
        if getattr(there, name) != value
    ]
    if differing:
        raise ValueError(f"output: {folder} holds another run ({'; '.join(differing)}); give another --output")
    path = folder / results.RESULTS
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found if len(found["history"]) == settings.epochs else None


@rank_zero_only
def _announce(settings: Settings, variant: str, folder: Path) -> None:
    """Write settings.yaml, and print what the run is."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(settings) | {"variant": variant}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_whole(folder / SETTINGS, lambda file: file.write(text.encode()))
    loss = f"{settings.loss} ({variant})" if variant else settings.loss
    noise = settings.noise if settings.noise in RATELESS else f"{settings.noise} at rate {settings.rate}"
    noise += " (labels are used as they are, and metrics are by them)" if noise == "none" else ""
    print(f"{folder}: {loss}, noise {noise}, seed {settings.seed}, {settings.epochs} epochs", flush=True)


@rank_zero_only
def _print(text: str) -> None:
    if text:
        print(text, flush=True)


def read_settings(folder: Path) -> tuple[Settings, str]:
    """The settings of the run in a folder, and its variant.

    Raises:
        ValueError: there is no run, or its file of settings is broken.
    """
    try:
        values = yaml.safe_load((folder / SETTINGS).read_bytes())
        variant = values.pop("variant")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Settings(**values | lists), variant
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"run: {folder} is no folder of a run: {error}") from None
