"""The results of a finished run: its metrics, and the data of its figures, on clean labels.

Shapes: N training images, M test images, D features, C classes.
"""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from tqdm import tqdm

import ntdne_kernels
from ntdne_kernels import NTDNELoss
from ntdne_kernels.experiments import evaluation, tasks
from ntdne_kernels.experiments.encoders import for_encoder, make_encoder
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.images import as_picture
from ntdne_kernels.experiments.noise import dataset_of
from ntdne_kernels.experiments.problem import MAX_DATABASE, Problem
from ntdne_kernels.experiments.samples import FeatureDataset, ImageDataset
from ntdne_kernels.experiments.settings import Settings
from ntdne_kernels.experiments.splits import stride
from ntdne_kernels.experiments.trained_encoder import ENCODER, save_encoder
from ntdne_kernels.experiments.training import NEIGHBOURS

RESULTS = "results.json"
FIGURES = "figures.npz"
FIGURE_POINTS = 2000  # of the t-SNE
RETRIEVAL_QUERIES = 6
MAX_SCORED = 50_000  # images whose leave-one-out scores are looked at, each among all
SCORED_AT_A_TIME = 1024
FEW_SHOT_QUERIES = 15  # of each class; a class needs as many images beside its examples


@torch.no_grad()
def embed(encoder: nn.Module, images: ImageDataset | FeatureDataset, batch_size: int, device: str) -> Tensor:
    """Features (len(images), D) of images, not normalised; float32, as the encoder evaluates."""
    encoder = encoder.to(device).eval()
    features = []
    batches = DataLoader(images, batch_size, collate_fn=images.collate)
    for pixels, _, _ in tqdm(batches, "Encoding images", unit="batch", leave=False, disable=None):
        features.append(encoder(for_encoder(pixels.to(device))).float())
    return torch.cat(features)


def leave_one_out_scores(features: Tensor, labels: Tensor, sigma: float = 0.1, most: int = MAX_SCORED) -> Tensor:
    """The score p of each image's label among all the others (eq. 4), from unit features (N, D).

    (N,), or of every s-th image where N is larger than `most`; see `splits.stride`.
    """
    criterion = NTDNELoss(labels.to(features.device), features.size(1), sigma=sigma, device=features.device).eval()
    index = torch.arange(len(features), device=features.device)
    criterion.memory.update_(features, index, momentum=0.0)
    scored = index[:: stride(len(features), most)].split(SCORED_AT_A_TIME)
    with torch.no_grad():
        return torch.cat([criterion(features[images], images, return_scores=True)[1] for images in scored])


def evaluate(
    encoder: nn.Module,
    settings: Settings,
    problem: Problem,
    history: list[dict[str, float]],
    folder: Path,
    *,
    variant: str,
    device: str,
) -> dict[str, Any]:
    """Evaluate a trained encoder; write results.json, figures.npz and encoder.pt into its folder.

    The database is the training set with its true labels, the queries are the test set (section IV-A). Of more than a
    million training images every n-th is in the database, of more than 10,000 test images every n-th is a query.

    Args:
        encoder: the trained network.
        settings: of the run.
        problem: of the run.
        history: a row of metrics for each epoch.
        folder: of the run.
        variant: what reports call a run that differs from the preset by options of its loss.
        device: where features are computed.

    Returns:
        What results.json holds.
    """
    batch = settings.batch_size

    def unit(images: Tensor) -> Tensor:
        return normalize(embed(encoder, problem.dataset(images), batch, device), dim=1)

    every = stride(len(problem.train), MAX_DATABASE)
    database, given, flipped = problem.train[::every], problem.noisy.labels[::every], problem.noisy.flipped[::every]
    train, test = unit(database), unit(problem.test)
    train_labels, test_labels = (problem.labels[images].to(device) for images in (database, problem.test))
    K = min(NEIGHBOURS, len(train))
    nmi, acc = evaluation.clustering(test, test_labels, settings.seed)
    scores = leave_one_out_scores(train, given).cpu()
    flipped = flipped[:: stride(len(flipped), MAX_SCORED)]
    metrics = {
        "knn": evaluation.knn_accuracy(test, test_labels, train, train_labels, K=K),
        "knn_distance": evaluation.knn_accuracy(test, test_labels, train, train_labels, "distance", K),
        "knn_softmax": evaluation.knn_accuracy(test, test_labels, train, train_labels, "softmax", K),
        "knn_given": evaluation.knn_accuracy(test, test_labels, train, given.to(device), K=K),
        "nmi": nmi,
        "acc": acc,
    }
    maps = evaluation.mean_average_precision(test, test_labels, train, train_labels, R=20)
    metrics |= {f"map20_{normaliser}": value for normaliser, value in maps.items()}
    if 0 < int(flipped.sum()) < len(flipped):
        metrics["flip_auroc"] = float(roc_auc_score(flipped, -scores))
    if len(problem.unseen):
        metrics |= _unseen_metrics(unit(problem.unseen), test, train, train_labels, settings, problem)

    recall, precision = evaluation.precision_recall_curve(test, test_labels, train, train_labels)
    query, neighbour = evaluation.retrieval_examples(
        test, train, RETRIEVAL_QUERIES, settings.seed, K=min(5, len(train))
    )
    shown = torch.cat([problem.test[query.cpu(), None], database[neighbour.cpu()]], dim=1)
    # The parts are sorted by class, so the points are drawn at random.
    points = torch.randperm(len(test), generator=torch.Generator().manual_seed(settings.seed))[:FIGURE_POINTS]
    figures: dict[str, Any] = {
        "test_features": test.cpu()[points],
        "test_labels": test_labels.cpu()[points],
        "scores": scores,
        "flipped": flipped,
        "pr_recall": recall,
        "pr_precision": precision,
    }
    if not problem.archive.of_features:
        figures["retrieval_images"] = as_picture(problem.archive.images[shown.numpy()])
        figures["retrieval_labels"] = problem.labels[shown]
    if settings.dim == 2:  # the features themselves are shown, before and after training
        torch.manual_seed(settings.seed)
        untrained = make_encoder(settings.encoder, 2, settings.weights, len(problem.normalisation.mean))
        sample = problem.dataset(problem.test[points])
        figures["untrained_features"] = embed(untrained, sample, batch, device).cpu()
        figures["test_features"] = embed(encoder, sample, batch, device).cpu()

    save_encoder(encoder, settings, problem, folder / ENCODER)
    results = {
        "settings": dataclasses.asdict(settings),
        "dataset": dataset_of(problem.archive.classes) or problem.archive.name,
        "loss": settings.loss,
        "variant": variant,
        "noise": settings.noise,
        "rate": settings.rate,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "classes": problem.classes,
        "counts": {
            "train": len(problem.train),
            "validation": len(problem.validation),
            "test": len(problem.test),
            "flipped": int(problem.noisy.flipped.sum()),
            "skipped": len(problem.archive.skipped),
        },
        "metrics": {name: float(value) for name, value in metrics.items()},
        "history": history,
        "seconds": sum(row["seconds"] for row in history),
        "versions": {
            "ntdne_kernels": ntdne_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        },
    }
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in figures.items()}
    write_whole(folder / FIGURES, lambda file: np.savez_compressed(file, **arrays))
    text = json.dumps(results, indent=1) + "\n"  # in ASCII: a path may be any bytes
    write_whole(folder / RESULTS, lambda file: file.write(text.encode()))
    return results


def _unseen_metrics(
    unseen: Tensor, test: Tensor, train: Tensor, train_labels: Tensor, settings: Settings, problem: Problem
) -> dict[str, float]:
    """Metrics on classes kept out of training: few-shot classification, and recognising them as unknown."""
    labels = problem.archive.labels[problem.unseen].to(unseen.device)
    smallest = int(labels.unique(return_counts=True)[1].min())
    metrics: dict[str, float] = {}
    for shots in (1, 5):
        if settings.unseen_classes > 1 and smallest >= shots + FEW_SHOT_QUERIES:
            accuracy, half_width = tasks.few_shot(
                unseen, labels, shots=shots, seed=settings.seed, queries=FEW_SHOT_QUERIES
            )
            metrics |= {f"few_shot_{shots}": accuracy, f"few_shot_{shots}_ci": half_width}
    aurocs = tasks.unknown_auroc(test, unseen, train, train_labels, K=min(NEIGHBOURS, len(train)))
    return metrics | {f"unknown_auroc_{score}": value for score, value in aurocs.items()}
