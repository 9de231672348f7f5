"""Providers of what surrounds the loss: the update of the bank, and a whole training step of ResNet18.

Shapes: B queries, N bank rows, D features, C classes.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contract import Call, Outputs, Provider
from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.providers import naive
from ntdne_kernels import NTDNELoss

MOMENTUM = 0.5
BATCHES = 20
"""An update takes so many batches in turn: a replay of all of them finds no row in the cache, if the bank is large."""
PIXELS = {"cpu": 64, "cuda": 224}
"""Side of the square images that ResNet18 is trained on."""


def update(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> None:
    """Eq. 15 as one writes it in PyTorch: right as long as no row stands twice in the index."""
    new = nn.functional.normalize(features, dim=1)
    blend = torch.lerp(new, bank.index_select(0, index).to(new.dtype), momentum)
    bank.index_copy_(0, index, nn.functional.normalize(blend, dim=1).to(bank.dtype))


def _update(function: Callable[..., None]) -> Provider:
    def prepare(problem: Problem, gradient: bool) -> Call:
        N = len(problem.bank)
        features = problem.features.detach()
        batches = itertools.cycle([(problem.index + turn * (N // BATCHES)) % N for turn in range(BATCHES)])

        def call() -> Outputs:
            index = next(batches)
            with torch.no_grad():
                function(problem.bank, features, index, MOMENTUM)
            return ()

        return call

    return Provider("update", prepare)


UPDATES = {
    "PyTorch": _update(update),
    "PyTorch, compiled": Provider(
        "update", lambda *given: _update(torch.compile(update, dynamic=False)).prepare(*given)
    ),
    "ours": _update(torch.ops.ntdne_kernels.update_bank_),
}


class Objective(NamedTuple):
    """What the encoder is trained with."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """Of the encoder's outputs, and the rows of the bank that the images have."""
    after: Callable[[Tensor, Tensor], None]
    """Follows the step of the optimiser, with the same; the outputs are detached."""
    outputs: int
    """Of the encoder, for each image."""


def learner(outputs: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """ResNet18 with the same weights for every loss, and its optimiser. Seeds PyTorch's generators."""
    from torchvision.models import resnet18  # of the training step alone

    torch.manual_seed(0)
    encoder = resnet18(num_classes=outputs).to(device, memory_format=torch.channels_last)
    return encoder, torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9)


def _training(objective: Callable[[Problem], Objective]) -> Provider:
    """Forward, backward, SGD and the update of the bank in bfloat16 autocast, on the same images in each step."""

    def prepare(problem: Problem, gradient: bool) -> Call:
        device = problem.bank.device.type
        loss, after, outputs = objective(problem)
        encoder, optimizer = learner(outputs, device)
        images = torch.randn(len(problem.features), 3, PIXELS[device], PIXELS[device], device=device)
        images = images.to(memory_format=torch.channels_last)

        def call() -> Outputs:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                features = encoder(images)
            value = loss(features, problem.index)
            value.backward()
            optimizer.step()
            after(features.detach(), problem.index)
            return (value.detach(),)

        return call

    return Provider("training", prepare)


def _cross_entropy(problem: Problem) -> Objective:
    def loss(outputs: Tensor, index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), problem.bank_labels[index])

    return Objective(loss, lambda outputs, index: None, len(problem.label_index.classes))


def _naive(problem: Problem) -> Objective:
    def loss(features: Tensor, index: Tensor) -> Tensor:
        unit = nn.functional.normalize(features.float(), dim=1)
        return naive(replace(problem, features=unit, labels=problem.bank_labels[index], index=index))

    def after(features: Tensor, index: Tensor) -> None:
        update(problem.bank, features.float(), index, MOMENTUM)

    return Objective(loss, after, problem.bank.size(1))


def _ours(problem: Problem) -> Objective:
    bank = problem.bank
    options: dict[str, Any] = {
        "sigma": SIGMA,
        "q": Q,
        "k": None,
        "unit_slope": False,  # as naive
        "momentum": MOMENTUM,
        "device": bank.device,
        "dtype": bank.dtype,
    }
    criterion = NTDNELoss(problem.bank_labels, bank.size(1), **options)
    criterion.memory.storage.copy_(bank)

    def loss(features: Tensor, index: Tensor) -> Tensor:
        value: Tensor = criterion(features, index)
        return value

    return Objective(loss, criterion.update_bank, bank.size(1))


OBJECTIVES = {"cross-entropy": _cross_entropy, "naive": _naive, "ours": _ours}
TRAINING = {name: _training(objective) for name, objective in OBJECTIVES.items()}
