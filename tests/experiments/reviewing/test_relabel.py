import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from ntdne_kernels.experiments import files
from ntdne_kernels.experiments.reviewing import archive_id, relabel
from ntdne_kernels.experiments.reviewing.cells import write_changed
from ntdne_kernels.experiments.reviewing.tree import check_class_names
from ntdne_kernels.experiments.settings import Settings
from tests.experiments.auditing.helpers import everything_in
from tests.experiments.helpers import QUICK, results_of, spoil, write_archive, write_features

HEADER = "image,given,verdict,decided,when,archive\n"


@pytest.fixture
def photos(ntdne) -> Path:
    """Class folders ash, elm and oak, in the folder that the command runs in, with the same file names in each."""
    return write_archive(Path("photos"), {"ash": 4, "elm": 4, "oak": 4})


def decide(*rows: str, name: str = "decisions.csv") -> Path:
    """Rows "image,given,verdict,decided", as written by hand."""
    path = Path(name)
    path.write_text(HEADER + "".join(f"{row},,\n" for row in rows))
    return path


def labels_of(path: Path = Path("relabelled/photos/labels.csv")) -> dict[str, str]:
    """The labels of a list by the path of the image."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame.columns) == ["path", "label"]
    return dict(frame.itertuples(index=False))


def links_of(tree: Path = Path("relabelled/photos/images")) -> dict[str, str]:
    """The file that each link of a tree leads to, relative to this folder."""
    return {
        str(path.relative_to(tree)): os.path.relpath(path.resolve()) for path in tree.rglob("*") if not path.is_dir()
    }


@pytest.mark.parametrize("order", [1, -1])
def test_the_list_has_the_decided_labels_without_excluded_images(ntdne, photos, capsys, order):
    rows = [
        *("ash/1.png,ash,relabel,oak", "ash/3.png,ash,relabel,oak", "ash/2.png,ash,keep,ash"),
        *("elm/0.png,elm,exclude,", "oak/2.png,oak,relabel,birch", "oak/3.png,oak,unsure,"),
    ]
    before = everything_in(photos)
    assert ntdne("relabel", "photos", decide(*rows[::order])) == 0
    labels = labels_of()
    assert len(labels) == 11
    changed = {path: label for path, label in labels.items() if not path.startswith(label)}
    assert changed == {"ash/1.png": "oak", "ash/3.png": "oak", "oak/2.png": "birch"}
    assert "elm/0.png" not in labels
    assert everything_in(photos) == before
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "photos: 6 decisions on 12 images: 1 keep, 3 relabel, 1 unsure, 1 exclude",
        "  ash → oak         2",
        "  elm → (left out)  1",
        "  oak → birch       1",
        "new classes: birch",
        "relabelled/photos/labels.csv",
    ]


def test_images_of_which_people_cannot_tell_can_be_left_out(ntdne, photos):
    decisions = decide("oak/3.png,oak,unsure,")
    assert ntdne("relabel", "photos", decisions) == 0
    assert labels_of()["oak/3.png"] == "oak"
    assert ntdne("relabel", "photos", decisions, "--drop-unsure") == 0
    assert "oak/3.png" not in labels_of()


def test_links_lead_to_the_images_from_the_folders_of_their_decided_classes(ntdne, photos):
    decisions = decide("ash/1.png,ash,relabel,oak", "elm/0.png,elm,exclude,", "elm/2.png,elm,relabel,birch")
    assert ntdne("relabel", "photos", decisions, "--links") == 0
    links = links_of()
    assert links["oak/1.png"] == "photos/oak/1.png"
    assert links["oak/1 (ash).png"] == "photos/ash/1.png"
    assert links["birch/2.png"] == "photos/elm/2.png"
    assert not any("elm/0.png" in (name, target) for name, target in links.items())
    assert len(links) == 11
    assert sorted(links.values()) == sorted({str(path) for path in photos.rglob("*.png")} - {"photos/elm/0.png"})


def test_images_of_one_name_that_move_to_one_folder_keep_apart(ntdne):
    write_archive(Path("photos"), {"ash": 2, "elm": 2, "oak": 1})
    (Path("photos") / "elm" / "1.png").rename("photos/elm/0 (ash).png")
    os.makedirs("photos/ash/sub")
    os.rename("photos/ash/1.png", "photos/ash/sub/0.PNG")
    decisions = decide(
        *("ash/0.png,ash,relabel,oak", "elm/0.png,elm,relabel,oak", "elm/0 (ash).png,elm,relabel,oak"),
        "ash/sub/0.PNG,ash,relabel,oak",
    )
    assert ntdne("relabel", "photos", decisions, "--links") == 0
    assert links_of() == {
        "oak/0.png": "photos/oak/0.png",
        "oak/0 (ash).png": "photos/ash/0.png",
        "oak/sub/0.PNG": "photos/ash/sub/0.PNG",
        "oak/0 (elm).png": "photos/elm/0.png",
        "oak/0 (ash) (elm).png": "photos/elm/0 (ash).png",
    }


def test_symbolic_links_are_relative_only_beside_the_images_folder(ntdne, photos, tmp_path):
    decisions = decide("ash/1.png,ash,relabel,oak")
    assert ntdne("relabel", "photos", decisions, "--links", "--output", "new") == 0
    assert os.readlink("new/images/elm/1.png") == "../../../photos/elm/1.png"
    assert ntdne("relabel", "photos", decisions, "--links", "--output", tmp_path / "there") == 0
    assert os.readlink(tmp_path / "there" / "images" / "elm" / "1.png") == str(Path("photos/elm/1.png").resolve())


@pytest.mark.parametrize(("kind", "same"), [("hard", True), ("copies", False)])
def test_hard_links_and_copies_hold_the_images(ntdne, photos, kind, same):
    assert ntdne("relabel", "photos", decide("ash/1.png,ash,relabel,oak"), "--links", kind) == 0
    moved, image = Path("relabelled/photos/images/oak/1 (ash).png"), photos / "ash" / "1.png"
    assert not moved.is_symlink()
    assert moved.read_bytes() == image.read_bytes()
    assert moved.samefile(image) == same


def test_where_links_cannot_be_made_another_kind_is_named(ntdne, photos, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(1, "a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert ntdne("relabel", "photos", decide("ash/1.png,ash,keep,ash"), "--links") == 2
    assert "--links hard or copies may do" in capsys.readouterr().err
    assert not Path("relabelled").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "got '/' in it"),
        ("..", "got none"),
        ("a:b", "got ':' in it"),
        ("con.fused", "got one that Windows keeps for itself"),
        (".hidden", "got one of a hidden or technical folder"),
        ("oak.", "got blanks or a dot at its end"),
        ("é" * 128, "got one of more than 255 bytes"),
    ],
)
def test_a_class_that_no_folder_can_have_is_refused_for_links_alone(ntdne, photos, capsys, name, message):
    decisions = decide(f"ash/1.png,ash,relabel,{name}")
    assert ntdne("relabel", "photos", decisions, "--links") == 2
    assert message in capsys.readouterr().err
    assert not Path("relabelled").exists()
    assert ntdne("relabel", "photos", decisions) == 0
    assert labels_of()["ash/1.png"] == name


def test_classes_of_a_table_that_differ_by_case_alone_get_no_folders():
    with pytest.raises(ValueError, match="class 'oak' differs from 'Oak' by case alone"):
        check_class_names(["oak", "Oak"])


def test_a_file_that_the_audit_could_not_read_does_not_make_another_archive(ntdne, photos):
    spoil(photos / "elm" / "1.png", "text")
    paths = sorted(
        str(path.relative_to(photos)) for path in photos.rglob("*.png") if path.stem != "1" or "elm" not in path.parts
    )
    identity = archive_id(paths, [path.partition("/")[0] for path in paths])
    Path("decisions.csv").write_text(f"{HEADER}ash/1.png,ash,relabel,oak,,{identity}\n")
    assert ntdne("relabel", "photos", "decisions.csv") == 0
    labels = labels_of()
    assert labels["ash/1.png"] == "oak"
    assert "elm/1.png" not in labels


def decide_without(left_out: str, photos: Path, row: str) -> None:
    """decisions.csv of an audit of class folders that left out a file."""
    paths = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*") if path.name != left_out)
    identity = archive_id(paths, [path.partition("/")[0] for path in paths])
    Path("decisions.csv").write_text(f"{HEADER}{row},,{identity}\n")


def test_a_file_too_large_for_the_audit_does_not_make_another_archive(ntdne, photos, capsys):
    Image.new("RGB", (100, 30)).save(photos / "elm" / "large.png")
    decide_without("large.png", photos, "ash/1.png,ash,relabel,oak")
    assert ntdne("relabel", "photos", "decisions.csv") == 2
    assert "is of another archive" in capsys.readouterr().err
    assert ntdne("relabel", "photos", "decisions.csv", "--max-pixels", 2999) == 0
    assert "elm/large.png" not in labels_of()


def test_a_file_without_the_bands_of_the_run_does_not_make_another_archive(ntdne, scenes):
    Image.new("L", (12, 10)).save(scenes / "forest" / "grey.png")
    decide_without("grey.png", scenes, "forest/01.tif,forest,relabel,water")
    assert ntdne("relabel", scenes, "decisions.csv") == 2
    Path("run").mkdir()
    settings = dataclasses.asdict(Settings("scenes", bands=(4, 3, 2))) | {
        "variant": "",
        "classes": [],
        "bands": [4, 3, 2],
    }
    Path("run/settings.yaml").write_text(yaml.safe_dump(settings))
    assert ntdne("relabel", scenes, "decisions.csv", "--checkpoint", "run") == 0
    labels = labels_of(Path("relabelled/scenes/labels.csv"))
    assert labels["forest/01.tif"] == "water"
    assert len(labels) == 40


# What is refused


@pytest.mark.parametrize("row", ["ash/9.png,ash,exclude,", "ash/1.png,elm,exclude,"])
def test_decisions_of_other_images_are_refused_and_nothing_is_written(ntdne, photos, capsys, row):
    assert ntdne("relabel", "photos", decide(row)) == 2
    assert "is of another archive" in capsys.readouterr().err
    assert not Path("relabelled").exists()


def test_conflicts_are_listed_and_refused_unless_one_says_what_counts(ntdne, photos, capsys):
    mine = decide("ash/1.png,ash,relabel,oak", "ash/2.png,ash,relabel,elm", name="mine.csv")
    yours = decide("ash/1.png,ash,relabel,elm", "ash/3.png,ash,relabel,elm", name="yours.csv")
    assert ntdne("relabel", "photos", mine, yours) == 2
    printed = capsys.readouterr()
    assert printed.out == "ash/1.png: relabel oak in mine.csv, relabel elm in yours.csv\n"
    assert "1 images have conflicting decisions" in printed.err
    assert not Path("relabelled").exists()
    for how, label in (("latest", "elm"), ("skip", "ash")):
        assert ntdne("relabel", "photos", mine, yours, "--conflicts", how) == 0
        assert [labels_of()[f"ash/{i}.png"] for i in (1, 2, 3)] == [label, "elm", "elm"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("photos", "lies in the archive photos"),
        ("photos/oak/new", "lies in the archive photos"),
        (".", "decisions.csv in . is read from"),
        ("other", "other holds notes.txt"),
        ("decisions.csv", "expected a folder that can be written to"),
    ],
)
def test_an_output_in_the_archive_or_with_other_files_is_refused(ntdne, photos, capsys, output, message):
    decisions = decide("ash/1.png,ash,exclude,")
    os.mkdir("other")
    Path("other/notes.txt").write_text("mine")
    before = everything_in(Path())
    assert ntdne("relabel", "photos", decisions, "--output", output) == 2
    assert message in capsys.readouterr().err
    assert everything_in(Path()) == before


def test_the_labels_of_another_archive_of_the_same_name_are_not_replaced(ntdne, photos, capsys):
    Path("a").mkdir()
    photos.rename("a/photos")
    write_archive(Path("b/photos"), {"ash": 4, "elm": 4, "oak": 4})
    decisions = decide("ash/1.png,ash,relabel,oak")
    assert ntdne("relabel", "a/photos", decisions) == 0
    before = everything_in(Path("relabelled"))
    assert ntdne("relabel", "b/photos", decisions) == 2
    a, b = (Path(place, "photos").resolve() for place in ("a", "b"))
    assert f"relabelled/photos holds what was made of {a}, and would be replaced by what is made of {b};" in (
        capsys.readouterr().err
    )
    assert everything_in(Path("relabelled")) == before
    assert ntdne("relabel", a, decisions) == 0
    record = json.loads(Path("relabelled/photos/relabel.json").read_text())
    del record["source"]  # as an earlier version left it
    Path("relabelled/photos/relabel.json").write_text(json.dumps(record))
    assert ntdne("relabel", "b/photos", decisions) == 0


def test_an_earlier_relabel_is_replaced_unless_someone_put_a_file_there(ntdne, photos, capsys):
    assert ntdne("relabel", "photos", decide("ash/1.png,ash,exclude,"), "--links") == 0
    assert ntdne("relabel", "photos", decide("ash/2.png,ash,relabel,elm")) == 0
    assert labels_of()["ash/2.png"] == "elm"
    assert sorted(os.listdir("relabelled/photos")) == ["labels.csv", "relabel.json"]
    Path("relabelled/photos/notes.txt").write_text("mine")
    assert ntdne("relabel", "photos", decide("ash/3.png,ash,relabel,elm")) == 2
    assert "holds notes.txt" in capsys.readouterr().err
    assert labels_of()["ash/3.png"] == "ash"
    assert Path("relabelled/photos/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("earlier", "call"), [*((False, call) for call in range(1, 5)), *((True, call) for call in range(1, 6))]
)
def test_a_run_that_fails_leaves_the_earlier_one_or_nothing(ntdne, photos, monkeypatch, earlier, call):
    """It fails at the list, the links, the record or a rename, of which there are two after an earlier run."""
    if earlier:
        assert ntdne("relabel", "photos", decide("ash/1.png,ash,relabel,elm"), "--links") == 0
    decisions = decide("ash/1.png,ash,relabel,oak")
    before = everything_in(Path())
    calls = 0

    def failing(function):
        def counted(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return function(*arguments)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(relabel, "write_whole", failing(files.write_whole))
        patch.setattr(relabel, "make_tree", failing(relabel.make_tree))
        patch.setattr(Path, "rename", failing(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            ntdne("relabel", "photos", decisions, "--links")
    assert everything_in(Path()) == before
    assert not list(Path().glob("relabelled/.*"))


def test_what_a_killed_run_left_behind_is_put_right_by_the_next(ntdne, photos):
    assert ntdne("relabel", "photos", decide("ash/1.png,ash,relabel,elm")) == 0
    Path("relabelled/photos").rename("relabelled/.photos.old")
    os.mkdir("relabelled/.photos.partial")
    assert ntdne("relabel", "photos", decide("ash/1.png,ash,relabel,oak")) == 0
    assert os.listdir("relabelled") == ["photos"]
    assert labels_of()["ash/1.png"] == "oak"


# Features


def test_labels_of_features_stay_in_the_order_of_the_features(ntdne):
    write_features(each=4)
    decisions = decide("1,lake,relabel,sea", "4,pond,exclude,", "5,pond,relabel,lake")
    assert ntdne("relabel", "features.npy", decisions) == 0
    expected = ["lake", "sea", "lake", "lake", "", "lake", "pond", "pond"]
    assert np.load("relabelled/features/labels.npy").tolist() == expected
    frame = pd.read_csv("relabelled/features/labels.csv", keep_default_na=False)
    assert frame.to_dict("list") == {"image": list(range(8)), "label": expected}


def test_integer_labels_keep_their_dtype_and_take_integers_alone(ntdne, capsys):
    write_features(each=2)
    np.save("labels.npy", np.array([0, 0, 1, 1], np.uint8))
    assert ntdne("relabel", "features.npy", decide("0,0,relabel,200")) == 0
    written = np.load("relabelled/features/labels.npy")
    assert (written.tolist(), written.dtype) == ([200, 0, 1, 1], np.uint8)
    assert ntdne("relabel", "features.npy", decide("0,0,relabel,300", "1,0,exclude,")) == 0
    assert np.load("relabelled/features/labels.npy").tolist() == [300, -1, 1, 1]
    for wrong in ("boat", "-1", "07"):
        assert ntdne("relabel", "features.npy", decide(f"0,0,relabel,{wrong}")) == 2
        assert f"expected integers from 0, as the labels of features are, got '{wrong}'" in capsys.readouterr().err


def test_links_of_features_lead_to_the_files_that_they_name(ntdne):
    write_archive(Path("photos"), {"ash": 2, "elm": 2})
    np.save("features.npy", np.eye(4, dtype=np.float32))
    np.save("labels.npy", np.array(["ash", "elm", "elm", ""]))
    Path("files.txt").write_text("ash/0.png\nash/1.png\nelm/0.png\nelm/1.png\n")
    decisions = decide("ash/1.png,elm,keep,elm", "elm/1.png,,relabel,elm", "ash/0.png,ash,relabel,elm")
    assert ntdne("relabel", "features.npy", decisions, "--images", "photos", "--links") == 0
    assert links_of(Path("relabelled/features/images")) == {
        "elm/0.png": "photos/elm/0.png",
        "elm/0 (ash).png": "photos/ash/0.png",
        "elm/1.png": "photos/ash/1.png",
        "elm/1 (2).png": "photos/elm/1.png",
    }
    os.remove("photos/elm/1.png")
    assert ntdne("relabel", "features.npy", decisions, "--images", "photos", "--links") == 2


def test_links_without_files_are_refused(ntdne, capsys):
    write_features(each=2)
    assert ntdne("relabel", "features.npy", decide("0,lake,relabel,pond"), "--links") == 2
    assert "--links: features has no files to link to" in capsys.readouterr().err


# Training on the list


def test_training_takes_the_list_for_class_folders(ntdne, photos, tmp_path):
    write_archive(tmp_path / "more", {"ash": 8, "elm": 8})
    decisions = decide(
        *(f"ash/{i}.png,ash,relabel,birch" for i in range(4)), "elm/0.png,elm,exclude,", "elm/1.png,elm,relabel,ash"
    )
    assert ntdne("relabel", tmp_path / "more", decisions) == 0
    labels = "relabelled/more/labels.csv"
    assert ntdne("train", tmp_path / "more", *QUICK, "--labels", labels, "--noise", "none", "--output", "run") == 0
    results = results_of(Path("run"))
    assert results["classes"] == ["ash", "birch", "elm"]
    assert results["counts"]["train"] == 3 + 2 + 4  # 70 % of 5, 4 and 6, rounded down
    assert ntdne("evaluate", "run") == 0


def test_training_takes_the_list_for_features_and_for_digits(ntdne):
    write_features()
    assert (
        ntdne("relabel", "features.npy", decide("0,lake,exclude,", *(f"{i},lake,relabel,sea" for i in range(1, 5))))
        == 0
    )
    for name in ("labels.csv", "labels.npy"):
        options = ["--preset", "features", "--epochs", "1", "--noise", "none", "--output", f"run of {name}"]
        assert ntdne("train", "features.npy", "--labels", f"relabelled/features/{name}", *options) == 0
        assert results_of(Path(f"run of {name}"))["classes"] == ["lake", "pond", "sea"]
    Path("few.csv").write_text("path,label\n" + "".join(f"digit {i},{'abc'[i % 3]}\n" for i in range(30)))
    assert ntdne("train", "digits", *QUICK, "--labels", "few.csv", "--noise", "none", "--output", "run") == 0
    assert results_of(Path("run"))["counts"]["train"] == 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nash/7.png,oak\n", "expected images of photos, got ash/7.png"),
        ("path,label\nash/1.png,oak\nash/1.png,elm\n", "expected each image once, got ash/1.png more often"),
        ("path,label\nash/1.png,oak\n", "class oak of photos has 1 image"),
        ("label\noak\n", "expected a label for each of the 12 images, got 1"),
        ("path,species\nash/1.png,oak\n", "has no column label"),
    ],
)
def test_a_list_of_other_images_is_refused_by_training(ntdne, photos, capsys, text, message):
    Path("labels.csv").write_text(text)
    assert ntdne("train", "photos", *QUICK, "--labels", "labels.csv", "--output", "run") == 2
    assert message in capsys.readouterr().err


# Tables


def relabel_table(ntdne, path: Path, *decisions: str, column: str = "label") -> Path:
    """Relabel four images, two oaks, an ash and an unlabelled one, whose labels are in the table."""
    np.save("features.npy", np.eye(4, dtype=np.float32))
    assert ntdne("relabel", "features.npy", decide(*decisions), "--labels", path, "--label-column", column) == 0
    return Path("relabelled/features") / path.name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            'id,label,"note, long"\n007,oak,"a ""b"""\n1,"oak",NA\n2.50, ash ,\n3,,é\n',
            'id,label,"note, long"\n007,elm,"a ""b"""\n1,"",NA\n2.50, ash ,\n3,"b, c",é\n',
        ),
        ("\ufeffid,label\r\n1,oak\r\n2,oak\r\n3,ash\r\n4,", '\ufeffid,label\r\n1,elm\r\n2,\r\n3,ash\r\n4,"b, c"'),
        ("label\noak\noak\nash\n\n", 'label\nelm\n\nash\n"b, c"\n'),
        ("id,label\n1,oak\n2,oak\n3,ash\n\n", 'id,label\n1,elm\n2,\n3,ash\n,"b, c"\n'),
    ],
)
def test_a_csv_keeps_all_bytes_but_the_changed_cells(ntdne, before, after):
    path = Path("table.csv")
    path.write_bytes(before.encode())
    copy = relabel_table(ntdne, path, "0,oak,relabel,elm", "1,oak,exclude,", "2,ash,keep,ash", '3,,relabel,"b, c"')
    assert copy.read_bytes().decode() == after
    assert path.read_bytes().decode() == before


def test_a_class_keeps_the_form_of_unicode_that_its_table_has(ntdne):
    nfc, nfd = "for\u00eat", "fore\u0302t"
    Path("table.csv").write_text(f"label\n{nfd}\nash\nash\nash\n", encoding="utf-8")
    copy = relabel_table(ntdne, Path("table.csv"), f"1,ash,relabel,{nfc}")
    assert copy.read_text(encoding="utf-8") == f"label\n{nfd}\n{nfd}\nash\nash\n"


def test_of_two_forms_of_unicode_a_table_may_have_one_left(ntdne):
    nfc, nfd = "for\u00eat", "fore\u0302t"
    Path("table.csv").write_text(f"label\n{nfd}\n{nfc}\nash\nash\n", encoding="utf-8")
    copy = relabel_table(ntdne, Path("table.csv"), f"1,{nfc},relabel,ash")
    assert copy.read_text(encoding="utf-8") == f"label\n{nfd}\nash\nash\nash\n"


def test_a_text_file_keeps_all_other_lines(ntdne):
    Path("labels.txt").write_bytes(b"oak\r\noak\r\nash\r\n\r\n")
    np.save("features.npy", np.eye(4, dtype=np.float32))
    assert (
        ntdne("relabel", "features.npy", decide("0,oak,relabel,elm", "3,,relabel,elm"), "--labels", "labels.txt") == 0
    )
    assert Path("relabelled/features/labels.txt").read_bytes() == b"elm\r\noak\r\nash\r\nelm\r\n"


def test_a_label_that_would_not_be_read_back_is_refused(ntdne, capsys):
    Path("labels.txt").write_text("oak\nash\n")
    np.save("features.npy", np.eye(2, dtype=np.float32))
    assert ntdne("relabel", "features.npy", decide('0,oak,relabel,"b\nc"'), "--labels", "labels.txt") == 2
    assert "labels.txt: row 0 would not be read back as 'b\\nc'" in capsys.readouterr().err
    assert not Path("relabelled").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            '[{"label":"oak", "x":1.0e5},\n {"x": [1,2],"label" : "oak"},{"label":"ash"},{ }]\n',
            '[{"label":"elm", "x":1.0e5},\n {"x": [1,2],"label" : null},{"label":"ash"},{"label": "b\\"c" }]\n',
        ),
        (
            '{"name":{"samples":[]},"samples": [{"label":{"_id":1,"_cls":"Classification","label":"oak"}},'
            '{"label":{"_cls":"Classification","label":"oak"}},{"label":{"label":"ash"}},{"label":null,"y":"\\u00e9"}]}',
            '{"name":{"samples":[]},"samples": [{"label":{"_id":1,"_cls":"Classification","label":"elm"}},'
            '{"label":null},{"label":{"label":"ash"}},'
            '{"label":{"_cls": "Classification", "label": "b\\"c"},"y":"\\u00e9"}]}',
        ),
    ],
)
def test_json_keeps_all_bytes_but_the_changed_labels(ntdne, before, after):
    path = Path("table.json")
    path.write_text(before)
    copy = relabel_table(ntdne, path, "0,oak,relabel,elm", "1,oak,exclude,", "2,ash,keep,ash", '3,,relabel,"b""c"')
    assert copy.read_text() == after
    assert path.read_text() == before


def test_lines_of_json_keep_all_bytes_but_the_changed_labels(ntdne):
    path = Path("metadata.jsonl")
    path.write_text('{"a": 1, "kind": "oak"}\n{"kind":"oak","z":0.10}\n\n{"kind":"ash"}\n{"a": 4}\n')
    copy = relabel_table(ntdne, path, "0,oak,relabel,elm", "1,oak,exclude,", "3,,relabel,elm", column="kind")
    after = '{"a": 1, "kind": "elm"}\n{"kind":null,"z":0.10}\n\n{"kind":"ash"}\n{"a": 4, "kind": "elm"}\n'
    assert copy.read_text() == after


def test_numbers_in_json_stay_numbers(ntdne):
    path = Path("table.json")
    path.write_text(json.dumps([{"label": 0}, {"label": 0}, {"label": 1.0}, {"label": None}]))
    copy = relabel_table(ntdne, path, "0,0,relabel,5", "2,1,relabel,2", "3,,relabel,3")
    assert copy.read_text() == '[{"label": 5}, {"label": 0}, {"label": 2.0}, {"label": 3}]'


@pytest.mark.parametrize(
    ("kind", "labels", "decided"),
    [
        (pa.string(), ["oak", "oak", "ash", None], "elm"),
        (pa.large_string(), ["oak", "oak", "ash", ""], "elm"),
        (pa.dictionary(pa.int8(), pa.string()), ["oak", "oak", "ash", None], "elm"),
        (pa.int16(), [3, 3, 1, None], "7"),
        (pa.float64(), [3.0, 3.0, 1.0, None], "7"),
    ],
)
def test_parquet_keeps_types_metadata_row_groups_and_other_columns(ntdne, kind, labels, decided):
    table = pa.table(
        {"id": pa.array([1, 2, 3, 4], pa.uint16()), "label": pa.array(labels, kind), "x": [[1.5], [], None, [2.5]]}
    ).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, "table.parquet", row_group_size=3, compression={"id": "gzip", "label": "zstd", "x": "none"})
    before, table = Path("table.parquet").read_bytes(), pq.read_table("table.parquet")
    first = str(labels[0]).removesuffix(".0")
    copy = relabel_table(
        ntdne, Path("table.parquet"), f"0,{first},relabel,{decided}", f"1,{first},exclude,", f"3,,relabel,{decided}"
    )
    new = type(labels[0])(decided)
    found, expected = pq.read_table(copy), [new, None, labels[2], new]
    assert found.schema.equals(table.schema, check_metadata=True)
    assert found["label"].to_pylist() == expected
    assert found.drop_columns("label") == table.drop_columns("label")
    metadata = pq.ParquetFile(copy).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 1]
    codecs = [metadata.row_group(1).column(i).compression for i in range(3)]
    assert codecs == ["GZIP", "ZSTD", "UNCOMPRESSED"]
    assert Path("table.parquet").read_bytes() == before


def test_a_large_row_group_of_parquet_is_not_split(tmp_path):
    N = 2**20 + 1  # pyarrow's default splits here
    pq.write_table(pa.table({"label": pa.array(np.zeros(N, np.int8))}), tmp_path / "a.parquet", row_group_size=N)
    write_changed(tmp_path / "a.parquet", ["label"], {N - 1: "1"}, tmp_path / "b.parquet")
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups == 1
    assert pq.read_table(tmp_path / "b.parquet")["label"][-1].as_py() == 1


def test_a_column_that_cannot_hold_a_label_is_named(ntdne, capsys):
    np.save("features.npy", np.eye(2, dtype=np.float32))
    pq.write_table(pa.table({"label": pa.array([1, 2], pa.uint8())}), "table.parquet")
    assert ntdne("relabel", "features.npy", decide("0,1,relabel,300"), "--labels", "table.parquet") == 2
    assert "table.parquet: column label of uint8 cannot hold a label" in capsys.readouterr().err
    assert not Path("relabelled").exists()


def test_class_folders_whose_names_are_read_as_others_are_refused(ntdne, capsys):
    write_archive(Path("signs"), {"-1": 3, "1": 3})
    decide("1/0.png,1,exclude,")
    assert ntdne("relabel", "signs", "decisions.csv") == 2
    assert "class '-1' of signs would be read as unlabelled" in capsys.readouterr().err


def test_rows_that_a_spreadsheet_emptied_are_passed_over(photos, ntdne):
    path = decide("ash/0.png,ash,relabel,oak")
    path.write_text(path.read_text() + ",,,,,\n")
    assert ntdne("relabel", photos, path) == 0
    assert labels_of()["ash/0.png"] == "oak"


def test_features_in_folders_of_their_own_do_not_replace_each_others_results(ntdne):
    for name in ("one", "other"):
        write_features()
        Path(name).mkdir()
        for file in ("features.npy", "labels.npy"):
            Path(file).rename(Path(name) / file)
        decide("0,lake,exclude,", name=f"{name}.csv")
        assert ntdne("relabel", f"{name}/features.npy", f"{name}.csv") == 0
        assert ntdne("audit", f"{name}/features.npy", "--no-review") == 0
    assert sorted(path.name for path in Path("relabelled").iterdir()) == ["one", "other"]
    assert sorted(path.name for path in Path("audit").iterdir()) == ["one", "other"]
