"""The paper's three tasks on clean labels: K-NN classification, clustering and retrieval (section IV-A).

Features are float32 rows of unit length on any device, for which falling cosine is growing Euclidean distance.
Similarities are computed in tiles of QUERIES_PER_TILE × ROWS_PER_TILE, so that no B × N matrix is ever held. Autocast
does not affect the products; PyTorch's setting for the precision of float32 products does.

Shapes: B queries, N database images, M test images, D features, C classes, K neighbours, R retrieved images.
"""

import math
from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor
from torch.nn.functional import one_hot

from ntdne_kernels.arguments import check_choice, check_number
from ntdne_kernels.labels import as_labels

QUERIES_PER_TILE = 512
ROWS_PER_TILE = 2048
BINS = 2000  # of the cosine, from 1 down to −1: 0.001 wide
RECALL_STEPS = 100
SMALLEST_DISTANCE = 1e-12  # for exact copies; different float32 rows are at least about 1e-8 apart


def nearest(queries: Tensor, database: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The K most similar database images of each query, by falling similarity; of equal ones the lower index first.

    Copies of a row in different tiles may differ in the last bit of their similarity: they come from two products.

    Args:
        queries: (B, D)
        database: (N, D)
        K: from 1 to N.

    Returns:
        (B, K) cosine similarities and (B, K) their database indices.

    Raises:
        TypeError, ValueError: features are not float32 rows of unit length, do not match, or K is not in 1..N.

    Example:
        >>> database = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> nearest(torch.tensor([[0.0, 1.0]]), database, K=2)
        (tensor([[1.0000, 0.8000]]), tensor([[2, 1]]))
    """
    _check_pair(queries, database)
    if not 1 <= K <= len(database):
        raise ValueError(f"K: expected 1 to {len(database)}, the number of database images, got {K}")
    found = []
    for block in queries.split(QUERIES_PER_TILE):
        best = torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
        for start, similarity in _tiles(block, database):
            keys = _keys(similarity, start).topk(min(K, similarity.size(1))).values
            candidates = torch.cat([best, keys], dim=1)
            best = candidates.topk(min(K, candidates.size(1))).values
        found.append(best)
    return _similarity_and_index(torch.cat(found))


def knn_predict(
    queries: Tensor, database: Tensor, database_labels: Tensor, weights: str = "vote", K: int = 10, sigma: float = 0.1
) -> Tensor:
    """Class (B,) with the largest sum of weights among the K nearest database images; of equal ones the lowest.

    Args:
        queries: (B, D)
        database: (N, D)
        database_labels: (N,) classes from 0.
        weights: "vote", each neighbour 1 (the paper); "distance", 1 / Euclidean distance (the authors' code), where
            exact copies of a query outweigh all others; "softmax", exp(similarity / sigma) (Wu et al., ECCV 2018).
        K: from 1 to N.
        sigma: temperature σ > 0 of "softmax"; the others ignore it.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> database = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[0.0, 1.0]]), database, torch.tensor([0, 1, 1]), K=3)
        tensor([1])
    """
    check_choice("weights", weights, ("vote", "distance", "softmax"))
    check_number("sigma", sigma, 0, math.inf)
    _check_pair(queries, database)
    labels = check_classes("database_labels", database_labels, database)
    similarity, index = nearest(queries, database, K)
    if weights == "vote":
        weight = torch.ones_like(similarity)
    elif weights == "distance":
        weight = 1 / _distances(queries, database, index).clamp(min=SMALLEST_DISTANCE)
    else:
        weight = torch.softmax(similarity / sigma, dim=1)
    votes = similarity.new_zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], weight).argmax(dim=1)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    database: Tensor,
    database_labels: Tensor,
    weights: str = "vote",
    K: int = 10,
    sigma: float = 0.1,
) -> float:
    """Share of the queries whose class `knn_predict` predicts; query_labels (B,). Arguments and errors as there."""
    check_features("queries", queries)
    labels = check_classes("query_labels", query_labels, queries)
    return float((knn_predict(queries, database, database_labels, weights, K, sigma) == labels).float().mean())


def clustering(features: Tensor, labels: Tensor, seed: int) -> tuple[float, float]:
    """NMI (eq. 16) and ACC (eq. 17) of k-means with one cluster for each class, the best of ten starts.

    NMI divides by the arithmetic mean of the entropies; ACC counts under the best matching of clusters to classes.

    Args:
        features: (M, D)
        labels: (M,) classes from 0; those that occur are counted.
        seed: of the starts.

    Raises:
        TypeError, ValueError: features or labels are not as described.
    """
    check_features("features", features)
    classes = check_classes("labels", labels, features).cpu().numpy()
    kmeans = KMeans(len(set(classes.tolist())), n_init=10, random_state=seed)
    clusters = kmeans.fit_predict(features.detach().cpu().numpy())
    counts = contingency_matrix(classes, clusters)
    nmi = normalized_mutual_info_score(classes, clusters, average_method="arithmetic")
    return float(nmi), float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(classes))


def average_precision(hits: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """AP (B,) of each query, Σ_{r ≤ R} P(r)·δ(r) / normaliser, for each of three normalisers.

    "total" is Q, all relevant database images (eq. 18; at most R/Q); "hits" the relevant ones among the R retrieved (0
    where there are none); "min" the smaller of Q and R.

    Args:
        hits: (B, R) bool, δ: whether the r-th retrieved image is relevant.
        relevant: (B,) Q ≥ 1.

    Example:
        >>> average_precision(torch.tensor([[True, False, True, False]]), relevant=torch.tensor([5]))["hits"]
        tensor([0.8333])
    """
    R = hits.size(1)
    precision = hits.cumsum(dim=1) / torch.arange(1, R + 1, device=hits.device)
    total = (precision * hits).sum(dim=1)
    return {
        "total": total / relevant,
        "hits": total / hits.sum(dim=1).clamp(min=1),
        "min": total / relevant.clamp(max=R),
    }


def mean_average_precision(
    queries: Tensor, query_labels: Tensor, database: Tensor, database_labels: Tensor, R: int = 20
) -> dict[str, float]:
    """MAP@R by normaliser: `average_precision` of the R nearest database images, averaged over the queries.

    Images of a query's class are relevant; queries without any are left out. R above N retrieves all N.

    Args:
        queries: (B, D)
        query_labels: (B,) classes from 0.
        database: (N, D)
        database_labels: (N,) classes from 0.
        R: at least 1.

    Raises:
        TypeError, ValueError: an argument is not as described, or no query has a relevant image.
    """
    if R < 1:
        raise ValueError(f"R: expected at least 1, got {R}")
    _check_pair(queries, database)
    database_labels = check_classes("database_labels", database_labels, database)
    queries, query_labels, relevant = _with_relevant(queries, query_labels, database_labels)
    _, index = nearest(queries, database, min(R, len(database)))
    hits = database_labels[index] == query_labels.unsqueeze(1)
    return {normaliser: float(ap.mean()) for normaliser, ap in average_precision(hits, relevant).items()}


def precision_recall_curve(
    queries: Tensor, query_labels: Tensor, database: Tensor, database_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Interpolated precision at recall 0, 0.01, ..., 1, averaged over the queries.

    A query retrieves the database images above a threshold of the cosine. Its precision at recall r is the highest at
    any threshold that recalls r or more (Manning et al., Introduction to Information Retrieval, 2008, section 8.4).
    Thresholds are the edges of BINS bins, so images whose cosines share a bin are retrieved together. Relevance,
    arguments and errors as `mean_average_precision`.

    Returns:
        (101,) recall and (101,) precision, on the CPU.
    """
    _check_pair(queries, database)
    database_labels = check_classes("database_labels", database_labels, database)
    queries, query_labels, relevant = _with_relevant(queries, query_labels, database_labels)
    percent = torch.arange(RECALL_STEPS + 1, device=queries.device)
    total = queries.new_zeros(RECALL_STEPS + 1)
    blocks = zip(*(x.split(QUERIES_PER_TILE) for x in (queries, query_labels, relevant)), strict=True)
    for block, labels, Q in blocks:
        others, hits = _histograms(block, labels, database, database_labels).cumsum(dim=2).unbind(dim=1)
        precision = hits / (hits + others).clamp(min=1)
        interpolated = precision.flip(1).cummax(dim=1).values.flip(1)
        first = torch.searchsorted(RECALL_STEPS * hits, percent * Q.unsqueeze(1))  # hits/Q ≥ recall, in integers
        total += interpolated.gather(1, first).sum(dim=0)
    return percent.cpu() / RECALL_STEPS, total.cpu() / len(queries)


def neighbour_shares(queries: Tensor, database: Tensor, database_labels: Tensor, sigma: float = 0.1) -> Tensor:
    """Share (B, C) of each class among the neighbours of queries from outside the database: p of eq. 4 for each label.

    Sums the neighbour probabilities p_ij (eq. 3) of all N database images by class; C is the highest label + 1.

    Args:
        queries: (B, D)
        database: (N, D)
        database_labels: (N,) classes from 0.
        sigma: temperature σ > 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_number("sigma", sigma, 0, math.inf)
    _check_pair(queries, database)
    labels = check_classes("database_labels", database_labels, database)
    C = int(labels.max()) + 1
    shares = []
    for block in queries.split(QUERIES_PER_TILE):
        highest = block.new_full((len(block), 1), -torch.inf)
        sums = block.new_zeros(len(block), C)  # of exp(similarity/σ), relative to exp(highest)
        for start, similarity in _tiles(block, database):
            logits = similarity / sigma
            raised = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            of_class = one_hot(labels[start : start + logits.size(1)], C).to(logits.dtype)
            sums.mul_(torch.exp(highest - raised)).addmm_(torch.exp(logits - raised), of_class)
            highest = raised
        shares.append(sums / sums.sum(dim=1, keepdim=True))
    return torch.cat(shares)


def retrieval_examples(queries: Tensor, database: Tensor, count: int, seed: int, K: int = 5) -> tuple[Tensor, Tensor]:
    """Queries drawn at random with their K nearest database images: indices (n,), ascending, and (n, K).

    n is `count`, or B where there are fewer queries. Errors as `nearest`.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    check_features("queries", queries)
    drawn = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    drawn = drawn.to(queries.device)
    return drawn, nearest(queries[drawn], database, K)[1]


def check_features(name: str, features: Tensor) -> None:
    """TypeError or ValueError, with their name, unless features are (n, D) float32 rows of unit length within 1 %."""
    if not isinstance(features, Tensor) or features.dtype != torch.float32:
        found = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name}: expected a float32 tensor, got {found}")
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"{name}: expected at least one row of features, got shape {tuple(features.shape)}")
    norm = torch.linalg.vector_norm(features, dim=1)
    wrong = ~((norm - 1).abs() <= 0.01)  # NaN is wrong too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected unit rows (torch.nn.functional.normalize), got norm {float(norm[row]):g} in row {row}"
        )


def check_classes(name: str, labels: Tensor, features: Tensor) -> Tensor:
    """The labels as int64 on the features' device; ValueError with their name unless each row has a class from 0."""
    labels = as_labels(labels, name).to(features.device, torch.int64)
    if len(labels) != len(features):
        raise ValueError(f"{name}: expected one class for each of the {len(features)} images, got {len(labels)}")
    if bool((labels < 0).any()):
        row = int((labels < 0).nonzero()[0])
        raise ValueError(f"{name}: expected classes from 0, got {int(labels[row])} at row {row}")
    return labels


def _check_pair(queries: Tensor, database: Tensor) -> None:
    check_features("queries", queries)
    check_features("database", database)
    if queries.size(1) != database.size(1):
        raise ValueError(f"queries: expected {database.size(1)} columns as in the database, got {queries.size(1)}")
    if queries.device != database.device:
        raise ValueError(f"queries: expected the database's device, {database.device}, got {queries.device}")


@torch.no_grad()
def _tiles(block: Tensor, database: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first database row, similarity (b, n)) of a block of queries (b, D) and ROWS_PER_TILE rows at a time."""
    start = 0
    for tile in database.split(ROWS_PER_TILE):
        similarity = block.new_empty(len(block), len(tile))
        yield start, torch.mm(block, tile.t(), out=similarity)  # `out` keeps autocast from changing the product
        start += len(tile)


def _keys(similarity: Tensor, start: int) -> Tensor:
    """Keys, int64 (b, n), for topk: in the order of the similarities, and of equal ones the lower index is larger."""
    index = torch.arange(start, start + similarity.size(1), device=similarity.device)
    # Adding 0 turns −0 into 0: they are equal but differ in their bits.
    return _ordered(similarity.add_(0.0).view(torch.int32)).long().mul_(1 << 32).sub_(index)


def _similarity_and_index(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `_keys`."""
    index = -keys & 0xFFFFFFFF
    return _ordered(((keys + index) >> 32).int()).view(torch.float32), index


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of float32 numbers to integers in the same order, and back.

    The bits of negative numbers, read as integers, fall where the numbers rise, so all but the sign are inverted.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _distances(queries: Tensor, database: Tensor, index: Tensor) -> Tensor:
    """Euclidean distances (B, K), from differences of rows: √(2 − 2s) would round those below about 3e-4 to 0."""
    blocks = zip(queries.split(QUERIES_PER_TILE), index.split(QUERIES_PER_TILE), strict=True)
    return torch.cat([torch.linalg.vector_norm(block.unsqueeze(1) - database[rows], dim=2) for block, rows in blocks])


def _with_relevant(queries: Tensor, query_labels: Tensor, database_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries whose class occurs in the database, their labels, and the number of relevant images of each."""
    labels = check_classes("query_labels", query_labels, queries)
    relevant = torch.bincount(database_labels, minlength=int(labels.max()) + 1)[labels]
    kept = relevant > 0
    if not bool(kept.any()):
        raise ValueError("query_labels: expected a class of the database, got only others")
    return queries[kept], labels[kept], relevant[kept]


def _histograms(block: Tensor, labels: Tensor, database: Tensor, database_labels: Tensor) -> Tensor:
    """Counts (b, 2, BINS) of each query's irrelevant and relevant images by cosine, the highest first."""
    counts = torch.zeros(len(block) * 2 * BINS, dtype=torch.int64, device=block.device)
    first_bin = torch.arange(0, len(counts), 2 * BINS, device=block.device).unsqueeze(1)
    for start, similarity in _tiles(block, database):
        hit = labels.unsqueeze(1) == database_labels[start : start + similarity.size(1)]
        bin = similarity.neg_().add_(1).mul_(BINS / 2).long().clamp_(0, BINS - 1)
        counts += torch.bincount((bin + BINS * hit + first_bin).flatten(), minlength=len(counts))
    return counts.view(len(block), 2, BINS)
