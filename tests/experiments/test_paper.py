"""The paper's own numbers."""

from itertools import product

import pytest

from ntdne_kernels.experiments.paper import published

METHODS = ("D-CNN", "Triplet", "NSL", "SNCA", "ArcFace", "MAE", "SCE", "t-RNSL", "NTDNE")
METRICS = ("knn", "nmi", "acc", "map20")
CELLS = list(product(METRICS, ("AID", "NWPU-RESISC45"), ("uniform", "label-dependent"), (0.1, 0.3, 0.5, 0.7), METHODS))


@pytest.mark.parametrize(
    ("cell", "percent"),
    [
        (("knn", "AID", "uniform", 0.5, "NTDNE"), 90.25),
        (("knn", "AID", "label-dependent", 0.1, "NTDNE"), 92.9),
        (("knn", "NWPU-RESISC45", "uniform", 0.5, "D-CNN"), 88.62),
        (("nmi", "AID", "label-dependent", 0.7, "SCE"), 22.85),
        (("acc", "NWPU-RESISC45", "uniform", 0.7, "NSL"), 10.75),
        (("map20", "NWPU-RESISC45", "label-dependent", 0.7, "t-RNSL"), 76.23),
    ],
)
def test_numbers_are_shares_of_1(cell: tuple[str, str, str, float, str], percent: float):
    assert published(*cell) == pytest.approx(percent / 100, rel=1e-12)


def test_numbers_are_missing_where_they_could_not_be_had_and_only_there():
    for metric, dataset, noise, rate, method in CELLS:
        lost_rows = (metric, dataset, noise) == ("knn", "NWPU-RESISC45", "label-dependent") and rate > 0.1
        lost_column = (metric, method) == ("map20", "NTDNE")
        assert (published(metric, dataset, noise, rate, method) is None) == (lost_rows or lost_column)


def test_every_number_is_a_plausible_share():
    numbers = [number for cell in CELLS if (number := published(*cell)) is not None]
    assert len(numbers) == 533
    assert 0.1 < min(numbers) < max(numbers) < 0.98


def test_what_the_paper_did_not_try_has_no_number():
    assert published("knn", "EuroSAT", "uniform", 0.5, "NTDNE") is None
    assert published("knn", "AID", "uniform", 0.2, "NTDNE") is None
    assert published("knn", "AID", "uniform", 0.5, "ours") is None
    assert published("flip_auroc", "AID", "uniform", 0.5, "NTDNE") is None
