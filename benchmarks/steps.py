"""What surrounds the loss: the update of the bank, and a whole training step of ResNet18.

Shapes: B queries, N bank rows, D features, C classes.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.problems import SIGMA, Problem, Q
from benchmarks.providers import Outputs, Provider, Run, naive
from ntdne_kernels import NTDNELoss

MOMENTUM = 0.5
BATCHES = 20
"""Of an update that are made in turns: a replay of as many finds none of its rows in the cache, but of small banks."""
PIXELS = {"cpu": 64, "cuda": 224}
"""Each side of the images that ResNet18 is trained on."""


def update(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> None:
    """Eq. 15 as one writes it in PyTorch: right as long as no index stands twice."""
    new = nn.functional.normalize(features, dim=1)
    blend = torch.lerp(new, bank.index_select(0, index).to(new.dtype), momentum)
    bank.index_copy_(0, index, nn.functional.normalize(blend, dim=1).to(bank.dtype))


def _update(function: Callable[..., None]) -> Provider:
    def prepare(problem: Problem, gradient: bool) -> Run:
        N = len(problem.bank)
        features = problem.features.detach()
        batches = itertools.cycle(
            [problem.index, *((problem.index + turn * (N // BATCHES)) % N for turn in range(1, BATCHES))]
        )

        def run() -> Outputs:
            index = next(batches)
            with torch.no_grad():
                function(problem.bank, features, index, MOMENTUM)
            return ()

        return run

    return Provider("update", prepare)


UPDATES = {
    "PyTorch": _update(update),
    "PyTorch, compiled": Provider(
        "update", lambda *given: _update(torch.compile(update, dynamic=False)).prepare(*given)
    ),
    "ours": _update(torch.ops.ntdne_kernels.update_bank_),
}


Head = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None], int]
"""The loss of the encoder's outputs, what follows the step of the optimiser, and how many outputs there are."""


def _training(head: Callable[[Problem], Head]) -> Provider:
    """Forward, backward, SGD and what follows it, of images that never change, in bfloat16 autocast."""

    def prepare(problem: Problem, gradient: bool) -> Run:
        from torchvision.models import resnet18

        device = problem.bank.device.type
        loss, after, outputs = head(problem)
        torch.manual_seed(0)  # the same weights and images for every loss
        encoder = resnet18(num_classes=outputs).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9)
        images = torch.randn(len(problem.features), 3, PIXELS[device], PIXELS[device], device=device)
        images = images.to(memory_format=torch.channels_last)

        def run() -> Outputs:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                features = encoder(images)
            value = loss(features)
            value.backward()
            optimizer.step()
            after(features.detach())
            return (value.detach(),)

        return run

    return Provider("training", prepare)


def _cross_entropy(problem: Problem) -> Head:
    classes = len(problem.classes.classes)
    return lambda outputs: nn.functional.cross_entropy(outputs.float(), problem.labels), lambda outputs: None, classes


def _naive(problem: Problem) -> Head:
    def loss(features: Tensor) -> Tensor:
        return naive(problem._replace(features=nn.functional.normalize(features.float(), dim=1)))

    def after(features: Tensor) -> None:
        update(problem.bank, features.float(), problem.index, MOMENTUM)

    return loss, after, problem.bank.size(1)


def _ours(problem: Problem) -> Head:
    bank = problem.bank
    criterion = NTDNELoss(
        problem.bank_labels,
        bank.size(1),
        sigma=SIGMA,
        q=Q,
        k=None,
        momentum=MOMENTUM,
        device=bank.device,
        dtype=bank.dtype,
    )
    criterion.memory.storage.copy_(bank)
    return (
        lambda features: criterion(features, problem.index),
        lambda features: criterion.update_bank(features, problem.index),
        bank.size(1),
    )


TRAINING = {"cross-entropy": _training(_cross_entropy), "naive": _training(_naive), "ours": _training(_ours)}
