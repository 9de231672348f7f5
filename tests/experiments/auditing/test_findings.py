"""The tables of findings, as `ntdne audit` writes them, and what the page shows of them."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from tests.experiments.auditing.helpers import everything_in


def archive() -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes, of which class 2 is in two groups; image 1 is copied exactly, image 2 nearly."""
    source = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = source.standard_normal((300, 12)) + 12 * np.eye(3, 12)[labels]
    features[2::6, 7] += 12
    features[298], features[299] = features[1], features[2] + 0.02
    return features.astype(np.float32), labels


def tables(*arguments: object, ntdne, labels: np.ndarray) -> dict[str, pd.DataFrame]:
    np.save("labels.npy", labels)
    assert ntdne("audit", *arguments, "--output", "out") == 0
    return {path.stem: pd.read_csv(path) for path in Path("out/findings").iterdir()}


def test_copies_with_other_labels_come_before_those_in_other_splits(ntdne):
    features, labels = archive()
    labels[298] = 0
    splits = np.where(np.arange(300) == 299, "test", "train")
    np.savez("some.npz", features=features, labels=labels, split=splits)
    copies = tables("some.npz", ntdne=ntdne, labels=labels)["copies"]
    assert copies["image"].tolist() == [1, 298, 2, 299]
    assert copies["group"].tolist() == [1, 1, 2, 2]
    assert copies["exact"].tolist() == [False, True, False, False]
    assert copies["several_labels"].tolist() == [True, True, False, False]
    assert copies["several_splits"].tolist() == [False, False, True, True]
    text = Path("out/audit.html").read_text()
    assert text.index(">Copies with different labels</h2>") < text.index(">Other copies</h2>")


def test_folders_named_after_splits_are_splits(ntdne):
    features, labels = archive()
    np.save("some.npy", features)
    Path("names.txt").write_text("\n".join(f"{'test' if i == 299 else 'Train'}/{i}.png" for i in range(300)))
    copies = tables("some.npy", "--labels", "labels.npy", "--paths", "names.txt", ntdne=ntdne, labels=labels)["copies"]
    assert copies.loc[copies["several_splits"], "split"].tolist() == ["Train", "test"]


def test_unlabelled_images_have_two_classes_and_how_often_such_are_right(ntdne):
    features, labels = archive()
    hidden = np.arange(300) % 7 == 0
    true, labels = labels, np.where(hidden, -1, labels)
    np.save("some.npy", features)
    found = tables("some.npy", "--labels", "labels.npy", ntdne=ntdne, labels=labels)["unlabelled"]
    assert sorted(found["image"]) == np.flatnonzero(hidden).tolist()
    assert (found["predicted_label"] == true[found["image"]]).all()
    assert (found["second_label"] != found["predicted_label"]).all()
    assert found["suggested_share"].is_monotonic_decreasing
    assert found["sure"].all()
    assert (found["agreement"] > 0.9).all()
    assert re.search(r"43 are sure", Path("out/audit.html").read_text())


def test_a_class_of_two_groups_and_a_group_of_two_classes_are_named(ntdne):
    features, labels = archive()
    labels[(labels == 0) & (np.random.default_rng(1).random(300) < 0.5)] = 5
    np.save("some.npy", features)
    found = tables("some.npy", "--labels", "labels.npy", ntdne=ntdne, labels=labels)["classes"]
    assert found["finding"].tolist() == ["merge", "split"]
    assert found["class"].astype(int).tolist() == [0, 2]
    assert int(found["other_class"][0]) == 5
    columns = ("examples", "other_examples")
    halves = [{features[int(image), 7] > 6 for image in found[column][1].split()} for column in columns]
    assert sorted(map(list, halves)) == [[False], [True]]
    assert "Classes to merge or split</h2>" in Path("out/audit.html").read_text()


def test_an_archive_without_findings_has_empty_tables_in_either_format(ntdne):
    features, labels = archive()
    kept = np.arange(298) % 6 != 2
    features, labels = features[:298][kept], labels[:298][kept]
    np.save("some.npy", features)
    found = tables("some.npy", "--labels", "labels.npy", ntdne=ntdne, labels=labels)
    assert [len(found[name]) for name in ("copies", "outliers", "unlabelled", "classes")] == [0] * 4
    assert "No image stands out" in Path("out/audit.html").read_text()
    given = ["audit", "some.npy", "--labels", "labels.npy", "--format", "parquet", "--output", "other"]
    assert ntdne(*given) == 0
    for name, frame in found.items():
        assert list(pd.read_parquet(f"other/findings/{name}.parquet").columns) == list(frame.columns)
    assert not [path for path in everything_in(Path("other")) if path.suffix == ".partial"]
