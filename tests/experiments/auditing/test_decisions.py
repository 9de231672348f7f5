"""`ntdne audit --decisions`: what people decided on an archive's labels, in the next audit of it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ntdne_kernels.experiments.reviewing.decisions import archive_id
from tests.experiments.auditing.helpers import LABELS, WRONG, clusters

WHEN = "2026-01-31T12:34:56.789Z"


def write_decisions(file: str, rows: list[tuple[int, str, str]]) -> None:
    """Rows of image, verdict and decided class on the archive of labels.npy."""
    labels = np.load("labels.npy")
    lines = ["image,given,verdict,decided,when,archive"]
    lines += [
        f"{image},{'' if labels[image] < 0 else labels[image]},{verdict},{decided},{WHEN},{archive_id(None, labels)}"
        for image, verdict, decided in rows
    ]
    Path(file).write_text("\n".join(lines) + "\n")


def test_decisions_leave_no_suspect_among_checked_labels_and_are_in_all_files(ntdne, files, capsys):
    rows = [(WRONG, "relabel", "0"), (5, "keep", "0"), (14, "exclude", ""), (20, "unsure", ""), (21, "relabel", "reed")]
    write_decisions("decisions.csv", rows)
    assert ntdne("audit", "features.npy", *LABELS, "--decisions", "decisions.csv", "--fix", "--output", "out") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "4 labels are checked, 2 of them were wrong, 1 images are excluded; of 1 people cannot tell, and they come last"
        "; how many others are wrong is not said by decisions yet: 3 labels are checked, and 100 are needed"
    )
    assert "24 images, 3 classes: 0 of 24 judged labels are suspect" in said[1]
    table = pd.read_csv("out/audit.csv")
    assert table.given_label.tolist() == np.load("labels.npy").tolist()
    assert table.index[table.checked].tolist() == [WRONG, 5, 14, 21]
    assert table.decided_label[[WRONG, 5, 21]].tolist() == ["0", "0", "reed"]
    assert table.decided_label.isna().tolist() == [image == 14 for image in range(24)]
    assert sorted(table["rank"][table.checked]) == [21, 22, 23, 24]
    assert table["rank"][20] == 20
    fixed = pd.read_csv("out/corrected.csv").label
    assert (
        fixed.tolist() == table.decided_label.tolist()[:14] + fixed.tolist()[14:15] + table.decided_label.tolist()[15:]
    )
    assert fixed.isna()[14]


def test_decisions_of_several_people_that_differ_are_refused_unless_told(ntdne, files, capsys):
    write_decisions("one.csv", [(WRONG, "relabel", "0")])
    write_decisions("two.csv", [(WRONG, "keep", "1")])
    command = ["audit", "features.npy", *LABELS, "--decisions", "one.csv", "two.csv", "--output", "out"]
    assert ntdne(*command) == 2
    assert "1 images have conflicting decisions" in capsys.readouterr().err
    assert not Path("out").exists()
    assert ntdne(*command, "--conflicts", "latest") == 0
    assert capsys.readouterr().out.startswith("1 labels are checked, 0 of them were wrong; ")


def test_decisions_of_another_archive_are_refused(ntdne, files, capsys):
    write_decisions("decisions.csv", [(WRONG, "relabel", "0")])
    np.save("labels.npy", 1 - np.load("labels.npy"))
    assert ntdne("audit", "features.npy", *LABELS, "--decisions", "decisions.csv", "--output", "out") == 2
    assert "decisions.csv is of another archive" in capsys.readouterr().err


def test_what_people_settled_does_not_come_up_again(ntdne):
    features, labels = clusters()
    features[5], labels[5], labels[20] = features[1], 1, -1
    np.save("features.npy", features)
    np.save("labels.npy", labels)

    def found(*options: str) -> tuple[list[int], list[int], set[int]]:
        assert ntdne("audit", "features.npy", *LABELS, "--output", "out", *options) == 0
        copies, unlabelled = (pd.read_csv(f"out/findings/{name}.csv") for name in ("copies", "unlabelled"))
        index = Path("out/review/data/index.js").read_text().removeprefix('receive("index",').removesuffix(");\n")
        return copies.image[copies.several_labels].tolist(), unlabelled.image.tolist(), set(json.loads(index)["rows"])

    assert found() == ([1, 5], [20], set(range(24)))
    write_decisions("decisions.csv", [(5, "relabel", "0"), (20, "relabel", "1")])
    assert found("--decisions", "decisions.csv") == ([], [], set(range(24)) - {5, 20})
