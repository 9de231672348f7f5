"""`ntdne audit`: what it reads, what it writes, and what its page says."""

import base64
import io
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ntdne_kernels.audit import LabelAudit, audit_labels
from ntdne_kernels.experiments import run as runs
from ntdne_kernels.experiments.auditing import inputs, page, pictures, write_audit
from ntdne_kernels.experiments.auditing.inputs import Source
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.files import write_whole

WRONG = 3  # the image of the first class that carries the second one's label
NAMES = ["lake", "pond"]
HISTOGRAM, MAP = pictures.quality_histogram, pictures.transition_map


def clusters(each: int = 12, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Features in clusters, with a label each, one of them wrong."""
    source = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    features = np.eye(classes, 8 + classes)[labels] + 0.1 * source.standard_normal((len(labels), 8 + classes))
    labels[WRONG] = 1
    return features.astype(np.float32), labels


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib takes most of the time, and says the same each time."""
    for name in ("quality_histogram", "transition_map"):
        monkeypatch.setattr(page, name, lambda *rest: "data:drawn")


@pytest.fixture
def files(ntdne) -> Path:
    """features.npy with labels.npy, in the folder that the command runs in."""
    features, labels = clusters()
    np.save("features.npy", features)
    np.save("labels.npy", labels)
    return Path()


@pytest.fixture
def trained(ntdne) -> Path:
    """The folder of a run whose encoder has its first weights."""
    settings = runs.Settings("photos", image_size=8, encoder="small", dim=16, loss_options={"sigma": 0.2})
    runs._announce(settings, "", Path("run"))
    torch.manual_seed(0)
    encoder = {f"encoder.{name}": value for name, value in make_encoder("small", 16).state_dict().items()}
    torch.save({"state_dict": encoder, "history": []}, "run/last.ckpt")
    return Path("run")


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    assert printed.splitlines()[1:] == ["out/audit.html", "out/audit.csv", "out/corrected.csv"]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_labels_of_another_encoding_stay_apart(ntdne, files, kind):
    features, codes = clusters(classes=3)
    np.save("features.npy", features)
    lines = [["forêt", "forèt", "foröt"][code] for code in codes]
    Path(f"names.{kind}").write_text("\n".join(["label"] * (kind == "csv") + lines) + "\n", encoding="latin-1")
    assert ntdne("audit", "features.npy", "--labels", f"names.{kind}", "--output", "out") == 0
    assert pd.read_csv("out/audit.csv").given_label.nunique() == 3


def test_files_of_an_earlier_audit_are_named(ntdne, files, capsys):
    assert ntdne("audit", "features.npy", *LABELS, "--fix", "--output", "out") == 0
    assert capsys.readouterr().err == ""
    assert ntdne("audit", "features.npy", *LABELS, "--format", "parquet", "--output", "out") == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"ntdne: out/{name} is of an earlier audit" for name in ("audit.csv", "corrected.csv")]


def test_only_fix_writes_a_list(ntdne, files):
    assert ntdne("audit", "features.npy", "--labels", "labels.npy") == 0
    assert sorted(path.name for path in Path("audit/features").iterdir()) == ["audit.csv", "audit.html"]


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


def test_csv_whose_rows_are_longer_than_its_header_is_read_by_column(ntdne, files):
    Path("labels.csv").write_text("label\n" + "".join(f"{label},{10 + label}\n" for label in np.load("labels.npy")))
    assert ntdne("audit", "features.npy", "--labels", "labels.csv", "--output", "out") == 0
    assert set(pd.read_csv("out/audit.csv").given_label) == {0, 1}


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
    assert said[1] == "24 images, 4 classes: 24 judged labels are ranked, the most suspect first"
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


def test_full_disk_is_told_by_the_file_and_leaves_no_part_of_it(tmp_path):
    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{tmp_path / 'table'}'")):
        write_whole(tmp_path / "table", fill)
    assert not list(tmp_path.iterdir())


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


# Images


def test_a_folder_is_encoded_by_a_run_and_stays_as_it_is(ntdne, photos, trained, capsys):
    (photos / "dark" / "broken.png").write_bytes(b"no image")
    (photos / "drak").mkdir()
    Image.open(photos / "dark" / "00.png").save(photos / "drak" / "slip.png")
    before = everything_in(photos)
    assert ntdne("audit", photos, "--checkpoint", trained / "last.ckpt", "--fix") == 0
    assert everything_in(photos) == before
    table = pd.read_csv("audit/photos/audit.csv")
    assert table.path.tolist() == [str(path.relative_to(photos)) for path in before if path.name != "broken.png"]
    assert table.given_label.tolist() == ["bright"] * 20 + ["dark"] * 20 + ["drak"]
    assert table.conflicting.tolist() == [row in (20, 40) for row in range(41)]
    assert list(pd.read_csv("audit/photos/corrected.csv").columns) == ["path", "label"]
    assert "1 unreadable files left out" in capsys.readouterr().out
    text = Path("audit/photos/audit.html").read_text()
    assert "σ = 0.2" in text  # that of the run
    assert "dark/broken.png" in text
    for title in ("Copies with different labels", "Classes with one image", "Unlike the others"):
        assert f">{title}</h2>" in text


def test_the_run_may_be_given_by_its_folder(ntdne, photos, trained):
    for run, output in ((trained, "by folder"), (trained / "last.ckpt", "by file")):
        assert ntdne("audit", photos, "--checkpoint", run, "--output", output) == 0
    assert Path("by folder/audit.csv").read_bytes() == Path("by file/audit.csv").read_bytes()


def pictures_on(page: Path) -> list[np.ndarray]:
    """The thumbnails of a page, in its order."""
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


@pytest.mark.parametrize("by", ["folder", "features"])
def test_pictures_are_upright_whole_and_without_what_is_transparent(ntdne, photos, trained, by):
    """On the page as in training: one function decodes."""
    for file in photos.rglob("*.png"):
        file.unlink()
    exif = Image.Exif()
    exif[274] = 6
    hidden = np.zeros((20, 40, 4), np.uint8)
    hidden[..., 0], hidden[:, 20:, 3] = 200, 255
    Image.fromarray(hidden).save(photos / "dark" / "hidden.png", exif=exif)
    ramp = (np.arange(20 * 40).reshape(20, 40, 1) + np.zeros(3)).astype(np.uint16)  # 4 of 256 levels of a high byte
    Path(photos / "bright" / "deep.png").write_bytes(imagecodecs.png_encode(ramp))
    names = ["bright/deep.png", "dark/hidden.png"]
    if by == "folder":
        given = [photos, "--checkpoint", trained]
    else:
        np.save("features.npy", np.random.default_rng(0).standard_normal((2, 4)))
        np.save("labels.npy", [0, 1])
        Path("files.txt").write_text("\n".join(names))
        given = ["features.npy", *LABELS, "--paths", "files.txt", "--images", photos]
    assert ntdne("audit", *given, "--output", "out") == 0
    shown = pictures_on(Path("out/audit.html"))
    upright = [each for each in shown if each.shape[0] > each.shape[1]]
    deep = [each for each in shown if each.shape[0] < each.shape[1]]
    assert upright
    assert deep
    for each in upright:
        top, bottom = each[:12].mean(axis=(0, 1)), each[-12:].mean(axis=(0, 1))
        assert np.allclose(top, 0, atol=6)
        assert np.allclose(bottom, [200, 0, 0], atol=6)
    for each in deep:
        assert len(np.unique(each)) > 100


def test_scenes_of_many_bands_are_audited_by_a_run_on_such(ntdne, scenes, photos, capsys):
    quick = ["--preset", "scratch", "--encoder", "small", "--image-size", 8, "--epochs", 2, "--precision", "32-true"]
    for name, options in (("all", []), ("some", ["--bands", "4,3,2"])):
        assert ntdne("train", scenes, *quick, "--noise", "none", *options, "--output", name) == 0
        assert ntdne("audit", scenes, "--checkpoint", name, "--output", f"{name}-audit") == 0
        assert len(pd.read_csv(f"{name}-audit/audit.csv")) == 40
        assert len(pictures_on(Path(f"{name}-audit/audit.html"))) > 20
    capsys.readouterr()
    assert ntdne("audit", photos, "--checkpoint", "all", "--output", "other") == 2
    assert "the run was trained on 5 bands of integers, but" in capsys.readouterr().err


def test_the_audit_has_the_training_images_features(ntdne, scenes):
    """The run's own normalisation, of its training images: not that of the images audited."""
    quick = ["--preset", "scratch", "--encoder", "small", "--image-size", 8, "--epochs", 1, "--precision", "32-true"]
    assert ntdne("train", scenes, *quick, "--noise", "none", "--output", "run") == 0
    shutil.copytree(scenes / "forest", scenes.parent / "part" / "forest")
    whole, part = (
        inputs.encode_folder(str(folder), Path("run"), cache=Path("cache"), download=False, device="cpu")
        for folder in (scenes, scenes.parent / "part")
        if (folder / "water").mkdir(exist_ok=True) is None
    )
    assert torch.allclose(whole.features[:20], part.features, atol=1e-5)


def test_max_pixels_is_the_runs_unless_given(ntdne, photos, trained, capsys):
    Image.new("RGB", (100, 30)).save(photos / "dark" / "large.png")
    given = ["audit", photos, "--checkpoint", trained]
    assert ntdne(*given, "--max-pixels", 2999) == 0
    assert "1 unreadable files left out" in capsys.readouterr().out
    assert ntdne(*given) == 0
    assert "unreadable" not in capsys.readouterr().out


def test_a_file_name_of_any_bytes_is_written_back(ntdne, photos, trained):
    name = b"\xe9t\xe9.png".decode(errors="surrogateescape")
    try:
        (photos / "dark" / "00.png").rename(photos / "dark" / name)
        (photos / "bright").rename(photos / name[:-4])
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    for format in ("csv", "parquet"):
        given = ["audit", photos, "--checkpoint", trained, "--fix", "--format", format, "--output", "out"]
        assert ntdne(*given) == 0
    for file in ("out/audit.csv", "out/corrected.csv"):
        assert b"dark/\xe9t\xe9.png" in Path(file).read_bytes()
    assert r"dark/\xe9t\xe9.png" in pd.read_parquet("out/audit.parquet").path.tolist()


# The page


def page_of(folder: Path, source: Source, **options) -> str:
    write_audit(source, folder, **options)
    return (folder / "audit.html").read_text()


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path):
    features, codes = clusters()
    labels = [["<script>alert(1)</script>", 'a & "b" $x$'][code] for code in codes]
    paths = [f"<img src=x onerror=alert({i})>.png" for i in range(len(labels))]
    source = Source("<b>bold</b>", features, labels, paths, lambda image: Image.new("RGB", (40, 30), (image, 0, 0)))
    text = page_of(tmp_path, source)
    assert not re.search(r"<(script>alert|img src=x|b>)", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert set(re.findall(r'(?:src|href)="([a-z]+:|#|/|\w)', text)) == {"data:", "#"}
    assert "http" not in text


def test_pictures_that_cannot_be_opened_leave_a_place(tmp_path):
    features, labels = clusters()

    def picture(image: int) -> Image.Image:
        if image % 2 or image == 4:
            raise OSError("truncated")
        return Image.new("RGB", (200, 100))

    text = page_of(tmp_path, Source("some", features, labels, [f"{i}.png" for i in range(24)], picture))
    assert text.count('<img src="data:image/jpeg') > 20
    assert text.count("no picture") > 20
    assert 'title="4.png">no picture' in text

    def none(image: int) -> Image.Image:
        raise OSError

    text = page_of(tmp_path, Source("some", features, labels, [f"{i}.png" for i in range(24)], none))
    assert "None of the pictures could be opened" in text
    assert "no picture" not in text


def test_neighbours_tell_by_sign_and_frame_whether_they_agree(tmp_path):
    features, codes = clusters()
    labels: list[str | None] = [NAMES[code] for code in codes]
    labels[13] = None
    source = Source("some", features, labels, None, lambda image: Image.new("RGB", (9, 9)))
    text = page_of(tmp_path, source, worst=1, neighbours=23)
    of_pond = text[text.index('<h3 id="class-1">') :]
    found = re.findall(r'<figure class="(\w+)">.*?<figcaption>(.) (.*?)<br>', of_pond, re.DOTALL)[:23]
    assert sorted(found) == sorted(
        [("different", "≠", "lake")] * 11 + [("same", "=", "pond")] * 11 + [("unknown", "?", "<em>no label</em>")]
    )
    assert "<em>no label</em></span> → <strong>pond</strong>" in text[text.index('id="unlabelled"') :]


def test_many_classes_show_those_with_most_suspects(tmp_path):
    features, labels = clusters(each=3, classes=60)
    text = page_of(tmp_path, Source("many", features, labels, None, None), worst=1, force=True)
    assert "The 50 of 60 classes that have the most suspects" in text
    assert text.count("<h3 id=") == 50


@pytest.mark.parametrize("labels", [[0], [-1, -1, -1], [0, 1, 2], [0, 0, 0]])
def test_the_smallest_archives_have_a_page(tmp_path, labels):
    features = np.random.default_rng(0).standard_normal((len(labels), 4))
    text = page_of(tmp_path, Source("small", features, np.array(labels), None, None), fix=True, force=True)
    assert "nan" not in re.sub(r'src="[^"]*"', "", text)
    assert len(pd.read_csv(tmp_path / "corrected.csv")) == len(labels)


# Bad input


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


LABELS = ["--labels", "labels.npy"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (None, ["nowhere.npy"], "nowhere.npy: no such file or folder"),
        (None, ["features.npy"], "--labels names the file"),
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
        (lambda: Path("bad.tif").write_text("x"), ["bad.tif"], "expected features as .npy, .npz, .parquet, got .tif"),
        (save_pickled_labels, ["features.npy", "--labels", "bad.npy"], "which are not loaded"),
        (lambda: save_npz(features=np.array([None])), ["bad.npz", *LABELS], "which are not loaded"),
        (lambda: save_npz(x=[1], y=[2]), ["bad.npz"], "has no column features; it has x, y; --features-column"),
        (lambda: save_npz(features=np.ones((2, 2)), y=[2, 3]), ["bad.npz"], "has no column label or labels; it has"),
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
        (None, ["features.npy", *LABELS, "--checkpoint", "run"], "is a file of features"),
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


@pytest.mark.parametrize("file", ["list.npz", "list.parquet"])
def test_what_memory_does_not_hold_is_refused_before_it_is_read(ntdne, capsys, monkeypatch, file):
    features, labels = clusters()
    np.savez("list.npz", features=features, labels=labels)
    pd.DataFrame({"features": list(features), "label": labels}).to_parquet("list.parquet")
    monkeypatch.setattr(inputs, "free_memory", lambda: 500.0)
    assert ntdne("audit", file) == 2
    assert "save its features as .npy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("pandas", ["features.npy", *LABELS]), ("pyarrow", ["features.npy", *LABELS, "--format", "parquet"])],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(ntdne, files, capsys, monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    assert ntdne("audit", *arguments) == 2
    assert f"needs {module}: pip install" in capsys.readouterr().err


# Figures


def audit_of(classes: int) -> LabelAudit:
    features, labels = clusters(classes=classes)
    return audit_labels(features, labels)


@pytest.mark.parametrize(
    ("method", "line"), [("auto", None), ("rate", "quality"), ("otsu", "quality"), (0.25, "score")]
)
def test_the_histogram_draws_the_threshold_that_is_one_number(monkeypatch, method, line):
    monkeypatch.setattr(pictures, "_drawn", lambda figure: figure)
    audit = audit_of(2)
    figure = HISTOGRAM(audit, audit.suspects(method), method)
    (axis,) = figure.axes
    assert sum(bar.get_height() for bar in axis.patches) == len(audit)
    lines = [float(each.get_xdata()[0]) for each in axis.lines]
    assert lines == (
        [] if line is None else [0.25] if line == "score" else [pytest.approx(float(audit.quality[WRONG]))]
    )
    assert axis.get_xlabel().startswith(line or "quality")


def test_the_heat_map_has_given_labels_across_and_leaves_out_the_diagonal(monkeypatch):
    monkeypatch.setattr(pictures, "_drawn", lambda figure: figure)
    audit = audit_of(3)
    shown = MAP(audit).axes[0].images[0].get_array()
    assert float(shown[0, 1]) == pytest.approx(100 / 12)  # of 12 images of the first class, one was called the second
    assert np.isnan(np.diag(np.ma.filled(shown, np.nan))).all()
    assert MAP(audit_of(41)) == ""


def test_figures_are_pictures_that_a_page_can_hold():
    audit = audit_of(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [HISTOGRAM(audit, audit.suspects("rate"), "rate"), MAP(replace(audit, classes=("北京", "a" * 200)))]
    for uri in drawn:
        assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).width > 400
