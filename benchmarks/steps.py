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

    loss: Callable[[Tensor], Tensor]
    """Of the encoder's outputs."""
    after: Callable[[Tensor], None]
    """Follows the step of the optimiser, with the outputs, detached."""
    outputs: int
    """Of the encoder, for each image."""


def _training(objective: Callable[[Problem], Objective]) -> Provider:
    """Forward, backward, SGD and the update of the bank in bfloat16 autocast, on the same images in each step."""

    def prepare(problem: Problem, gradient: bool) -> Call:
        from torchvision.models import resnet18  # of the training step alone

        device = problem.bank.device.type
        loss, after, outputs = objective(problem)
        torch.manual_seed(0)  # the same weights and images for every loss
        encoder = resnet18(num_classes=outputs).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9)
        images = torch.randn(len(problem.features), 3, PIXELS[device], PIXELS[device], device=device)
        images = images.to(memory_format=torch.channels_last)

        def call() -> Outputs:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                features = encoder(images)
            value = loss(features)
            value.backward()
            optimizer.step()
            after(features.detach())
            return (value.detach(),)

        return call

    return Provider("training", prepare)


def _cross_entropy(problem: Problem) -> Objective:
    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), problem.labels)

    return Objective(loss, lambda outputs: None, len(problem.label_index.classes))


def _naive(problem: Problem) -> Objective:
    def loss(features: Tensor) -> Tensor:
        return naive(replace(problem, features=nn.functional.normalize(features.float(), dim=1)))

    def after(features: Tensor) -> None:
        update(problem.bank, features.float(), problem.index, MOMENTUM)

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

    def loss(features: Tensor) -> Tensor:
        value: Tensor = criterion(features, problem.index)
        return value

    return Objective(loss, lambda features: criterion.update_bank(features, problem.index), bank.size(1))


TRAINING = {"cross-entropy": _training(_cross_entropy), "naive": _training(_naive), "ours": _training(_ours)}
