"""Train a head on frozen features by one loss, and judge what it gives.

Shapes: B images of a batch, N training images, n images of a part, P values that come in, D that go out.
"""

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.aerial.training import NEIGHBOURS, pruned_share
from benchmarks.frozen.losses import AUDITED, make_criterion
from benchmarks.frozen.problem import Column, Problem, Source, audited, make_problem
from benchmarks.frozen.results import Run
from ntdne_kernels.experiments import evaluation

HIDDEN, D = 512, 128
B = 256
NOISE = 0.2  # standard deviation of what is added to the rows of a batch, whose own is 1


def carry_out(source: Source, epochs: int, run: Run) -> dict[str, Any]:
    """The row of a run: what it is, and its metrics, or under "failure" why there are none."""
    problem = make_problem(source, Column(run.noise, run.rate), run.seed)
    try:
        return run._asdict() | train(problem, run.method, run.lr, epochs, run.seed)
    except ValueError as error:  # that training diverges at a learning rate is a result
        return run._asdict() | {"failure": str(error)}


def train(problem: Problem, method: str, lr: float, epochs: int, seed: int) -> dict[str, float]:
    """Train a head and return its metrics.

    Returns:
        `loss`, mean of the last epoch; `pruned`, share of the training images; `seconds` of training; and `metrics`.

    Raises:
        ValueError: The loss is not finite.
    """
    loss_name, treatment = AUDITED.get(method, (method, None))
    given = problem.train, problem.train_given
    train_rows, labels = given if treatment is None else audited(problem, treatment)
    torch.manual_seed(seed)
    N, P = train_rows.shape
    head = nn.Sequential(
        *(nn.Linear(P, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, D))
    )
    order = torch.Generator().manual_seed(seed)  # of its own, so that all losses see the same batches and noise
    criterion = make_criterion(loss_name, labels, D)
    parameters = [*head.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4, nesterov=True, fused=True)
    steps = max(N // B, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)

    began = time.perf_counter()
    for epoch in range(epochs):
        criterion.set_epoch(epoch)
        losses = []
        for index in torch.randperm(N, generator=order)[: steps * B].split(B):
            rows = train_rows[index]
            features = head(rows + NOISE * torch.randn(rows.shape, generator=order))
            loss = criterion(features, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            criterion.update_bank(features, index)
            losses.append(loss.detach())
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise ValueError(f"{method}, lr {lr:g}: the loss is {mean_loss}: training diverged")
    trained = time.perf_counter() - began
    return {
        "loss": mean_loss,
        "pruned": pruned_share(criterion),
        "seconds": trained,
        **metrics(head, problem, seed),
    }


@torch.no_grad()
def metrics(head: nn.Module, problem: Problem, seed: int) -> dict[str, float]:
    """K-NN, MAP@20 (hits), NMI and ACC of the test images by right labels, and what can be known without them.

    `knn_given` votes by the given labels of the training images. `held_out` is the K-NN accuracy of the validation
    images, with labels made wrong as those of the training images were, by the latter's given labels.
    """

    def unit(rows: Tensor) -> Tensor:
        features: Tensor = head.eval()(rows)
        return normalize(features, dim=1)

    train, validation, test = unit(problem.train), unit(problem.validation), unit(problem.test)
    knn = partial(evaluation.knn_accuracy, K=min(NEIGHBOURS, len(train)))
    maps = evaluation.mean_average_precision(test, problem.test_labels, train, problem.train_labels)
    nmi, acc = evaluation.clustering(test, problem.test_labels, seed)
    return {
        "knn": knn(test, problem.test_labels, train, problem.train_labels),
        "knn_given": knn(test, problem.test_labels, train, problem.train_given),
        "held_out": knn(validation, problem.validation_given, train, problem.train_given),
        "map20_hits": maps["hits"],
        "nmi": nmi,
        "acc": acc,
    }
