"""The demo's report: metrics of features and scores, the peak memory of a call, tables, figures.

Shapes: N training images, M test images, D features.
"""

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files and needs no screen
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

Array = NDArray[np.generic]
Metrics = dict[str, dict[str, float]]
"""Method, then metric."""


class Digits(NamedTuple):
    """Real scans from scikit-learn, (n, 1, 8, 8) in [0, 1], with the labels a person would be given."""

    images: Tensor
    labels: Tensor
    """(N,) given labels, some of them wrong. Only these are trained on."""
    flipped: Tensor
    """(N,) which of them are wrong; for evaluation only, like true_labels."""
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Outcome(NamedTuple):
    """Features and scores by a trained encoder."""

    train_features: Tensor
    """(N, D), unit length, as the next."""
    test_features: Tensor
    """(M, D)"""
    scores: Tensor
    """(N,) leave-one-out score p of each given label."""


def evaluate(outcome: Outcome, data: Digits, seed: int) -> dict[str, float]:
    """All metrics of the report, as shares of 1."""
    database, queries, labels = (x.numpy() for x in (outcome.train_features, outcome.test_features, data.test_labels))
    nmi, acc = clustering(queries, labels, seed)
    auroc, precision = detection(outcome.scores.numpy(), data.flipped.numpy())
    return {
        "knn_true_labels": knn_accuracy(database, data.true_labels.numpy(), queries, labels),
        "knn_given_labels": knn_accuracy(database, data.labels.numpy(), queries, labels),
        "nmi": nmi,
        "acc": acc,
        "map20": mean_average_precision(database, data.true_labels.numpy(), queries, labels),
        "flipped_auroc": auroc,
        "flipped_precision": precision,
    }


def knn_accuracy(database: Array, database_labels: Array, queries: Array, labels: Array, K: int = 10) -> float:
    """Share of the queries (M, D) that a majority of their K nearest neighbours in the database (N, D) gets right."""
    return float(KNeighborsClassifier(K).fit(database, database_labels).score(queries, labels))


def clustering(features: Array, labels: Array, seed: int) -> tuple[float, float]:
    """NMI and ACC of k-means with one cluster for each class; ACC under the best matching of clusters to classes."""
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(features)
    counts = contingency_matrix(labels, clusters)
    matching = linear_sum_assignment(counts, maximize=True)
    return float(normalized_mutual_info_score(labels, clusters)), float(counts[matching].sum() / len(labels))


def mean_average_precision(
    database: Array, database_labels: Array, queries: Array, labels: Array, R: int = 20
) -> float:
    """Mean over the queries of Σ_r P(r)·hit(r) / min(Q, R), for the R nearest and Q relevant database images."""
    nearest = NearestNeighbors(n_neighbors=R).fit(database).kneighbors(queries, return_distance=False)
    hits = database_labels[nearest] == labels[:, None]
    precision = hits.cumsum(axis=1) / np.arange(1, R + 1)
    relevant = (database_labels == labels[:, None]).sum(axis=1)
    return float(np.mean((precision * hits).sum(axis=1) / np.minimum(relevant, R)))


def detection(scores: Array, flipped: Array) -> tuple[float, float]:
    """How well low scores (N,) find the flipped labels: AUROC, and precision of as many as were flipped.

    At that number precision and recall are equal.
    """
    lowest = np.argsort(scores, kind="stable")[: flipped.sum()]
    return float(roc_auc_score(flipped, -scores)), float(flipped[lowest].mean())


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that a call adds to this process at its peak. To be used in a fresh process, see `_high_water_mark`."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would be reused without being counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is in use now
    before = _high_water_mark()
    call()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    """Peak memory of this process in bytes: since it began, or on Linux since the mark was reset."""
    status = Path("/proc/self/status")
    mark = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if mark is not None:
        return int(mark[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; the first column is aligned to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f} %"


def print_metrics(metrics: Metrics, data: Digits) -> None:
    """Print the tables of features and of flipped labels."""
    cells = {method: [f"{100 * value:.1f}" for value in values.values()] for method, values in metrics.items()}
    print(f"\nFeatures of the {len(data.test_labels)} test scans, against their true labels, in %")
    header = ["", "K-NN, true", "K-NN, given", "NMI", "ACC", "MAP@20"]
    print(table(header, [[method, *values[:5]] for method, values in cells.items()]))
    print(
        "K-NN: K = 10, majority vote of the nearest training scans with their true labels, as in the paper, or with\n"
        "the given ones. NMI, ACC: k-means of the test scans. MAP@20: retrieval of training scans by true label;\n"
        "average precision divided by min(Q, 20), where Q training scans are relevant."
    )
    print(f"\nFinding the {int(data.flipped.sum())} flipped training labels by their low leave-one-out score, in %")
    header = ["", "AUROC", "precision = recall"]
    print(table(header, [[method, *values[5:]] for method, values in cells.items()]))
    print("Precision and recall are equal because as many labels are named as were flipped.")


def print_costs(costs: list[dict[str, float]]) -> None:
    """Print the table of time and memory."""
    print("\nLoss and gradient of one batch, plain PyTorch against streamed, on this CPU: B = 256, D = 128, 45 classes")
    header = ["N", "plain: time", "memory", "streamed: time", "memory", "gradients differ by"]
    rows = [
        [
            f"{cost['N']:,}",
            f"{cost['plain_seconds']:.3f} s",
            f"{cost['plain_peak_megabytes']:,.0f} MB",
            f"{cost['streamed_seconds']:.3f} s",
            f"{cost['streamed_peak_megabytes']:,.0f} MB",
            f"{cost['gradient_difference']:.0e}",
        ]
        for cost in costs
    ]
    print(table(header, rows))
    print(
        "Time: the fastest of three. Memory: what a call adds to the process at its peak; the bank is not counted.\n"
        "Difference: the largest, relative to the largest value of the gradient."
    )


def print_summary(metrics: Metrics, cost: dict[str, float], data: Digits) -> None:
    """Print the main results in two sentences."""
    accuracy = {method: percent(values["knn_true_labels"]) for method, values in metrics.items()}
    print(
        f"With {percent(data.flipped.float().mean())} of the training labels wrong, K-NN names {accuracy['NTDNE']} of "
        "the test scans rightly on features\n"
        f"of NTDNE, {accuracy['SNCA']} on those of SNCA and {accuracy['cross-entropy']} on those of cross-entropy.\n"
        f"Against {cost['N']:,} images the streamed loss takes {cost['streamed_seconds']:.2f} s and "
        f"{cost['streamed_peak_megabytes']:,.0f} MB, plain PyTorch {cost['plain_seconds']:.2f} s and "
        f"{cost['plain_peak_megabytes']:,.0f} MB."
    )


def print_next_steps() -> None:
    """Print how to do the same with images of one's own."""
    print("""
The same with your own images, which lie in a folder for each class (ntdne is in .venv/bin after make demo, or comes
with pip install '.[embed]'; docs/features.md says more):
  ntdne embed photos/ --encoder efficientnet-lite0               features of a pretrained network, once
  ntdne audit embeddings/photos --images photos/                 which labels are probably wrong, as a page to look at
  ntdne train embeddings/photos --noise none --output runs/head  a head, trained in spite of them
  ntdne search embeddings/photos NEW.jpg --checkpoint runs/head  the images most like a new one
python examples/aerial.py photos/ does all four.""")


def plot_features(outcomes: dict[str, Outcome], metrics: Metrics, data: Digits, seed: int, path: Path) -> None:
    """One t-SNE map of the test features for each method; a scan is drawn as the digit it shows."""
    figure, axes = plt.subplots(1, len(outcomes), figsize=(5 * len(outcomes), 5.6), layout="constrained")
    labels = data.test_labels.numpy()
    for axis, (method, outcome) in zip(axes, outcomes.items(), strict=True):
        with threadpool_limits(1):  # its short steps gain nothing from threads, and busy ones slow them down
            points = TSNE(random_state=seed).fit_transform(outcome.test_features.numpy())
        for digit in np.unique(labels):
            x, y = points[labels == digit].T
            axis.scatter(x, y, s=42, marker=f"${digit}$", color=f"C{digit}", linewidths=0.4)
        axis.set_title(f"{method}: K-NN accuracy {percent(metrics[method]['knn_true_labels'])}")
        axis.set(xticks=[], yticks=[], xlabel="t-SNE dimension 1 (no unit)")
    axes[0].set_ylabel("t-SNE dimension 2 (no unit)")
    figure.suptitle(
        f"Features of {len(labels)} test scans, {percent(data.flipped.float().mean())} of the training labels flipped\n"
        "Each scan is drawn as the digit it shows",
        fontsize="x-large",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scores(outcomes: dict[str, Outcome], metrics: Metrics, data: Digits, path: Path) -> None:
    """One histogram of the leave-one-out scores for each method: right labels against flipped ones."""
    figure, axes = plt.subplots(1, len(outcomes), figsize=(5 * len(outcomes), 4.6), sharey=True, layout="constrained")
    flipped, bins = data.flipped.numpy(), np.linspace(0, 1, 26)
    for axis, (method, outcome) in zip(axes, outcomes.items(), strict=True):
        p = outcome.scores.numpy()
        axis.hist(p[~flipped], bins, alpha=0.6, color="tab:blue", label="right label")
        axis.hist(p[flipped], bins, alpha=0.6, color="tab:orange", label="flipped label")
        axis.set_title(f"{method}: AUROC {percent(metrics[method]['flipped_auroc'])}")
        axis.set_xlabel("leave-one-out score p of the given label")
        axis.legend(loc="upper center")
    axes[0].set_ylabel("training scans")
    figure.suptitle(
        "Do a training scan's neighbours carry its label?\n"
        f"{len(flipped):,} scans, {percent(data.flipped.float().mean())} of the labels flipped",
        fontsize="x-large",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
