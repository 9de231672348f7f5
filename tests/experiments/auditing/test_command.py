"""The command `ntdne audit`: what it writes and prints, and what it says of wrong arguments."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ntdne_kernels.audit import SIGMAS
from ntdne_kernels.experiments import run as runs
from tests.experiments.auditing.helpers import LABELS, WRONG, clusters, everything_in


def test_a_wrong_label_is_found_and_corrected_in_a_list(ntdne, files, capsys):
    before = everything_in(Path())
    assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--fix", "--output", "out") == 0
    table = pd.read_csv("out/audit.csv")
    assert table.image.tolist() == list(range(24))
    assert table.index[table.is_label_issue].tolist() == [WRONG]
    assert table.predicted_label[WRONG] == 0
    assert table["rank"][WRONG] == 1
    fixed = pd.read_csv("out/corrected.csv")
    assert list(fixed.columns) == ["image", "label"]
    assert fixed.label.tolist() == [0] * 12 + [1] * 12
    assert {path: path.read_bytes() for path in before} == before
    printed = capsys.readouterr().out
    assert "24 images, 2 classes: 1 of 24 judged labels are suspect" in printed
    findings = [f"out/findings/{name}.csv" for name in ("copies", "outliers", "unlabelled", "classes")]
    written = ["out/audit.html", "out/review/review.html", "out/audit.csv", *findings, "out/corrected.csv"]
    assert printed.splitlines()[1:] == written


def test_files_of_an_earlier_audit_are_named(ntdne, files, capsys):
    assert ntdne("audit", "features.npy", *LABELS, "--fix", "--output", "out") == 0
    assert capsys.readouterr().err == ""
    assert ntdne("audit", "features.npy", *LABELS, "--format", "parquet", "--output", "out") == 0
    said = capsys.readouterr().err.splitlines()
    findings = [f"findings/{name}.csv" for name in ("copies", "outliers", "unlabelled", "classes")]
    assert said == [f"ntdne: out/{name} is of an earlier audit" for name in ("audit.csv", *findings, "corrected.csv")]


def test_outputs_of_another_archive_of_the_same_name_are_not_replaced(ntdne, files, capsys):
    features, labels = clusters()
    for place in ("a", "b"):
        Path(place).mkdir()
        np.savez(f"{place}/data.npz", features=features, labels=labels)
    a, b = (Path(place, "data.npz").resolve() for place in ("a", "b"))
    assert ntdne("audit", "a/data.npz", "--no-review") == 0
    before = everything_in(Path("audit"))
    assert ntdne("audit", "b/data.npz", "--no-review") == 2
    said = f"audit/data holds what was made of {a}, and would be replaced by what is made of {b}; give another folder"
    assert capsys.readouterr().err == f"ntdne: --output: {said}\n"
    assert everything_in(Path("audit")) == before
    assert ntdne("audit", a, "--no-review") == 0
    Path("audit/data/source.json").unlink()  # as an earlier version left it
    assert ntdne("audit", "b/data.npz", "--no-review") == 0


def test_only_fix_writes_a_list(ntdne, files):
    assert ntdne("audit", "features.npy", "--labels", "labels.npy") == 0
    written = ["audit.csv", "audit.html", "findings", "review", "source.json"]
    assert sorted(path.name for path in Path("audit/features").iterdir()) == written


def test_what_cannot_be_judged_is_said(ntdne, files, capsys):
    np.save("labels.npy", np.arange(24))
    assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--output", "out") == 0
    assert "no label could be judged" in capsys.readouterr().out


def test_features_that_carry_no_rate_are_said_first_and_fix_refuses_unless_told(ntdne, files, capsys):
    np.save("labels.npy", np.random.default_rng(0).permutation(24) % 4)
    command = ["audit", "features.npy", "--labels", "labels.npy", "--output", "out"]
    assert ntdne(*command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("how many labels are wrong cannot be said from these features: ")
    summary, sigma = said[1].split("; sigma ")
    assert summary == "24 images, 4 classes: 24 judged labels are ranked, the most suspect first"
    assert float(sigma) in SIGMAS
    table = pd.read_csv("out/audit.csv")
    assert table.is_label_issue.isna().all()
    assert sorted(table["rank"]) == list(range(1, 25))
    text = re.sub(r"<(style|script)>.*?</\1>", "", Path("out/audit.html").read_text(), flags=re.DOTALL)
    assert text.index("How many labels are wrong cannot be said") < text.index("The labels of 24 images")
    assert not re.search("[0-9] labels are suspect|estimated to be wrong|noise rate|confusions|suspects", text)

    assert ntdne(*command, "--fix") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--force writes it all the same" in said
    assert not Path("out/corrected.csv").exists()

    assert ntdne(*command, "--fix", "--force") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("how many labels are wrong cannot be said")
    assert "judged labels are suspect; about" in said[1]
    assert len(pd.read_csv("out/corrected.csv")) == 24
    assert pd.read_csv("out/audit.csv").is_label_issue.any()
    text = Path("out/audit.html").read_text()
    assert text.index("cannot be said from these features") < text.index("are estimated to be wrong")


def test_parquet_has_no_suspects_either_where_the_features_carry_no_rate(ntdne, files):
    np.save("labels.npy", np.random.default_rng(0).permutation(24) % 4)
    assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--format", "parquet", "--output", "out") == 0
    assert pd.read_parquet("out/audit.parquet").is_label_issue.isna().all()


def test_parquet_has_what_the_csv_has(ntdne, files):
    for format in ("csv", "parquet"):
        assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--format", format, "--output", "out") == 0
    table, text = pd.read_parquet("out/audit.parquet"), pd.read_csv("out/audit.csv")
    assert list(table.columns) == list(text.columns)
    assert np.allclose(table.label_score, text.label_score)


@pytest.mark.parametrize("threshold", ["otsu", "auto", "0.3"])
def test_a_threshold_is_a_method_or_a_number(ntdne, files, threshold):
    assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--threshold", threshold, "--output", "out") == 0
    table = pd.read_csv("out/audit.csv")
    assert table.is_label_issue[WRONG]
    if threshold == "0.3":
        assert (table.is_label_issue == (table.score <= 0.3)).all()
        assert "threshold k = 0.3" in Path("out/audit.html").read_text()


def test_sigma_and_dtype_reach_the_audit(ntdne, files):
    scores = []
    for options in ([], ["--sigma", 1], ["--dtype", "bfloat16"]):
        assert ntdne("audit", "features.npy", "--labels", "labels.npy", *options, "--output", "out") == 0
        scores.append(pd.read_csv("out/audit.csv").score)
    assert scores[0].std() > 2 * scores[1].std()
    assert not np.array_equal(scores[0], scores[2])
    assert np.allclose(scores[0], scores[2], atol=0.05)


def test_scratch_is_used_and_left_empty(ntdne, files, tmp_path):
    (tmp_path / "scratch").mkdir()
    assert ntdne("audit", "features.npy", "--labels", "labels.npy", "--output", "memory") == 0
    given = ["audit", "features.npy", "--labels", "labels.npy", "--scratch", tmp_path / "scratch", "--output", "disk"]
    assert ntdne(*given) == 0
    assert not list((tmp_path / "scratch").iterdir())
    assert Path("disk/audit.csv").read_bytes() == Path("memory/audit.csv").read_bytes()


# Wrong arguments and files


def save(name: str, values: object) -> None:
    np.save(name, np.asarray(values), allow_pickle=True)


def save_pickled_labels() -> None:
    save("bad.npy", np.array(["a", None] * 12, dtype=object))


def save_nan() -> None:
    features, _ = clusters()
    features[[2, 9], 1] = np.nan
    save("bad.npy", features)


def save_npz(**arrays: object) -> None:
    np.savez("bad.npz", **arrays)


def save_parquet(features: object = None, **columns: object) -> None:
    pd.DataFrame({"features": features, **columns}).to_parquet("bad.parquet")


def save_cut() -> None:
    Path("bad.npy").write_bytes(Path("features.npy").read_bytes()[:200])


def save_run(text: bytes) -> None:
    runs._announce(runs.Settings("photos"), "", Path("run"))
    Path("run/last.ckpt").write_bytes(text)


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (None, ["nowhere.npy"], "nowhere.npy: no such file or folder"),
        (lambda: Path("labels.npy").unlink(), ["features.npy"], "--labels names the file"),
        (None, ["features.npy", "--labels", "none.npy"], "none.npy"),
        (save_nan, ["bad.npy", *LABELS], "2 of 24: 2, 9"),
        (
            lambda: save("bad.npy", np.ones((24, 3), int)),
            ["bad.npy", *LABELS],
            "expected features as float16, float32 or float64, got int64",
        ),
        (lambda: save("bad.npy", np.ones(24)), ["bad.npy", *LABELS], "got (24,)"),
        (lambda: save("bad.npy", np.ones((0, 3))), ["bad.npy", *LABELS], "got (0, 3)"),
        (lambda: Path("bad.npy").touch(), ["bad.npy", *LABELS], "bad.npy is empty"),
        (lambda: Path("bad.npy").write_bytes(b"PK\3\4..."), ["bad.npy", *LABELS], "it begins like a .npz file"),
        (lambda: Path("bad.npz").write_bytes(b"\x93NUMPY"), ["bad.npz"], "it begins like a .npy file"),
        (lambda: Path("bad.npz").write_bytes(b"PK\3\4..."), ["bad.npz"], "bad.npz cannot be read"),
        (lambda: Path("bad.parquet").write_bytes(b"PAR1..."), ["bad.parquet"], "bad.parquet cannot be read"),
        (lambda: Path("bad.parquet").write_text("a,b"), ["bad.parquet"], "it begins like something else"),
        (save_cut, ["bad.npy", *LABELS], "bad.npy cannot be read"),
        (
            lambda: Path("bad.tif").write_text("x"),
            ["bad.tif"],
            "as .npy, .npz, .parquet, .pt, .json, got .tif",
        ),
        (save_pickled_labels, ["features.npy", "--labels", "bad.npy"], "which are not loaded"),
        (lambda: save_npz(features=np.array([None])), ["bad.npz", *LABELS], "which are not loaded"),
        (lambda: save_npz(x=[1], y=[2]), ["bad.npz"], "column features or embeddings; it has x, y; --features-col"),
        (lambda: save_npz(features=np.ones((2, 2)), y=[2, 3]), ["bad.npz"], "has no column label or labels or "),
        (lambda: save_parquet([[1.0], [1.0, 2.0]]), ["bad.parquet"], "got 2 values in row 1 and 1 in row 0"),
        (lambda: save_parquet([1.0]), ["bad.parquet"], "expected features as lists of numbers, got double"),
        (lambda: save_parquet([["a"]]), ["bad.parquet"], "expected features as float16"),
        (lambda: save_parquet([]), ["bad.parquet"], "bad.parquet"),
        (lambda: Path("bad.csv").write_text("x,y\n1,2\n"), ["features.npy", "--labels", "bad.csv"], "--label-column"),
        (lambda: save("bad.npy", [0] * 23), ["features.npy", "--labels", "bad.npy"], "each of the 24 images"),
        (lambda: save("bad.npy", [[0]] * 24), ["features.npy", "--labels", "bad.npy"], "shape (24, 1)"),
        (lambda: save("bad.npy", [-2] * 24), ["features.npy", "--labels", "bad.npy"], "got -2 at row 0"),
        (lambda: save("bad.npy", [0.5] * 24), ["features.npy", "--labels", "bad.npy"], "numbers such as 0.5"),
        (lambda: Path("bad.txt").write_text("a\nb"), ["features.npy", *LABELS, "--paths", "bad.txt"], "24 images"),
        (None, ["features.npy", *LABELS, "--images", "."], "--paths"),
        (
            lambda: Path("bad.txt").write_text("a\n" * 24),
            ["features.npy", *LABELS, "--paths", "bad.txt", "--images", "{photos}"],
            "photos/a is not there",
        ),
        (None, ["features.npy", *LABELS, "--threshold", "0"], "rate, otsu, auto, or a number"),
        (None, ["features.npy", *LABELS, "--threshold", "best"], "got 'best'"),
        (None, ["features.npy", *LABELS, "--sigma", "-1"], "--sigma: expected a positive number"),
        (None, ["features.npy", *LABELS, "--top", "0"], "--top"),
        (None, ["features.npy", *LABELS, "--device", "gpu"], "--device: expected a device of this machine"),
        (None, ["features.npy", *LABELS, "--scratch", "none"], "--scratch: expected a folder, got none"),
        (None, ["features.npy", *LABELS, "--output", "features.npy"], "--output: expected a folder"),
        (None, ["features.npy", *LABELS, "--output", "features.npy/x"], "features.npy is none"),
        (None, ["features.npy", *LABELS, "--checkpoint", "no-run"], "no-run is no folder of a run"),
        (None, ["{photos}"], "--checkpoint names the run"),
        (None, ["{photos}", *LABELS, "--checkpoint", "run"], "the labels of images are their folders"),
        (None, ["{photos}", "--checkpoint", "no-run"], "no-run"),
        (None, ["{photos}", "--checkpoint", "features.npy"], "expected the last.ckpt of a run"),
        (lambda: save("bad.npy", np.ones((24, 3), np.longdouble)), ["bad.npy", *LABELS], "got float128"),
        (lambda: save("bad.npy", [True] * 24), ["features.npy", "--labels", "bad.npy"], "integers or names, got bool"),
        (lambda: save_run(b"nothing"), ["{photos}", "--checkpoint", "run"], "run/last.ckpt is no checkpoint"),
        (None, ["{photos}", "--checkpoint", "run", "--output", "{photos}/audit"], "lies in the archive"),
        (None, ["{photos}", "--checkpoint", "run", "--output", "{photos}"], "lies in the archive"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    ntdne, photos, files, capsys, prepare, arguments, said
):
    if prepare is not None:
        prepare()
    before = everything_in(Path()) | everything_in(photos)
    assert ntdne("audit", *(argument.format(photos=photos) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("ntdne: ")
    assert error.count("\n") == 1
    assert said in error
    assert everything_in(Path()) | everything_in(photos) == before
    assert not Path("audit").exists()


def test_an_input_is_not_replaced(ntdne, files, capsys):
    Path("out").mkdir()
    Path("out/corrected.csv").write_text("label\n" + "0\n" * 24)
    given = ["audit", "features.npy", "--labels", "out/corrected.csv", "--fix"]
    assert ntdne(*given, "--output", "out") == 2
    assert "out/corrected.csv is read from" in capsys.readouterr().err
    assert ntdne(*given, "--output", "other") == 0


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("pandas", ["features.npy", *LABELS]), ("pyarrow", ["features.npy", *LABELS, "--format", "parquet"])],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(ntdne, files, capsys, monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    assert ntdne("audit", *arguments) == 2
    assert f"needs {module}: pip install" in capsys.readouterr().err
