"""Transition matrices, and drawing noisy labels from them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntdne_kernels.experiments.noise import (
    authors_map,
    check_matrix,
    corrupt,
    dataset_of,
    one_target,
    read_matrix,
    targets_by_name,
    uniform,
)

AID_TEXT = (
    "Airport BareLand BaseballField Beach Bridge Center Church Commercial DenseResidential Desert Farmland Forest "
    "Industrial Meadow MediumResidential Mountain Park Parking Playground Pond Port RailwayStation Resort River School "
    "SparseResidential Square Stadium StorageTanks Viaduct"
)
AID_IMAGES = (
    "360 310 220 400 360 260 240 350 410 300 370 250 390 280 290 340 350 390 370 420 380 260 290 410 300 300 330 290 "
    "360 420"
)
NWPU_TEXT = (
    "airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud "
    "commercial_area dense_residential desert forest freeway golf_course ground_track_field harbor industrial_area "
    "intersection island lake meadow medium_residential mobile_home_park mountain overpass palace parking_lot railway "
    "railway_station rectangular_farmland river roundabout runway sea_ice ship snowberg sparse_residential stadium "
    "storage_tank tennis_court terrace thermal_power_station wetland"
)
AID, NWPU = AID_TEXT.split(), NWPU_TEXT.split()
CLASSES = {"AID": AID, "NWPU-RESISC45": NWPU}
# The authors' training sets: int(0.7·n) images of each class, in class order.
TRAINING = {"AID": [int(0.7 * int(n)) for n in AID_IMAGES.split()], "NWPU-RESISC45": [int(0.7 * 700)] * 45}
RATES = (0.1, 0.3, 0.5, 0.7)

rates = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


def training_labels(dataset: str) -> Tensor:
    sizes = torch.tensor(TRAINING[dataset])
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Row-stochastic, with zeros and ones among the entries."""
    C = draw(st.integers(1, 6))
    weights = torch.tensor(draw(st.lists(st.lists(st.integers(0, 5), min_size=C, max_size=C), min_size=C, max_size=C)))
    weights = weights.double() + torch.eye(C) * (weights.sum(1) == 0)
    return weights / weights.sum(1, keepdim=True)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Labels in any order, and a matrix."""
    matrix = draw(matrices())
    labels = draw(st.lists(st.integers(0, len(matrix) - 1), max_size=40))
    return torch.tensor(labels, dtype=torch.int64), matrix


# --- matrices


@given(st.integers(2, 8), rates)
def test_uniform_noise_spreads_the_rate_evenly_over_the_other_classes(C: int, rate: float):
    matrix = uniform(C, rate)
    assert torch.equal(check_matrix(matrix, C), matrix)
    for y in range(C):
        for z in range(C):
            assert matrix[y, z] == (1 - rate if y == z else rate / (C - 1))


def test_uniform_noise_needs_a_second_class():
    with pytest.raises(ValueError, match="C: uniform noise needs two classes or more, got 1"):
        uniform(1, 0.1)
    assert uniform(1, 0).tolist() == [[1]]


@given(st.data(), st.integers(1, 8), rates)
def test_one_target_flips_each_class_to_its_target(data: st.DataObject, C: int, rate: float):
    targets = data.draw(st.lists(st.integers(0, C - 1), min_size=C, max_size=C))
    matrix = one_target(targets, rate)
    assert torch.equal(check_matrix(matrix, C), matrix)
    for y in range(C):
        for z in range(C):
            kept = 1 if targets[y] == y else 1 - rate
            assert matrix[y, z] == (kept if y == z else rate if z == targets[y] else 0)


def test_one_target_refuses_what_is_no_class():
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 2, got 3 at position 1"):
        one_target([1, 3, 0], 0.5)
    with pytest.raises(TypeError, match="targets: expected integers, got 0.5"):
        one_target([0.5, 1.0], 0.5)


def test_targets_can_be_named():
    classes = ["cat", "dog", "fox"]
    assert targets_by_name(classes, {"cat": "dog", "fox": "cat"}) == [1, 1, 0]
    with pytest.raises(ValueError, match="targets: expected names of classes, got 'bat', 'cow'"):
        targets_by_name(classes, {"cat": "cow", "bat": "dog"})


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(rate: float):
    for matrix in (lambda: uniform(3, rate), lambda: one_target([1, 0], rate), lambda: authors_map(AID, rate)):
        with pytest.raises(ValueError, match=rf"rate: expected a number in \[0, 1\], got {rate}"):
            matrix()


@pytest.mark.parametrize("dataset", CLASSES)
@pytest.mark.parametrize("rate", [0, *RATES, 1])
def test_the_authors_maps_keep_1_minus_rate_and_are_row_stochastic(dataset: str, rate: float):
    matrix = authors_map(CLASSES[dataset], rate)
    assert torch.allclose(matrix.diag(), torch.tensor(1 - rate, dtype=torch.float64))
    assert torch.equal(check_matrix(matrix, len(matrix)), matrix)
    targets = (matrix - matrix.diag().diag() > 0).sum(1)
    assert rate == 0 or set(targets.tolist()) == {2, 3, 4, 5}


def test_the_authors_map_has_fifths_of_the_rate():
    matrix = authors_map(AID, 0.5)
    row = {AID[z]: round(float(matrix[AID.index("Playground"), z]), 9) for z in matrix[18].nonzero().flatten()}
    assert row == {"Playground": 0.5, "Stadium": 0.4, "Park": 0.1}


@pytest.mark.parametrize("dataset", CLASSES)
def test_at_rate_0_7_ten_classes_of_the_authors_maps_have_mostly_a_wrong_label(dataset: str):
    labels = training_labels(dataset)
    given = corrupt(labels, authors_map(CLASSES[dataset], 0.7), 42, "exact").labels
    commonest = [int(given[labels == c].bincount().argmax()) for c in range(len(CLASSES[dataset]))]
    assert sum(label != c for c, label in enumerate(commonest)) == 10


def test_the_authors_map_follows_the_order_of_the_classes():
    order = torch.randperm(len(AID), generator=torch.Generator().manual_seed(0))
    matrix = authors_map([AID[c] for c in order], 0.3)
    assert torch.equal(matrix, authors_map(AID, 0.3)[order][:, order])


def test_archives_are_recognised_whatever_the_spelling_of_their_classes():
    for spell in (str.upper, lambda name: name.replace("_", " ").title(), lambda name: name.replace("_", "-")):
        assert dataset_of([spell(name) for name in NWPU]) == "NWPU-RESISC45"
        assert dataset_of([spell(name) for name in reversed(AID)]) == "AID"
    for classes in (AID[1:], [*AID, "Zoo"], [*AID, "Airport"], [], ["0", "1"]):
        assert dataset_of(classes) is None


def test_classes_without_a_map_are_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"30 of AID, the 30 given lack 'Viaduct', and unknown are 'Zoo'; for other classes give a noise_file",
    ):
        authors_map([*AID[:-1], "Zoo"], 0.5)
    with pytest.raises(
        ValueError, match=r"45 of NWPU-RESISC45, the 44 given lack 'airplane', and unknown are none; for"
    ):
        authors_map(NWPU[1:], 0.5)
    with pytest.raises(ValueError, match=r"expected all classes of AID or NWPU-RESISC45.* and 25 more, and unknown"):
        authors_map(["cat", "dog"], 0.5)


# --- matrices of the user's own


@given(matrices())
def test_any_row_stochastic_matrix_passes_unchanged(matrix: Tensor):
    assert torch.equal(check_matrix(matrix, len(matrix)), matrix)
    assert torch.equal(check_matrix(matrix.numpy(), len(matrix)), matrix)


def test_a_float32_matrix_is_scaled_to_rows_of_sum_1():
    matrix = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.0, 0.0, 1.0]])
    assert (matrix.double().sum(1) - 1).abs().max() > 1e-9
    checked = check_matrix(matrix, 3)
    assert checked.dtype == torch.float64
    assert (checked.sum(1) - 1).abs().max() < 1e-15
    assert torch.allclose(checked, matrix.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]], r"expected shape \(2, 2\).* got \(3, 2\)"),
        ([0.5, 0.5], r"expected shape \(2, 2\).* got \(2,\)"),
        ([[1.1, -0.1], [0.0, 1.0]], "expected probabilities, got -0.1 in row 0, column 1"),
        ([[1.0, 0.0], [float("nan"), 1.0]], "expected probabilities, got nan in row 1, column 0"),
        ([[1.0, 0.0], [float("inf"), 1.0]], "expected probabilities, got inf in row 1, column 0"),
        ([[0.9, 0.1], [0.3, 0.6]], "expected rows that sum to 1, got 0.9 in row 1"),
        (
            [[0.9, 0.3], [0.1, 0.7]],
            r"expected rows .* got columns that sum to 1 \(cleanlab's convention\); transpose it",
        ),
    ],
)
def test_what_is_no_transition_matrix_is_refused(matrix: list, message: str):
    with pytest.raises(ValueError, match=f"matrix: {message}"):
        check_matrix(torch.tensor(matrix, dtype=torch.float64), 2)


def test_a_matrix_passes_once_transposed_and_a_doubly_stochastic_one_as_it_is():
    cleanlab = torch.tensor([[0.9, 0.3], [0.1, 0.7]], dtype=torch.float64)
    assert torch.equal(check_matrix(cleanlab.T, 2), cleanlab.T)
    assert torch.equal(check_matrix(uniform(4, 0.3).T, 4), uniform(4, 0.3))


def test_a_matrix_is_read_from_npy_and_csv(tmp_path):
    matrix = authors_map(AID, 0.3)
    np.save(tmp_path / "m.npy", matrix.numpy())
    np.savetxt(tmp_path / "m.csv", matrix.numpy(), delimiter=",", fmt="%.17g")
    (tmp_path / "spreadsheet.csv").write_text("0.9,0.1\n0.25,0.75\n", encoding="utf-8-sig")
    assert torch.equal(read_matrix(tmp_path / "m.npy", 30), matrix)
    assert torch.equal(read_matrix(str(tmp_path / "m.csv"), 30), matrix)
    assert read_matrix(tmp_path / "spreadsheet.csv", 2).tolist() == [[0.9, 0.1], [0.25, 0.75]]


def test_a_matrix_file_that_cannot_be_meant_is_refused_by_name(tmp_path):
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    (tmp_path / "ragged.csv").write_text("1,0\n1\n")
    (tmp_path / "columns.csv").write_text("0.9,0.3\n0.1,0.7\n")
    (tmp_path / "m.txt").write_text("1")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "number.npy", np.array(1.0))
    for name, message in {
        "words.csv": "could not convert",
        "ragged.csv": "number of columns changed",
        "columns.csv": "transpose it",
        "m.txt": r"expected a .npy or .csv file",
        "empty.npy": "No data left in file",
        "objects.npy": "Object arrays cannot be loaded",
        "words.npy": "could not convert",
        "number.npy": r"expected shape \(2, 2\)",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_matrix(tmp_path / name, 2)
    with pytest.raises(FileNotFoundError, match=r"missing\.npy"):
        read_matrix(tmp_path / "missing.npy", 2)


# --- drawing


@pytest.mark.parametrize(
    ("dataset", "noise", "flips"),
    [
        ("AID", "uniform", (702, 2029, 3500, 4880)),
        ("AID", "label-dependent", (677, 2084, 3440, 4780)),
        ("NWPU-RESISC45", "uniform", (2171, 6643, 10940, 15407)),
        ("NWPU-RESISC45", "label-dependent", (2252, 6468, 11017, 15347)),
    ],
)
def test_the_authors_flip_counts_come_out(dataset: str, noise: str, flips: tuple[int, ...]):
    classes, labels = CLASSES[dataset], training_labels(dataset)
    assert len(labels) == {"AID": 6993, "NWPU-RESISC45": 22005}[dataset]
    for rate, expected in zip(RATES, flips, strict=True):
        matrix = uniform(len(classes), rate) if noise == "uniform" else authors_map(classes, rate)
        assert int(corrupt(labels, matrix, 42).flipped.sum()) == expected


@given(labelled(), seeds)
def test_multinomial_draws_one_image_after_the_other(case: tuple[Tensor, Tensor], seed: int):
    labels, matrix = case
    random = np.random.RandomState(seed)
    expected = [int(random.multinomial(1, matrix[y].numpy()).argmax()) for y in labels]
    assert corrupt(labels, matrix, seed).labels.tolist() == expected


@given(labelled(), seeds)
def test_exact_draws_have_the_expected_counts_to_less_than_one_image(case: tuple[Tensor, Tensor], seed: int):
    labels, matrix = case
    given = corrupt(labels, matrix, seed, "exact").labels
    for y in range(len(matrix)):
        n = int((labels == y).sum())
        for z in range(len(matrix)):
            count = int(((labels == y) & (given == z)).sum())
            expected = n * float(matrix[y, z])
            assert abs(count - expected) < 1
            if abs(expected - round(expected)) < 1e-9:
                assert count == round(expected)


@given(labelled(), seeds, seeds)
def test_the_seed_decides_which_images_an_exact_draw_flips_and_never_how_many(
    case: tuple[Tensor, Tensor], seed: int, other: int
):
    labels, matrix = case
    one, again, two = (corrupt(labels, matrix, s, "exact").labels for s in (seed, seed, other))
    assert torch.equal(one, again)
    for y in range(len(matrix)):
        assert torch.equal(one[labels == y].bincount(minlength=6), two[labels == y].bincount(minlength=6))


def test_exact_draws_are_spread_over_the_images_of_a_class():
    labels = torch.zeros(1000, dtype=torch.int64)
    flipped = corrupt(labels, uniform(2, 0.3), 0, "exact").flipped
    assert int(flipped.sum()) == 300
    halves = flipped.reshape(2, 500).sum(1)
    assert (halves - 150).abs().max() < 5 * (1000 * 0.3 * 0.7 / 4) ** 0.5


def test_the_largest_remainders_are_rounded_up():
    matrix = torch.tensor([[0.56, 0.28, 0.16], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    given = corrupt(torch.zeros(10, dtype=torch.int64), matrix, 0, "exact").labels
    assert given.bincount().tolist() == [
        6,
        3,
        1,
    ]  # of 5.6, 2.8 and 1.6 the largest remainders are 0.8 and the first 0.6


def test_exact_uniform_noise_favours_no_class():
    C, n = 30, 100
    labels = torch.arange(C).repeat_interleave(n)
    wrong = corrupt(labels, uniform(C, 0.5), 0, "exact")
    received = wrong.labels[wrong.flipped].bincount(minlength=C)
    assert received.tolist() == [50] * C


@given(labelled(), seeds, st.sampled_from(["multinomial", "exact"]))
def test_noisy_labels_say_what_was_done(case: tuple[Tensor, Tensor], seed: int, draw: str):
    labels, matrix = case
    before = labels.clone()
    noisy = corrupt(labels, matrix, seed, draw)
    assert torch.equal(labels, before)
    assert noisy.labels.dtype == torch.int64
    assert noisy.flipped.tolist() == [given != true for given, true in zip(noisy.labels, before, strict=True)]
    assert torch.equal(noisy.matrix, matrix)
    assert all(matrix[y, z] > 0 for y, z in zip(labels, noisy.labels, strict=True))


@pytest.mark.parametrize("draw", ["multinomial", "exact"])
def test_rate_0_flips_nothing_and_rate_1_everything(draw: str):
    labels = torch.arange(5).repeat_interleave(20)
    assert not corrupt(labels, uniform(5, 0), 0, draw).flipped.any()
    assert corrupt(labels, uniform(5, 1), 0, draw).flipped.all()
    assert corrupt(labels, one_target([1, 2, 3, 4, 0], 1), 0, draw).labels.equal((labels + 1) % 5)


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 1, got 2 at position 1"):
        corrupt(torch.tensor([0, 2]), uniform(2, 0.1), 0)
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 1, got -1 at position 0"):
        corrupt(torch.tensor([-1, 0]), uniform(2, 0.1), 0)
    with pytest.raises(TypeError, match="labels: expected an integer tensor"):
        corrupt(torch.tensor([0.0, 1.0]), uniform(2, 0.1), 0)
    with pytest.raises(ValueError, match="draw: expected one of 'multinomial', 'exact', got 'gauss'"):
        corrupt(torch.tensor([0, 1]), uniform(2, 0.1), 0, "gauss")
    with pytest.raises(ValueError, match="transpose it"):
        corrupt(torch.tensor([0, 1]), torch.tensor([[0.9, 0.3], [0.1, 0.7]]), 0)
