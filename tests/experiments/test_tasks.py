"""Few-shot classification and unknown classes against loops over single images, and cases with a known answer."""

import itertools
import math
import statistics

import pytest
import torch
from torch.nn.functional import normalize

from ntdne_kernels.experiments.tasks import few_shot, unknown_auroc


def clusters(C: int, per_class: int, spread: float, D: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around C axes, and their classes."""
    labels = torch.arange(C).repeat_interleave(per_class)
    noise = torch.randn(len(labels), D, generator=torch.Generator().manual_seed(seed))
    return normalize(torch.eye(C, D)[labels] + spread * noise, dim=1), labels


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_names_the_class_of_the_nearest_mean(shots, device):
    features, labels = clusters(C=4, per_class=12, spread=0.7)
    found = few_shot(features.to(device), labels.to(device), shots, seed=2, ways=3, queries=4, episodes=30)
    generator = torch.Generator().manual_seed(2)
    accuracies = []
    for _ in range(30):
        drawn = []
        for label in torch.randperm(4, generator=generator).tolist()[:3]:
            drawn.append([features[12 * label + i].tolist() for i in torch.randperm(12, generator=generator).tolist()])
        means = [[statistics.fmean(x) for x in zip(*images[:shots], strict=True)] for images in drawn]
        right = 0
        for place, images in enumerate(drawn):
            for image in images[shots : shots + 4]:
                similarity = [cosine(image, mean) for mean in means]
                right += similarity.index(max(similarity)) == place
        accuracies.append(right / 12)
    assert 0.4 < statistics.fmean(accuracies) < 0.95
    half = 1.96 * statistics.stdev(accuracies) / math.sqrt(30)
    assert found == pytest.approx((statistics.fmean(accuracies), half), abs=1e-6)


def test_few_shot_of_classes_far_apart_is_always_right():
    features, labels = clusters(C=5, per_class=20, spread=0.01)
    assert few_shot(features, labels, 1, seed=0, episodes=20) == (1, 0)


def test_few_shot_of_features_without_classes_is_chance_within_its_interval():
    features, _ = clusters(C=1, per_class=500, spread=100)
    mean, half = few_shot(features, torch.arange(500) % 5, 5, seed=0)
    assert 0 < half < 0.01
    assert abs(mean - 0.2) < 2 * half


def test_few_shot_never_asks_for_an_example():
    # All images are orthogonal: an image has a cosine above 0 only with itself. Queries are no examples, so all their
    # cosines are 0, and the first class is predicted.
    features, labels = torch.eye(60), torch.arange(60) % 3
    assert few_shot(features, labels, 5, seed=0, ways=3, episodes=50) == (pytest.approx(1 / 3), pytest.approx(0))


def test_few_shot_follows_its_seed_and_takes_all_classes_where_there_are_few():
    features, labels = clusters(C=3, per_class=20, spread=1)
    expected = few_shot(features, labels, 1, seed=0, ways=3, episodes=20)
    assert few_shot(features, 10 + 7 * labels, 1, seed=0, ways=5, episodes=20) == expected
    assert few_shot(features, labels, 1, seed=1, ways=3, episodes=20) != expected


def test_unknown_auroc_is_the_share_of_pairs_in_the_right_order(device):
    database, labels = clusters(C=3, per_class=10, spread=0.4)
    known, _ = clusters(C=3, per_class=4, spread=0.5, seed=1)
    unknown, _ = clusters(C=6, per_class=4, spread=0.5, seed=2)
    unknown = unknown[8:]  # one of the three classes, and three others

    def agreement(query: torch.Tensor) -> float:
        weights = [math.exp(float(query @ row) / 0.2) for row in database]
        return max(sum(weights[10 * c : 10 * c + 10]) for c in range(3)) / sum(weights)

    def similarity(query: torch.Tensor) -> float:
        return statistics.fmean(sorted(float(query @ row) for row in database)[-7:])

    arguments = (x.to(device) for x in (known, unknown, database, labels))
    found = unknown_auroc(*arguments, sigma=0.2, K=7)
    assert set(found) == {"agreement", "similarity"}
    for name, score in (("agreement", agreement), ("similarity", similarity)):
        pairs = [score(k) > score(u) for k, u in itertools.product(known, unknown)]
        assert found[name] == pytest.approx(statistics.fmean(pairs), abs=1e-9)
        assert 0.5 < found[name] < 1


def test_a_new_class_on_an_axis_of_its_own_is_recognised():
    database, labels = clusters(C=3, per_class=10, spread=0.05)
    features, classes = clusters(C=4, per_class=10, spread=0.05, seed=1)
    assert unknown_auroc(features[classes < 3], features[classes == 3], database, labels) == {
        "agreement": 1,
        "similarity": 1,
    }


FEATURES, LABELS = clusters(C=3, per_class=20, spread=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: few_shot(FEATURES[:-5], LABELS[:-5], 5, 0),
            ValueError,
            "labels: expected at least 20 images of each class \\(5 shots, 15 queries\\), got 15 of class 2",
        ),
        (lambda: few_shot(FEATURES[:20], LABELS[:20], 1, 0), ValueError, "labels: .* 2 classes, got only class 0"),
        (lambda: few_shot(FEATURES, LABELS, 0, 0), ValueError, "shots: expected at least 1, got 0"),
        (lambda: few_shot(FEATURES, LABELS, 1, 0, ways=1), ValueError, "ways: expected at least 2, got 1"),
        (lambda: few_shot(FEATURES, LABELS, 1, 0, queries=0), ValueError, "queries: expected at least 1, got 0"),
        (lambda: few_shot(FEATURES, LABELS, 1, 0, episodes=1), ValueError, "episodes: expected at least 2, got 1"),
        (lambda: few_shot(2 * FEATURES, LABELS, 1, 0), ValueError, "features: expected unit rows"),
        (lambda: few_shot(FEATURES, LABELS[1:], 1, 0), ValueError, "labels: expected one class for each of the 60"),
        (
            lambda: unknown_auroc(FEATURES[:0], FEATURES, FEATURES, LABELS),
            ValueError,
            "known_queries: expected at least one row",
        ),
        (
            lambda: unknown_auroc(FEATURES, FEATURES.double(), FEATURES, LABELS),
            TypeError,
            "unknown_queries: expected a float32 tensor",
        ),
        (
            lambda: unknown_auroc(FEATURES, FEATURES, FEATURES[:9], LABELS[:9]),
            ValueError,
            "K: expected 1 to 9, .*, got 10",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
