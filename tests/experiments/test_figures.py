"""The report's figures, from made-up runs: they show the runs' numbers."""

import statistics
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from ntdne_kernels.experiments import figures
from ntdne_kernels.experiments.finished import Run, read_runs
from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.report import write_report
from tests.experiments.helpers import CLASSES, write_run


def drawn(draw: Any, runs: list[Run]) -> Figure:
    figure = draw(runs, figures.line_styles(runs))
    assert figure is not None
    return figure


def labelled(axis: Any) -> dict[str, Any]:
    return {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}


def points(axis: Any) -> np.ndarray:
    return np.concatenate([np.asarray(cloud.get_offsets()) for cloud in axis.collections])


def test_knn_by_rate_shows_means_and_deviations_and_the_papers_curves(tmp_path):
    for rate, seeds in ((0.1, (0.8, 0.9)), (0.3, (0.6,))):
        for seed, knn in enumerate(seeds):
            write_run(tmp_path, "SNCA", rate, seed=seed, metrics={"knn": knn})
    ours, theirs = drawn(figures.knn_by_rate, read_runs(tmp_path)).axes
    (line, _, (bars,)) = labelled(ours)["SNCA"]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 85], [0.3, 60]])
    spread = 100 * statistics.stdev([0.8, 0.9])
    np.testing.assert_allclose([np.ptp(each[:, 1]) for each in bars.get_segments()], [2 * spread, 0], atol=1e-9)
    assert set(labelled(theirs)) == set(METHODS)
    np.testing.assert_allclose(labelled(theirs)["SNCA"].get_xydata(), [[0.1, 90.65], [0.3, 82.70]])


def test_a_loss_has_one_colour_in_all_figures_and_variants_other_lines(tmp_path):
    losses = [*METHODS, "NTDNE-broadcast"]
    for loss in losses:
        for rate in (0.1, 0.3):
            write_run(tmp_path, loss, rate)
    write_run(tmp_path, "NTDNE", 0.3, variant="k=auto")
    runs = read_runs(tmp_path)
    expected = {loss: colour.lower() for loss, colour in figures.COLOURS.items()}
    assert len(set(expected.values())) == len(losses)
    for draw in (figures.precision_recall, figures.training_curves):
        lines = labelled(drawn(draw, runs).axes[1])
        colours = {name: matplotlib.colors.to_hex(line.get_color()) for name, line in lines.items()}
        assert colours == expected | {"NTDNE k=auto": expected["NTDNE"]}
        assert lines["NTDNE"].get_linestyle() != lines["NTDNE k=auto"].get_linestyle()


def test_precision_is_the_mean_over_seeds(tmp_path):
    for seed, height in enumerate((0.2, 0.6)):
        write_run(tmp_path, seed=seed, arrays={"pr_precision": np.full(101, height)})
    line = labelled(drawn(figures.precision_recall, read_runs(tmp_path)).axes[0])["NTDNE"]
    np.testing.assert_allclose(line.get_ydata(), 0.4)


def test_sensitivity_to_k_has_numbers_on_the_axis_and_words_as_lines(tmp_path):
    for variant, seed, knn in (
        ("k=0.1", 0, 0.4),
        ("k=0.1", 1, 0.6),
        ("k=0.5", 0, 0.3),
        ("k=auto", 0, 0.8),
        ("k=none", 0, 0.2),
    ):
        write_run(tmp_path, variant=variant, seed=seed, metrics={"knn": knn})
    write_run(tmp_path, metrics={"knn": 0.7}, settings={"loss_options": {"k": 0.3}})
    write_run(tmp_path, variant="k=0.3, q=0.5", metrics={"knn": 0.1})
    (axis,) = drawn(figures.sensitivity_to_k, read_runs(tmp_path)).axes
    lines = labelled(axis)
    np.testing.assert_allclose(lines["NTDNE, k a number"].get_xydata(), [[0.1, 50], [0.3, 70], [0.5, 30]])
    np.testing.assert_allclose(lines["NTDNE, k = auto"].get_ydata(), 80)
    np.testing.assert_allclose(lines["NTDNE, k = none (never pruned)"].get_ydata(), 20)
    assert len(lines) == 3


def test_a_sweep_over_k_is_drawn_in_its_own_figure_alone(grid):
    runs = [run for run in read_runs(grid) if run.dataset == "AID"]
    for draw in (figures.precision_recall, figures.training_curves):
        assert set(labelled(drawn(draw, runs).axes[1])) == {"SNCA", "NTDNE", "NTDNE k=auto", "NTDNE k=none"}


def test_training_curves_are_the_history_in_percent_by_epochs_from_1(tmp_path):
    write_run(tmp_path, "NTDNE", settings={"epochs": 3})
    write_run(tmp_path, "NSL", settings={"epochs": 1})
    accuracy, pruned, score = drawn(figures.training_curves, read_runs(tmp_path)).axes
    np.testing.assert_allclose(labelled(accuracy)["NTDNE"].get_xydata(), [[1, 20], [2, 30], [3, 40]])
    assert labelled(accuracy)["NSL"].get_marker() == "o"  # a line of one point would not be seen
    np.testing.assert_allclose(labelled(pruned)["NTDNE"].get_ydata(), 25)
    np.testing.assert_allclose(labelled(score)["NTDNE"].get_ydata(), 40)
    assert set(labelled(pruned)) == set(labelled(score)) == {"NTDNE"}


def test_histograms_are_shares_of_right_and_of_wrong_labels(tmp_path):
    scores = np.array([0.99, 0.99, 0.99, 0.5, 0.01, 0.5])
    flipped = np.array([False, False, False, False, True, True])
    write_run(tmp_path, arrays={"scores": scores, "flipped": flipped})
    (axis,) = drawn(figures.score_histograms, read_runs(tmp_path)).axes
    right, wrong = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert {place: height for place, height in enumerate(right) if height} == {12: 25, 24: 75}
    assert {place: height for place, height in enumerate(wrong) if height} == {0: 50, 12: 50}


def test_maps_have_a_panel_for_each_loss_and_rate_and_say_what_was_not_run(tmp_path):
    for loss, rate in (("NSL", 0.1), ("NSL", 0.3), ("SNCA", 0.3)):
        write_run(tmp_path, loss, rate)
    axes = drawn(figures.feature_maps, read_runs(tmp_path)).axes
    assert [[text.get_text() for text in axis.texts] for axis in axes] == [[], [], ["not run"], []]
    assert [len(points(axis)) for axis in axes if axis.collections] == [12, 12, 12]
    assert [axis.get_ylabel() for axis in axes] == ["NSL", "", "SNCA", ""]


def test_maps_repeat_and_keep_clusters_together(tmp_path):
    labels = np.repeat([0, 1], 10)
    features = np.eye(8)[labels] + np.random.default_rng(0).normal(scale=0.05, size=(20, 8))
    write_run(tmp_path, arrays={"test_features": features.astype(np.float32), "test_labels": labels})
    first, again = (drawn(figures.feature_maps, read_runs(tmp_path)).axes[0] for _ in range(2))
    np.testing.assert_array_equal(points(first), points(again))
    a, b = (np.asarray(cloud.get_offsets()) for cloud in first.collections)
    spread = max(np.linalg.norm(each - each.mean(0), axis=1).max() for each in (a, b))
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * spread


@pytest.mark.parametrize(
    "features",
    [np.arange(24.0).reshape(12, 2), np.arange(12.0)[:, None], np.ones((12, 8))],
    ids=["two numbers", "one number", "all the same"],
)
def test_features_that_t_sne_has_no_use_for_are_shown_as_they_are(tmp_path, features):
    write_run(tmp_path, arrays={"test_features": features, "test_labels": np.zeros(12, int)})
    shown = points(drawn(figures.feature_maps, read_runs(tmp_path)).axes[0])
    np.testing.assert_array_equal(shown[:, : features.shape[1]], features[:, :2])


@pytest.mark.parametrize("M", [2, 3, 5])
def test_maps_of_few_points_are_drawn(tmp_path, M):
    arrays = {"test_features": np.eye(M, 8, dtype=np.float32), "test_labels": np.arange(M) % 3}
    write_run(tmp_path, arrays=arrays)
    assert np.isfinite(points(drawn(figures.feature_maps, read_runs(tmp_path)).axes[0])).all()


def test_many_points_are_thinned_over_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "POINTS", 6)
    labels = np.repeat([0, 1, 2], 10)
    write_run(tmp_path, arrays={"test_features": np.eye(30, 2), "test_labels": labels})
    (axis,) = drawn(figures.feature_maps, read_runs(tmp_path)).axes
    assert [len(cloud.get_offsets()) for cloud in axis.collections] == [2, 2, 2]


def test_before_and_after_stand_side_by_side(tmp_path):
    before, after, labels = np.full((4, 2), 1.0), np.full((4, 2), 5.0), np.array([0, 0, 1, 1])
    arrays = {"untrained_features": before, "test_features": after, "test_labels": labels}
    write_run(tmp_path, "Contrastive", noise="none", arrays=arrays)
    write_run(tmp_path, "NSL", noise="none")
    left, right = drawn(figures.before_and_after, read_runs(tmp_path)).axes
    assert (left.get_title(), right.get_title()) == ("Contrastive: before training", "Contrastive: after training")
    np.testing.assert_array_equal(points(left), before)
    np.testing.assert_array_equal(points(right), after)
    assert list(labelled(left)) == CLASSES[:2]


def test_retrieved_images_are_framed_by_whether_they_are_right(tmp_path):
    labels = np.array([[0, 0, 1, 0, 2, 0], [1, 1, 1, 1, 1, 0]])
    images = np.random.default_rng(0).integers(256, size=(2, 6, 8, 8, 3), dtype=np.uint8)
    write_run(tmp_path, arrays={"retrieval_images": images, "retrieval_labels": labels})
    axes = drawn(figures.retrieval_sheet, read_runs(tmp_path)).axes
    for place, axis in enumerate(axes):
        row, column = divmod(place, 6)
        np.testing.assert_array_equal(axis.images[0].get_array(), images[row, column])
        sign, colour = ("✓", figures.RIGHT) if labels[row, column] == labels[row, 0] else ("✗", figures.WRONG)
        if column == 0:
            sign, colour = "query:", figures.QUERY
        assert axis.get_xlabel() == f"{sign} {CLASSES[labels[row, column]]}"
        assert matplotlib.colors.to_hex(axis.spines["top"].get_edgecolor()) == colour.lower()
    assert len(axes) == 12


def test_the_sheet_shows_the_papers_three_losses_and_few_others(tmp_path):
    for loss in METHODS:
        write_run(tmp_path, loss)
    axes = drawn(figures.retrieval_sheet, read_runs(tmp_path)).axes
    assert [axis.get_ylabel() for axis in axes[: 4 * 6 : 6]] == ["D-CNN", "SNCA", "t-RNSL", "NTDNE"]


def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    write_run(tmp_path / "runs", dataset="a $\\frac$ b")
    assert len(write_report(tmp_path / "runs", tmp_path / "out")) > 3
