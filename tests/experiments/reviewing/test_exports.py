import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ntdne_kernels.audit import audit_labels
from ntdne_kernels.experiments.reviewing import read_decisions
from ntdne_kernels.interchange import to_frame

READ = {"keep_default_na": False, "na_values": [""], "dtype": {"given_label": str, "corrected_label": str}}
LABELS = ["lake"] * 4 + ["pond"] * 4


@pytest.fixture
def audited(ntdne) -> Path:
    """Features of eight images with labels and names, an audit of them, and decisions on three."""
    features = np.eye(2, 6)[np.repeat([0, 1], 4)] + 0.1 * np.random.default_rng(0).standard_normal((8, 6))
    np.save("features.npy", features.astype(np.float32))
    np.save("labels.npy", np.array(LABELS))
    Path("files.txt").write_text("".join(f"{i}.png\n" for i in range(8)))
    paths = [f"{i}.png" for i in range(8)]
    to_frame(audit_labels(features.astype(np.float32), LABELS), paths=paths).to_csv("audit.csv")
    Path("decisions.csv").write_text(
        "image,given,verdict,decided,when,archive\n"
        "1.png,lake,relabel,sea,2026-01-31T12:34:56.789Z,\n4.png,pond,exclude,,,\n5.png,pond,keep,pond,,\n"
    )
    return Path("audit.csv")


def test_decisions_stand_beside_the_scores_in_cleanlabs_names(audited):
    decisions = read_decisions(Path("decisions.csv"), [f"{i}.png" for i in range(8)], LABELS)
    audit = audit_labels(np.load("features.npy"), LABELS)
    before = to_frame(audit)
    frame = decisions.add_to(before)
    assert list(frame.columns) == [*before.columns, "verdict", "corrected_label", "decided_at"]
    assert "verdict" not in before
    pd.testing.assert_frame_equal(frame[before.columns], before)
    assert frame["corrected_label"].astype(object).where(frame["corrected_label"].notna(), None).tolist() == [
        *("lake", "sea", "lake", "lake", None, "pond", "pond", "pond")
    ]
    assert frame["verdict"].dropna().to_dict() == {1: "relabel", 4: "exclude", 5: "keep"}
    assert frame["decided_at"].dropna().to_dict() == {1: pd.Timestamp("2026-01-31T12:34:56.789Z")}


def test_exports_have_the_scores_of_the_audit_and_the_decisions(ntdne, audited):
    tools = ("fiftyone", "label-studio", "cvat", "cleanlab")
    assert ntdne("relabel", "features.npy", "decisions.csv", "--scores", audited, "--export", *tools) == 0
    folder = Path("relabelled/features")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        *("labels.csv", "labels.npy", "relabel.json", "cleanlab.csv", "fiftyone/samples.json", "cvat/labels.json"),
        *("cvat/annotations.xml", "label-studio/tasks.json", "label-studio/label_config.xml"),
    }
    table, scores = pd.read_csv(folder / "cleanlab.csv", **READ), pd.read_csv(audited, **READ)
    assert table["corrected_label"].fillna("").tolist() == np.load(folder / "labels.npy").tolist()
    assert table["label_score"].tolist() == scores["label_score"].tolist()
    sample = json.loads((folder / "fiftyone/samples.json").read_text())["samples"][1]
    assert sample["corrected_label"]["label"] == "sea"
    assert sample["label_score"] == scores["label_score"][1]
    assert sample["tags"] == ["relabel"]


def test_exports_without_scores_have_the_labels_alone(ntdne, audited):
    assert ntdne("relabel", "features.npy", "decisions.csv", "--export", "fiftyone", "cleanlab") == 0
    sample = json.loads(Path("relabelled/features/fiftyone/samples.json").read_text())["samples"][0]
    assert sample == {
        "filepath": "0.png",
        "tags": [],
        "given_label": {"_cls": "Classification", "label": "lake"},
        "corrected_label": {"_cls": "Classification", "label": "lake"},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.iloc[1:], "is of other images or labels than features"),
        (lambda frame: frame.assign(path=frame["path"] + "x"), "is of other images or labels"),
        (lambda frame: frame.assign(given_label="sea"), "is of other images or labels"),
        (lambda frame: frame[["path"]], "expected the table of ntdne audit"),
    ],
)
def test_scores_of_other_images_are_refused(ntdne, audited, capsys, change, message):
    change(pd.read_csv(audited)).to_csv(audited, index=False)
    assert ntdne("relabel", "features.npy", "decisions.csv", "--scores", audited, "--export", "cvat") == 2
    assert message in capsys.readouterr().err
    assert not Path("relabelled").exists()


def test_tools_need_the_names_of_files(ntdne, audited, capsys):
    os.remove("files.txt")
    Path("decisions.csv").write_text("image,given,verdict,decided,when,archive\n1,lake,exclude,,,\n")
    assert ntdne("relabel", "features.npy", "decisions.csv", "--export", "cvat") == 2
    assert "features has no names of its images' files" in capsys.readouterr().err
    assert ntdne("relabel", "features.npy", "decisions.csv", "--export", "cleanlab") == 0
