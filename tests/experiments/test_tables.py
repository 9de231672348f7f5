"""The report's tables, from made-up runs: their numbers are those of the runs and of the paper."""

import statistics

from ntdne_kernels.experiments.finished import Run, read_runs
from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.settings import read_preset
from ntdne_kernels.experiments.tables import (
    METRICS,
    Table,
    differences_from_paper,
    metric_table,
    missing_cells,
    run_table,
)
from tests.experiments.helpers import write_run

PAPER = read_preset("paper")
RECIPE = {"weights": "imagenet"} | {name: value for name, value in PAPER.items() if name != "losses"}
NBSP = "\N{NO-BREAK SPACE}"


def table_of(key: str, runs: list[Run]) -> Table:
    table = metric_table(next(metric for metric in METRICS if metric.key == key), runs)
    assert table is not None
    return table


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.header, table.rows[row].cells, strict=True))


def bold(table: Table, row: int) -> set[str]:
    return {table.header[place] for place in table.rows[row].best}


def test_each_metric_has_a_table_of_the_runs_numbers_in_percent(grid):
    runs = read_runs(grid)
    places = {("AID", "uniform", 0.1): "0.1", ("AID", "uniform", 0.5): "0.5", ("digits", "none", 0.0): ""}
    for metric in METRICS[:10]:
        table = table_of(metric.key, runs)
        rows = [row.cells for row in table.rows if not row.paper]
        assert [row[:4] for row in rows] == [[*cell[:2], rate, "ours"] for cell, rate in places.items()]
        for cell, row in zip(places, rows, strict=True):
            values = {run.name: run.metrics[metric.key] for run in runs if run.cell == cell}
            for name, shown in zip(table.header[4:], row[4:], strict=True):
                assert shown == (f"{100 * values[name]:.{metric.decimals}f}" if name in values else "–")


def test_columns_are_the_papers_losses_in_its_order_then_variants_and_others(tmp_path):
    for loss in ("Contrastive", *reversed(METHODS)):
        write_run(tmp_path, loss)
    write_run(tmp_path, "SNCA", variant="sigma=0.2")
    write_run(tmp_path, "NTDNE", variant="k=auto")
    header = table_of("knn", read_runs(tmp_path)).header
    assert header[4:] == [*METHODS, "SNCA sigma=0.2", "NTDNE k=auto", "Contrastive"]


def test_rows_go_by_dataset_noise_and_rate(tmp_path):
    places = [
        ("AID", "none", 0.5, ""),
        ("AID", "uniform", 0.1, "0.1"),
        ("AID", "uniform", 0.7, "0.7"),
        ("AID", "label-dependent", 0.3, "0.3"),
        ("AID", "matrix", 0.5, ""),
        ("digits", "uniform", 0.5, "0.5"),
    ]
    for dataset, noise, rate, _ in reversed(places):
        write_run(tmp_path, dataset=dataset, noise=noise, rate=rate)
    rows = [row.cells[:3] for row in table_of("knn_given", read_runs(tmp_path)).rows]
    assert rows == [[dataset, noise, shown] for dataset, noise, _, shown in places]


def test_seeds_are_averaged_with_their_deviation_and_number(tmp_path):
    values = [0.5, 0.61, 0.57]
    for seed, value in enumerate(values):
        write_run(tmp_path, seed=seed, metrics={"knn": value})
    mean, spread = 100 * sum(values) / 3, 100 * statistics.stdev(values)
    cell = cells(table_of("knn", read_runs(tmp_path)), 0)["NTDNE"]
    assert cell.replace(NBSP, " ") == f"{mean:.1f} ± {spread:.1f} (n = 3)" == "56.0 ± 5.6 (n = 3)"


def test_the_best_of_ours_is_bold_also_if_the_paper_is_better_and_equal_ones_both(tmp_path):
    for loss, rate, knn in (("NSL", 0.1, 0.5), ("SNCA", 0.1, 0.6), ("NSL", 0.5, 0.4), ("SNCA", 0.5, 0.39999)):
        write_run(tmp_path, loss, rate, metrics={"knn": knn})
    table = table_of("knn", read_runs(tmp_path))
    assert [row.paper for row in table.rows] == [False, True, False, True]
    assert [bold(table, row) for row in range(4)] == [{"SNCA"}, set(), {"NSL", "SNCA"}, set()]


def test_the_papers_numbers_stand_below_ours(tmp_path):
    for loss in ("SNCA", "NTDNE", "Contrastive"):
        write_run(tmp_path, loss)
    runs = read_runs(tmp_path)
    theirs = cells(table_of("knn", runs), 1)
    assert (theirs["SNCA"], theirs["NTDNE"], theirs["Contrastive"]) == ("64.55", "90.25", "")
    assert cells(table_of("nmi", runs), 1)["NTDNE"] == "86.82"
    assert cells(table_of("acc", runs), 1)["NTDNE"] == "89.45"
    for key in ("knn_given", "flip_auroc", "map20_total"):
        assert not any(row.paper for row in table_of(key, runs).rows)


def test_the_papers_map_is_compared_under_a_doubt(tmp_path):
    write_run(tmp_path, "SNCA", settings=RECIPE)
    runs = read_runs(tmp_path)
    for normaliser in ("hits", "min"):
        theirs = cells(table_of(f"map20_{normaliser}", runs), 1)
        assert (theirs["SNCA"], theirs["whose"]) == ("68.92", "paper (convention not stated)")
    assert all("normaliser" in table_of(f"map20_{name}", runs).title for name in ("total", "hits", "min"))


def test_settings_other_than_the_papers_are_told(tmp_path):
    for loss in ("NTDNE", "SNCA"):
        write_run(tmp_path / "same", loss, settings=RECIPE | {"loss_options": PAPER["losses"][loss]})
    runs = read_runs(tmp_path / "same")
    assert cells(table_of("knn", runs), 1)["whose"] == "paper"
    assert differences_from_paper(runs, {"NTDNE", "SNCA"}) == []

    changes = {"epochs": 3, "weights": "", "loss_options": PAPER["losses"]["NTDNE"] | {"k": "auto"}}
    write_run(tmp_path / "other", "NTDNE", settings=RECIPE | changes)
    write_run(tmp_path / "other", "SNCA", settings=RECIPE | {"epochs": 2})
    runs = read_runs(tmp_path / "other")
    assert cells(table_of("knn", runs), 1)["whose"] == "paper (other settings)"
    assert set(differences_from_paper(runs, {"NTDNE", "SNCA"})) == {
        "epochs 2 or 3 (paper: 100)",
        "weights none (paper: imagenet)",
        "NTDNE k auto (paper: 0.3)",
    }


def test_of_a_losss_variants_the_one_most_like_the_papers_is_compared(tmp_path):
    for k in (0.1, 0.3, "auto"):
        write_run(tmp_path, variant=f"k={k}", settings={"loss_options": {"k": k}})
    theirs = cells(table_of("knn", read_runs(tmp_path)), 1)
    assert {name: cell for name, cell in theirs.items() if name.startswith("NTDNE")} == {
        "NTDNE k=0.1": "",
        "NTDNE k=0.3": "90.25",
        "NTDNE k=auto": "",
    }


def test_few_shot_accuracy_comes_with_its_interval_or_the_seeds_deviation(tmp_path):
    write_run(tmp_path, "NSL", metrics={"few_shot_5": 0.8123, "few_shot_5_ci": 0.0061})
    for seed, value in enumerate((0.7, 0.8)):
        write_run(tmp_path, "SNCA", seed=seed, metrics={"few_shot_5": value, "few_shot_5_ci": 0.0061})
    row = {
        name: cell.replace(NBSP, " ") for name, cell in cells(table_of("few_shot_5", read_runs(tmp_path)), 0).items()
    }
    assert (row["NSL"], row["SNCA"]) == ("81.2 ± 0.6", "75.0 ± 7.1 (n = 2)")


def test_runs_of_one_cell_with_other_settings_are_columns_of_their_own(tmp_path):
    for epochs in (2, 3):
        write_run(tmp_path / str(epochs), settings={"epochs": epochs}, metrics={"nmi": epochs / 10}, dataset="mine")
    write_run(tmp_path, rate=0.1, settings={"epochs": 3}, metrics={"nmi": 0.9}, dataset="mine")
    table = table_of("nmi", read_runs(tmp_path))
    assert table.header[4:] == ["NTDNE epochs=2", "NTDNE epochs=3"]
    assert [row.cells[4:] for row in table.rows] == [["–", "90.0"], ["20.0", "30.0"]]


def test_options_of_the_loss_also_set_runs_apart(tmp_path):
    for sigma in (0.1, 0.05):
        write_run(tmp_path / str(sigma), settings={"loss_options": {"sigma": sigma}})
    assert [run.name for run in read_runs(tmp_path)] == ["NTDNE loss sigma=0.05", "NTDNE loss sigma=0.1"]


def test_the_table_of_runs_has_the_settings_that_differ_and_no_others(tmp_path):
    write_run(tmp_path, "NSL", settings={"lr": 0.1, "batch_size": 8})
    write_run(tmp_path, "SNCA", settings={"lr": 0.2, "batch_size": 8, "loss_options": {"sigma": 0.1}})
    table = run_table(read_runs(tmp_path))
    assert "batch_size" not in table.header
    shown = [(cells(table, row)["loss"], cells(table, row)["lr"]) for row in range(2)]
    assert shown == [("NSL", "0.1"), ("SNCA", "0.2")]
    assert cells(table, 1)["options of the loss"] == "sigma=0.1"


def test_archives_of_one_name_have_rows_of_their_own(tmp_path):
    write_run(tmp_path, "NSL", settings={"data": "/one/features.npy"}, dataset="features")
    write_run(tmp_path, "SNCA", settings={"data": "/other/features.npy"}, dataset="features")
    found = {run.dataset: run.loss for run in read_runs(tmp_path)}
    assert found == {"features (/one/features.npy)": "NSL", "features (/other/features.npy)": "SNCA"}


def test_missing_cells_are_told_by_dataset_and_sweeps_of_k_are_not_missed(grid):
    assert missing_cells(read_runs(grid)) == [
        "AID, uniform, 0.1: NTDNE k=auto, NTDNE k=none",
        "everywhere, of the paper's losses: D-CNN, Triplet, NSL, ArcFace, MAE, SCE, t-RNSL",
    ]
