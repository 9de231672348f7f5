"""Features, labels and paths out of every kind of file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ntdne_kernels.experiments import columns
from tests.experiments.auditing.helpers import NAMES, WRONG, clusters


@pytest.mark.parametrize("kind", ["npz", "parquet", "npy", "txt", "csv", "bytes", "own columns"])
def test_every_kind_of_file_says_the_same(ntdne, kind):
    features, codes = clusters()
    np.save("features.npy", features)
    labels = [NAMES[code] for code in codes]
    labels[5] = ""
    paths = [f"{i}, of many.png" for i in range(len(labels))]
    given = ["features.npy", "--labels", f"list.{kind}", "--paths", f"list.{kind}"]
    if kind == "npz":
        np.savez("list.npz", features=features.astype(np.float64), labels=labels, paths=paths)
        given = ["list.npz"]
    elif kind in ("parquet", "own columns"):
        frame = pd.DataFrame({"path": paths, "label": [label or None for label in labels], "features": list(features)})
        given = ["list.parquet"]
        if kind == "own columns":
            frame.columns = ["file", "class", "embedding"]
            given += ["--path-column", "file", "--label-column", "class", "--features-column", "embedding"]
        frame.to_parquet("list.parquet")
    elif kind == "csv":
        pd.DataFrame({"path": paths, "label": labels}).to_csv("list.csv", index=False)
    elif kind == "txt":
        Path("labels.txt").write_text("\n".join(labels) + "\n")
        Path("list.txt").write_text("\n".join(paths))
        given[2] = "labels.txt"
    else:
        np.save("labels.npy", np.array(labels, "S" if kind == "bytes" else "U"))
        np.save("list.npy", paths)
        given[1:] = ["--labels", "labels.npy", "--paths", "list.npy"]
    assert ntdne("audit", *given, "--output", "out") == 0
    table = pd.read_csv("out/audit.csv", keep_default_na=False)
    assert table.path.tolist() == paths
    assert table.given_label.tolist() == labels
    assert table.predicted_label.tolist() == ["lake"] * 12 + ["pond"] * 12
    assert table.path[table.is_label_issue].tolist() == [paths[WRONG]]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_labels_of_another_encoding_stay_apart(ntdne, files, kind):
    features, codes = clusters(classes=3)
    np.save("features.npy", features)
    lines = [["forêt", "forèt", "foröt"][code] for code in codes]
    Path(f"names.{kind}").write_text("\n".join(["label"] * (kind == "csv") + lines) + "\n", encoding="latin-1")
    assert ntdne("audit", "features.npy", "--labels", f"names.{kind}", "--output", "out") == 0
    assert pd.read_csv("out/audit.csv").given_label.nunique() == 3


def test_numbers_in_text_are_numbers_and_a_corrected_list_can_be_read_again(ntdne, files):
    labels = np.load("labels.npy").astype(str)
    labels[7] = ""
    Path("labels.csv").write_text("\n".join(["label", *labels]) + "\n")
    assert ntdne("audit", "features.npy", "--labels", "labels.csv", "--fix", "--output", "first") == 0
    fixed = pd.read_csv("first/corrected.csv", keep_default_na=False)
    assert fixed.label[7] == ""
    assert ntdne("audit", "features.npy", "--labels", "first/corrected.csv", "--output", "again") == 0
    again = pd.read_csv("again/audit.csv", dtype={"given_label": "Int64"})
    assert again.given_label.isna().tolist() == [i == 7 for i in range(24)]
    assert not again.is_label_issue.any()


def test_names_that_look_like_something_else_stay_names(ntdne, files):
    names = np.where(np.load("labels.npy") == 0, "007", "NA")
    pd.DataFrame({"label": names}).to_csv("labels.csv", index=False)
    assert ntdne("audit", "features.npy", "--labels", "labels.csv", "--output", "out", "--fix") == 0
    table = pd.read_csv("out/corrected.csv", dtype=str, keep_default_na=False)
    assert table.label.tolist() == ["007"] * 12 + ["NA"] * 12


def test_text_of_whole_numbers_is_integers_also_where_pandas_wrote_them(ntdne, files):
    labels = np.load("labels.npy")
    Path("labels.txt").write_text("\n".join(f"{label}.0" if i else "" for i, label in enumerate(labels)))
    assert ntdne("audit", "features.npy", "--labels", "labels.txt", "--output", "out") == 0
    table = pd.read_csv("out/audit.csv", dtype=str, keep_default_na=False)
    assert table.given_label[:3].tolist() == ["", "0", "0"]


def test_text_as_savetxt_writes_it_is_integers_and_minus_one_is_unlabelled(ntdne, files):
    labels = np.load("labels.npy")
    np.savetxt("labels.txt", np.where(np.arange(24) == 5, -1, labels))
    assert ntdne("audit", "features.npy", "--labels", "labels.txt", "--output", "out") == 0
    table = pd.read_csv("out/audit.csv", dtype=str, keep_default_na=False)
    assert table.given_label.tolist() == [str(label) if i != 5 else "" for i, label in enumerate(labels)]


def test_blanks_around_a_name_make_no_second_class(ntdne, files):
    names = [f"{' ' * (i % 3)}{NAMES[label]}{' ' * (i % 2)}" for i, label in enumerate(np.load("labels.npy"))]
    pd.DataFrame({"label": names}).to_csv("labels.csv", index=False)
    assert ntdne("audit", "features.npy", "--labels", "labels.csv", "--output", "out") == 0
    assert set(pd.read_csv("out/audit.csv").given_label) == set(NAMES)


def test_negative_labels_in_text_are_no_names(ntdne, files, capsys):
    Path("labels.txt").write_text("-2\n" + "-1\n" * 23)
    assert ntdne("audit", "features.npy", "--labels", "labels.txt", "--output", "out") == 2
    assert "labels: expected -1 (unlabelled) or a class from 0, got -2 at row 0" in capsys.readouterr().err


def test_csv_whose_rows_are_longer_than_its_header_is_refused(ntdne, files, capsys):
    """R's write.table names no column of row names: the cells of all rows stand under the name before their own."""
    rows = (f"{row},{label}\n" for row, label in enumerate(np.load("labels.npy"), start=1))
    Path("labels.csv").write_text("label\n" + "".join(rows))
    assert ntdne("audit", "features.npy", "--labels", "labels.csv", "--output", "out") == 2
    assert "expected at most 1 cells in a row, as in the header, got more in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["list.npz", "list.parquet"])
def test_what_memory_does_not_hold_is_refused_before_it_is_read(ntdne, capsys, monkeypatch, file):
    features, labels = clusters()
    np.savez("list.npz", features=features, labels=labels)
    pd.DataFrame({"features": list(features), "label": labels}).to_parquet("list.parquet")
    monkeypatch.setattr(columns, "free_memory", lambda: 500.0)
    assert ntdne("audit", file) == 2
    assert "save its features as .npy" in capsys.readouterr().err
