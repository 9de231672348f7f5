"""Two further tasks on classes kept out of training: few-shot classification, and recognising them as unknown.

Features as in `evaluation`. Shapes: B queries, N database images, M images of unseen classes, D features.
"""

import math

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ntdne_kernels.experiments.evaluation import check_classes, check_features, nearest, neighbour_shares


def few_shot(
    features: Tensor, labels: Tensor, shots: int, seed: int, ways: int = 5, queries: int = 15, episodes: int = 600
) -> tuple[float, float]:
    """Accuracy of classifying images of unseen classes by a few examples, and half the width of its 95 % interval.

    An episode draws `ways` classes, and of each `shots` examples and `queries` other images. A query is given the class
    whose mean example has the highest cosine with it: prototypical networks (Snell et al., NeurIPS 2017) with cosines
    for distances. The interval is 1.96 standard errors of the mean over the episodes.

    Args:
        features: (M, D)
        labels: (M,) classes from 0.
        shots: examples of each class in an episode, at least 1.
        seed: of the episodes.
        ways: classes in an episode, at least 2; where fewer occur, all of them.
        queries: images of each class in an episode that are classified, at least 1.
        episodes: at least 2.

    Raises:
        TypeError, ValueError: an argument is not as described, fewer than 2 classes occur, or one has too few images.
    """
    sizes = {"shots": (shots, 1), "ways": (ways, 2), "queries": (queries, 1), "episodes": (episodes, 2)}
    for name, (value, least) in sizes.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    check_features("features", features)
    labels = check_classes("labels", labels, features)
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got only class {int(classes[0])}")
    if int(counts.min()) < shots + queries:
        raise ValueError(
            f"labels: expected at least {shots + queries} images of each class ({shots} shots, {queries} queries), "
            f"got {int(counts.min())} of class {int(classes[counts.argmin()])}"
        )
    images = [(labels == label).nonzero()[:, 0].cpu() for label in classes]
    generator = torch.Generator().manual_seed(seed)
    accuracies = torch.empty(episodes, dtype=torch.float64)
    for episode in range(episodes):
        drawn = [
            images[c][torch.randperm(len(images[c]), generator=generator)[: shots + queries]]
            for c in torch.randperm(len(images), generator=generator)[:ways].tolist()
        ]
        examples, others = features[torch.stack(drawn).to(features.device)].split([shots, queries], dim=1)
        cosines = cosine_similarity(others.unsqueeze(2), examples.mean(dim=1), dim=3)  # class, query, prototype
        predicted = cosines.argmax(dim=2)
        accuracies[episode] = (
            (predicted == torch.arange(len(drawn), device=predicted.device).unsqueeze(1)).float().mean()
        )
    return float(accuracies.mean()), 1.96 * float(accuracies.std()) / math.sqrt(episodes)


def unknown_auroc(
    known_queries: Tensor,
    unknown_queries: Tensor,
    database: Tensor,
    database_labels: Tensor,
    sigma: float = 0.1,
    K: int = 10,
) -> dict[str, float]:
    """How well low scores separate queries of classes outside the database from the others: AUROC by score.

    "agreement" is the largest share of a class among a query's neighbours (`neighbour_shares`: the score p of eq. 4 for
    a query without a label), "similarity" the mean cosine of its K nearest.

    Args:
        known_queries: (B, D) images of classes in the database.
        unknown_queries: (B, D) images of other classes; B may differ.
        database: (N, D)
        database_labels: (N,) classes from 0.
        sigma: temperature σ > 0 of "agreement".
        K: from 1 to N.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_features("known_queries", known_queries)
    check_features("unknown_queries", unknown_queries)
    queries = torch.cat([known_queries, unknown_queries])
    unknown = torch.arange(len(queries)) >= len(known_queries)
    scores = {
        "agreement": neighbour_shares(queries, database, database_labels, sigma).amax(dim=1),
        "similarity": nearest(queries, database, K)[0].mean(dim=1),
    }
    return {name: float(roc_auc_score(unknown.numpy(), -score.cpu().numpy())) for name, score in scores.items()}
