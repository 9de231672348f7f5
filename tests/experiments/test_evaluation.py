"""Evaluation against loops over single images, against scikit-learn, and with tiles smaller than any problem here."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score
from sklearn.metrics import precision_recall_curve as sklearn_curve
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntdne_kernels.experiments import evaluation
from ntdne_kernels.experiments.evaluation import (
    average_precision,
    clustering,
    knn_accuracy,
    knn_predict,
    mean_average_precision,
    nearest,
    neighbour_shares,
    precision_recall_curve,
    retrieval_examples,
)
from ntdne_kernels.functional import leave_one_out_log_scores

# Their products are exact in float32, so equal similarities are equal to the last bit, and there are many.
GRID = torch.tensor([*itertools.product((-0.5, 0.5), repeat=4), *(torch.eye(4).tolist()), *((-torch.eye(4)).tolist())])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(evaluation, "QUERIES_PER_TILE", 4)
    monkeypatch.setattr(evaluation, "ROWS_PER_TILE", 7)


def rows(n: int, D: int = 6, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def problem(B: int = 23, N: int = 60, D: int = 6, C: int = 4, seed: int = 0):
    """Queries, their classes, database, its classes: overlapping clusters, one for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (B + N,), generator=generator)
    labels[:C] = labels[B : B + C] = torch.arange(C)
    features = torch.randn(C, D, generator=generator)[labels] + torch.randn(B + N, D, generator=generator)
    features = normalize(features, dim=1)
    return features[:B], labels[:B], features[B:], labels[B:]


def cosines(queries: torch.Tensor, database: torch.Tensor) -> list[list[float]]:
    return [[math.fsum(a * b for a, b in zip(q, x, strict=True)) for x in database.tolist()] for q in queries.tolist()]


def ranking(similarity: list[float]) -> list[int]:
    return sorted(range(len(similarity)), key=lambda j: (-similarity[j], j))


@given(st.data())
def test_nearest_orders_by_similarity_and_then_by_index_whatever_the_tiles(data):
    pool = st.integers(0, len(GRID) - 1)
    queries = GRID[data.draw(st.lists(pool, min_size=1, max_size=6))]
    database = GRID[data.draw(st.lists(pool, min_size=1, max_size=30))]
    K = data.draw(st.integers(1, len(database)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "QUERIES_PER_TILE", data.draw(st.integers(1, 7)))
        patch.setattr(evaluation, "ROWS_PER_TILE", data.draw(st.integers(1, 31)))
        similarity, index = nearest(queries, database, K)
    expected = cosines(queries, database)
    assert index.tolist() == [ranking(line)[:K] for line in expected]
    assert similarity.tolist() == [sorted(line, reverse=True)[:K] for line in expected]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("K", [1, 10, 60])
def test_nearest_is_topk_of_all_similarities(K, device):
    queries, _, database, _ = (x.to(device) for x in problem())
    similarity, index = nearest(queries, database, K)
    expected = (queries @ database.t()).topk(K)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(similarity, expected.values, rtol=0, atol=1e-6)


def test_minus_zero_equals_zero(device):
    similarity = torch.tensor([[-0.0, 0.0, -1e-45, -0.0, 1e-45, -1.0, 1.0]], device=device)
    keys = evaluation._keys(similarity, start=5)
    ordered, index = evaluation._similarity_and_index(keys.sort(dim=1, descending=True).values)
    assert index.tolist() == [[11, 9, 5, 6, 8, 7, 10]]
    assert torch.equal(ordered, similarity[:, index[0] - 5])


def test_nearest_is_the_same_under_autocast_and_for_features_that_require_grad():
    queries, _, database, _ = problem()
    expected = nearest(queries, database, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(queries.requires_grad_(), database, 5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("weights", "sklearn_name"), [("vote", "uniform"), ("distance", "distance")])
@pytest.mark.parametrize("seed", range(5))
def test_knn_predicts_what_scikit_learn_does(weights, sklearn_name, seed, device):
    queries, query_labels, database, labels = problem(B=60, N=60, seed=seed)
    database[:30] = queries[:30]
    reference = KNeighborsClassifier(10, weights=sklearn_name, algorithm="kd_tree").fit(database, labels)
    arguments = [x.to(device) for x in (queries, database, labels)]
    predicted = knn_predict(*arguments, weights).cpu()
    assert predicted.tolist() == reference.predict(queries).tolist()
    accuracy = knn_accuracy(arguments[0], query_labels, *arguments[1:], weights)
    assert accuracy == pytest.approx(reference.score(queries, query_labels), abs=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_softmax_weights_are_exponentials_of_the_similarity(sigma):
    queries, _, database, labels = problem(B=80, seed=1)
    expected = []
    for line in cosines(queries, database):
        votes = [0.0] * 4
        for j in ranking(line)[:10]:
            votes[int(labels[j])] += math.exp(line[j] / sigma)
        expected.append(votes.index(max(votes)))
    assert knn_predict(queries, database, labels, "softmax", sigma=sigma).tolist() == expected


def test_copies_of_a_query_outvote_all_others_where_weights_are_inverse_distances():
    close = normalize(torch.tensor([[1.0, 1e-4], [1.0, 2e-4], [1.0, -1e-4], [1.0, -2e-4]]), dim=1)
    database = torch.cat([close, torch.tensor([[1.0, 0.0]] * 3)])
    labels = torch.tensor([0, 0, 0, 0, 2, 1, 2])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, database, labels, "vote", K=7).tolist() == [0]
    assert knn_predict(query, database, labels, "distance", K=7).tolist() == [2]


def test_of_classes_with_equal_votes_the_lowest_wins():
    database = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    labels = torch.tensor([3, 1, 1, 3])
    assert knn_predict(database[:1], database, labels, "vote", K=2).tolist() == [1]
    assert knn_predict(database[:1], database, labels, "distance", K=2).tolist() == [3]


@pytest.mark.parametrize("seed", range(3))
def test_nmi_and_acc_follow_their_equations(seed):
    features, labels, _, _ = problem(B=90, C=4, seed=seed)
    y = labels.tolist()
    c = KMeans(4, n_init=10, random_state=seed).fit_predict(features.numpy()).tolist()
    M = len(y)

    def entropy(x: list) -> float:
        return -sum(x.count(value) / M * math.log(x.count(value) / M) for value in set(x))

    information = entropy(y) + entropy(c) - entropy(list(zip(y, c, strict=True)))
    matched = max(sum(m[b] == a for a, b in zip(y, c, strict=True)) for m in itertools.permutations(range(4)))
    nmi, acc = clustering(features, labels, seed)
    assert nmi == pytest.approx(2 * information / (entropy(y) + entropy(c)), abs=1e-12)
    assert acc == matched / M
    assert 0.3 < acc < 1


def test_clusters_far_apart_are_found_whatever_their_numbers(device):
    labels = torch.tensor([7, 0, 3]).repeat(20)
    features = normalize(torch.eye(3).repeat(20, 1) + 0.01 * rows(60, D=3), dim=1)
    assert clustering(features.to(device), labels.to(device), seed=0) == (pytest.approx(1), 1)


@given(st.data())
def test_average_precision_follows_its_equation(data):
    R = data.draw(st.integers(1, 12))
    hits = data.draw(st.lists(st.booleans(), min_size=R, max_size=R))
    Q = sum(hits) + data.draw(st.integers(0 if any(hits) else 1, 20))
    total = sum(sum(hits[:r]) / r for r in range(1, R + 1) if hits[r - 1])
    found = average_precision(torch.tensor([hits]), torch.tensor([Q]))
    expected = {"total": total / Q, "hits": total / max(sum(hits), 1), "min": total / min(Q, R)}
    assert {name: ap.item() for name, ap in found.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_average_precision_of_the_whole_database_is_that_of_scikit_learn():
    queries, query_labels, database, labels = problem()
    pairs = zip(cosines(queries, database), query_labels, strict=True)
    expected = np.mean([average_precision_score((labels == label).numpy(), line) for line, label in pairs])
    for R in (60, 1000):  # R beyond the database retrieves all of it
        found = mean_average_precision(queries, query_labels, database, labels, R)
        assert found["total"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_map_averages_over_the_queries_with_relevant_images(device):
    queries, query_labels, database, labels = problem()
    query_labels[:5] = torch.tensor([4, 9, 4, 100, 4])  # classes that the database does not have
    total, hits_only, smaller = [], [], []
    for line, label in list(zip(cosines(queries, database), query_labels.tolist(), strict=True))[5:]:
        hits = [int(labels[j]) == label for j in ranking(line)[:20]]
        Q = labels.tolist().count(label)
        ap = sum(sum(hits[:r]) / r for r in range(1, 21) if hits[r - 1])
        total.append(ap / Q)
        hits_only.append(ap / max(sum(hits), 1))
        smaller.append(ap / min(Q, 20))
    expected = {"total": np.mean(total), "hits": np.mean(hits_only), "min": np.mean(smaller)}
    found = mean_average_precision(*(x.to(device) for x in (queries, query_labels, database, labels)))
    assert found == pytest.approx(expected, abs=1e-6)


def interpolated(precision: list[float], recall: list[float]) -> list[float]:
    return [max(p for p, r in zip(precision, recall, strict=True) if r >= step / 100 - 1e-9) for step in range(101)]


@pytest.mark.usefixtures("small_tiles")
def test_precision_recall_curve_retrieves_bin_by_bin(device, monkeypatch):
    monkeypatch.setattr(evaluation, "BINS", 16)
    queries, query_labels, database, labels = problem()
    query_labels[:5] = 4  # a class that the database does not have
    curves = []
    for line, label in list(zip(cosines(queries, database), query_labels.tolist(), strict=True))[5:]:
        Q = labels.tolist().count(label)
        precision, recall = [], []
        for edge in range(15, -1, -1):
            retrieved = [int(labels[j]) for j in range(60) if line[j] >= -1 + edge / 8]
            if retrieved:
                precision.append(retrieved.count(label) / len(retrieved))
                recall.append(retrieved.count(label) / Q)
        curves.append(interpolated(precision, recall))
    arguments = (x.to(device) for x in (queries, query_labels, database, labels))
    recall, precision = (x.numpy() for x in precision_recall_curve(*arguments))
    np.testing.assert_allclose(recall, np.arange(101) / 100, atol=1e-7)
    np.testing.assert_allclose(precision, np.mean(curves, axis=0), atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_precision_recall_curve_is_exact_where_no_two_images_share_a_bin():
    angles = torch.arccos(torch.linspace(0.9995, -0.9995, 60))  # from the query at angle 0
    database = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    queries, query_labels = torch.tensor([[1.0, 0.0]]).repeat(3, 1), torch.arange(3)
    score = database[:, 0].numpy()
    curves = []
    for label in range(3):
        precision, recall, _ = sklearn_curve((labels == label).numpy(), score)
        curves.append(interpolated(precision[:-1], recall[:-1]))  # the last point retrieves nothing
    _, precision = precision_recall_curve(queries, query_labels, database, labels)
    np.testing.assert_allclose(precision.numpy(), np.mean(curves, axis=0), atol=1e-6)


def test_opposite_and_equal_rows_fall_into_the_outer_bins():
    query = rows(1, D=100)
    database = torch.cat([-query, query, -query])  # cosines of 1 and −1 up to rounding
    _, precision = precision_recall_curve(query, torch.tensor([1]), database, torch.tensor([0, 1, 1]))
    np.testing.assert_allclose(precision.numpy(), [1] * 51 + [2 / 3] * 50, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sigma", [0.001, 0.1, 2.0])
def test_neighbour_shares_are_sums_of_neighbour_probabilities(sigma, device):
    queries, _, database, labels = problem()
    labels[labels == 2] = 5  # classes may be missing
    expected = []
    for line in cosines(queries, database):
        weights = [math.exp((s - max(line)) / sigma) for s in line]
        sums = [sum(w for w, y in zip(weights, labels.tolist(), strict=True) if y == c) for c in range(6)]
        expected.append([s / sum(weights) for s in sums])
    shares = neighbour_shares(*(x.to(device) for x in (queries, database, labels)), sigma)
    # A cosine's last bit, 6e-8, is 6e-8/σ of a weight.
    torch.testing.assert_close(shares.cpu(), torch.tensor(expected), rtol=0, atol=1e-6 + 3e-7 / sigma)


def test_neighbour_shares_are_the_scores_the_loss_would_give_each_label():
    queries, _, database, labels = problem()
    scores = [
        leave_one_out_log_scores(queries, database, torch.full((len(queries),), c), labels).exp() for c in range(4)
    ]
    torch.testing.assert_close(neighbour_shares(queries, database, labels), torch.stack(scores, dim=1))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(
    "call",
    [
        lambda queries, _, database, labels: nearest(queries, database, 10),
        precision_recall_curve,
        lambda queries, _, database, labels: neighbour_shares(queries, database, labels),
    ],
    ids=["nearest", "precision_recall_curve", "neighbour_shares"],
)
def test_nothing_as_large_as_all_similarities_is_ever_made(call):
    B, N = 550, 200_000
    labels = torch.arange(N) % 30
    with LargestTensor() as largest:
        call(rows(B, D=16), labels[:B], rows(N, D=16), labels)
    assert N * 16 * 4 <= largest.size < B * N * 4 / 20


def test_retrieval_examples_are_drawn_once_each_with_their_nearest(device):
    queries, database = rows(12).to(device), rows(40, seed=1).to(device)
    drawn, neighbours = retrieval_examples(queries, database, 5, seed=3)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == 5
    assert torch.equal(neighbours, nearest(queries, database, 5)[1][drawn])
    assert torch.equal(drawn, retrieval_examples(queries, database, 5, seed=3)[0])
    assert not torch.equal(drawn, retrieval_examples(queries, database, 5, seed=4)[0])
    assert retrieval_examples(queries, database, 50, seed=3)[0].tolist() == list(range(12))


QUERIES, QUERY_LABELS, DATABASE, LABELS = problem()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest(QUERIES, DATABASE, 61), ValueError, "K: expected 1 to 60, the number of .* images, got 61"),
        (lambda: nearest(QUERIES, DATABASE, 0), ValueError, "K: expected 1 to 60"),
        (lambda: knn_predict(QUERIES, DATABASE[:9], LABELS[:9]), ValueError, "K: expected 1 to 9, .*, got 10"),
        (lambda: nearest(QUERIES.double(), DATABASE, 1), TypeError, "queries: expected a float32 .* torch.float64"),
        (lambda: nearest(QUERIES.tolist(), DATABASE, 1), TypeError, "queries: expected a float32 tensor, got list"),
        (lambda: nearest(QUERIES[0], DATABASE, 1), ValueError, "queries: expected at least one row .* \\(6,\\)"),
        (lambda: nearest(QUERIES[:0], DATABASE, 1), ValueError, "queries: expected at least one row .* \\(0, 6\\)"),
        (lambda: nearest(QUERIES, DATABASE[:, :5], 1), ValueError, "database: expected unit rows"),
        (lambda: nearest(rows(3, D=5), DATABASE, 1), ValueError, "queries: expected 6 columns as .*, got 5"),
        (lambda: nearest(QUERIES, DATABASE * 1.02, 1), ValueError, "database: .* got norm 1.02 in row 0"),
        (
            lambda: nearest(QUERIES.index_fill(0, torch.tensor([2]), math.nan), DATABASE, 1),
            ValueError,
            "queries: .* got norm nan in row 2",
        ),
        (lambda: knn_predict(QUERIES, DATABASE, LABELS[1:]), ValueError, "database_labels: .* 60 images, got 59"),
        (
            lambda: knn_predict(QUERIES, DATABASE, LABELS.float()),
            TypeError,
            "database_labels: expected an integer tensor",
        ),
        (
            lambda: knn_predict(QUERIES, DATABASE, LABELS.index_fill(0, torch.tensor([4]), -1)),
            ValueError,
            "database_labels: expected classes from 0, got -1 at row 4",
        ),
        (lambda: knn_predict(QUERIES, DATABASE, LABELS, "mean"), ValueError, "weights: expected one of 'vote'"),
        (lambda: knn_predict(QUERIES, DATABASE, LABELS, "softmax", sigma=0), ValueError, "sigma: expected a number"),
        (
            lambda: knn_accuracy(QUERIES, QUERY_LABELS[1:], DATABASE, LABELS),
            ValueError,
            "query_labels: .* 23 images, got 22",
        ),
        (lambda: clustering(QUERIES, LABELS, 0), ValueError, "labels: expected one class for each of the 23 images"),
        (lambda: clustering(2 * QUERIES, QUERY_LABELS, 0), ValueError, "features: expected unit rows"),
        (
            lambda: mean_average_precision(QUERIES, QUERY_LABELS, DATABASE, LABELS, R=0),
            ValueError,
            "R: expected at least 1, got 0",
        ),
        (
            lambda: mean_average_precision(QUERIES, QUERY_LABELS + 4, DATABASE, LABELS),
            ValueError,
            "query_labels: expected a class of the database, got only others",
        ),
        (
            lambda: precision_recall_curve(QUERIES, QUERY_LABELS + 4, DATABASE, LABELS),
            ValueError,
            "query_labels: expected a class of the database, got only others",
        ),
        (lambda: neighbour_shares(QUERIES, DATABASE, LABELS, 0.0), ValueError, "sigma: expected a number"),
        (lambda: retrieval_examples(QUERIES, DATABASE, 0, 0), ValueError, "count: expected at least 1, got 0"),
        (lambda: retrieval_examples(QUERIES, DATABASE[:4], 3, 0), ValueError, "K: expected 1 to 4, .*, got 5"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
