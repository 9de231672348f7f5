"""Train an encoder by one method, and evaluate it every few epochs.

Shapes: B images of a batch, N training images, D features.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.aerial.images import Images
from benchmarks.aerial.losses import make_criterion
from benchmarks.aerial.results import IDENTITY, Row, append
from ntdne_kernels import NTDNELoss, functional
from ntdne_kernels.experiments import evaluation
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.losses import Criterion, TRNSLLoss
from ntdne_kernels.experiments.noise import dataset_of
from ntdne_kernels.experiments.problem import Problem, make_problem
from ntdne_kernels.experiments.settings import Settings

NEIGHBOURS = 10  # K of K-NN
ENCODED_AT_ONCE = 1024  # images, where no gradient is kept


class Plan(NamedTuple):
    """What all methods of a command share."""

    settings: Settings
    output: Path
    every: int
    """Epochs between evaluations."""
    device: str
    reference: bool
    """Losses with a bank are computed in b×N PyTorch, without kernels."""
    cache: Path | None
    """Folder for decoded images."""


class Run(NamedTuple):
    """A method with a learning rate."""

    method: str
    lr: float


def train(run: Run, plan: Plan) -> str:
    """Train and evaluate one method. Returns "", or why it failed."""
    try:
        problem = make_problem(plan.settings, plan.cache)
        identity = identify(run, plan.settings, problem)
        label = f"{run.method}, lr {run.lr:g}"
        for row in rows(run, plan, problem):
            append(plan.output, identity | row)
            print(
                f"{label}: epoch {row['epoch']}/{plan.settings.epochs}  loss {row['loss']:.4f}  "
                f"K-NN {100 * row['knn']:.1f} %  MAP@20 (hits) {100 * row['map20_hits']:.1f} %  "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
    except Exception as error:  # the other methods go on
        return f"{run.method}, lr {run.lr:g}: {type(error).__name__}: {error}"
    return ""


def identify(run: Run, settings: Settings, problem: Problem) -> Row:
    """The columns `IDENTITY` of a run."""
    known = {name: getattr(settings, name) for name in IDENTITY if hasattr(settings, name)}
    return known | {"dataset": dataset_of(problem.archive.classes) or problem.archive.name, **run._asdict()}


def rows(run: Run, plan: Plan, problem: Problem) -> Iterator[Row]:
    """A row for each epoch that is evaluated, which the last one always is.

    Raises:
        ValueError: The loss is not finite.
    """
    settings, device = plan.settings, plan.device
    images = Images(problem.archive.images, device)
    train_images, given = problem.train.to(device), problem.noisy.labels.to(device)
    N = len(given)
    B = min(settings.batch_size, N)
    steps = N // B

    torch.manual_seed(settings.seed)
    encoder = make_encoder(settings.encoder, settings.dim, settings.weights).to(device)
    criterion = make_criterion(run.method, problem.noisy.labels, settings.dim, plan.reference).to(device)
    parameters = [*encoder.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(
        parameters, run.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=settings.epochs * steps)

    trained = 0.0
    for epoch in range(settings.epochs):
        began = time.perf_counter()
        criterion.set_epoch(epoch)
        losses = []
        for index in torch.randperm(N, device=device)[: steps * B].split(B):
            pixels = images.batch(train_images[index], augment=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # many CPUs emulate it
                features = encoder(pixels).float()
            loss = criterion(features, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            criterion.update_bank(features, index)
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())  # waits for the device
        trained += time.perf_counter() - began
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss of epoch {epoch + 1} is {mean_loss}: training diverged; try a lower rate")
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % plan.every == 0:
            yield {
                "epoch": epoch + 1,
                "loss": mean_loss,
                "pruned": pruned_share(criterion),
                **metrics(encoder, images, problem, settings.seed, plan, last),
                "seconds": trained,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
            }


def pruned_share(criterion: Criterion) -> float:
    """The share of training images that no longer train the encoder."""
    if isinstance(criterion, TRNSLLoss):
        return criterion.truncated_share
    if isinstance(criterion, NTDNELoss) and criterion.pruning:
        return float(criterion.pruned.float().mean())
    return 0.0


def metrics(encoder: nn.Module, images: Images, problem: Problem, seed: int, plan: Plan, last: bool) -> Row:
    """Metrics of the test images among the training images by right labels, as the experiments' `results.evaluate`.

    `knn_given` uses the given labels of the training images. `flip_auroc` says how well low leave-one-out scores find
    wrong labels.

    Args:
        encoder: In training mode, to which it returns.
        images: Of the archive.
        problem: The split and the labels.
        seed: Of the clustering.
        plan: Its device, and whether to use kernels.
        last: Whether this is the last epoch, which alone is clustered.
    """

    @torch.no_grad()
    def unit(positions: Tensor) -> Tensor:
        encoder.eval()
        parts = [
            encoder(images.batch(part, augment=False)) for part in positions.to(plan.device).split(ENCODED_AT_ONCE)
        ]
        encoder.train()
        return normalize(torch.cat(parts), dim=1)

    train, test = unit(problem.train), unit(problem.test)
    train_labels, test_labels = (problem.labels[part].to(plan.device) for part in (problem.train, problem.test))
    given, flipped = problem.noisy.labels.to(plan.device), problem.noisy.flipped
    knn = partial(evaluation.knn_accuracy, test, test_labels, train, K=min(NEIGHBOURS, len(train)))
    row = {"knn": knn(database_labels=train_labels), "knn_given": knn(database_labels=given)}
    maps = evaluation.mean_average_precision(test, test_labels, train, train_labels)
    row |= {f"map20_{normaliser}": value for normaliser, value in maps.items()}
    if 0 < int(flipped.sum()) < len(flipped):
        backend = "reference" if plan.reference else None
        own = torch.arange(len(train), device=plan.device)
        scores = functional.leave_one_out_log_scores(train, train, given, given, own, backend=backend)
        row["flip_auroc"] = float(roc_auc_score(flipped, -scores.cpu()))
    if last:
        row["nmi"], row["acc"] = evaluation.clustering(test, test_labels, seed)
    return row
