import unicodedata

import numpy as np
import pytest
import torch

from ntdne_kernels import encode_labels
from ntdne_kernels.experiments.reviewing import (
    ConflictError,
    Decisions,
    archive_id,
    image_names,
    read_decisions,
)

EARLY, LATE = "2026-01-31T12:00:00Z", "2026-01-31T12:00:00.001Z"  # as text the second sorts first


def test_decisions_are_read_in_the_order_of_the_archive(archive, decide):
    decisions = read_decisions(
        decide(
            ("oak/2.png", "oak", "exclude", "", LATE),
            ("ash/2.png", "ash", "relabel", "oak", EARLY),
            ("elm/1.png", "elm", "unsure", ""),
            ("ash/1.png", "ash", "keep", "ash"),
        ),
        *archive,
    )
    assert decisions.images.tolist() == [0, 1, 2, 5]
    assert decisions.verdicts.tolist() == [0, 1, 2, 3]
    assert decisions.decided == ["ash", "oak", "", ""]
    assert decisions.when == ["", EARLY, "", LATE]
    assert decisions.counts() == {"keep": 1, "relabel": 1, "unsure": 1, "exclude": 1}
    assert decisions.having("keep", "exclude").tolist() == [0, 5]


@pytest.mark.parametrize(
    ("order", "decided"), [((EARLY, LATE), "oak"), ((LATE, EARLY), "elm"), ((LATE, LATE), "oak"), (("", EARLY), "oak")]
)
def test_of_two_rows_for_one_image_the_later_counts(archive, decide, order, decided):
    first, second = order
    file = decide(("ash/1.png", "ash", "relabel", "elm", first), ("ash/1.png", "ash", "relabel", "oak", second))
    assert read_decisions(file, *archive).decided == [decided]


@pytest.mark.parametrize(("of_archive", "said"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_class_in_another_form_of_unicode_is_the_archives(tmp_path, of_archive, said):
    name, other = (unicodedata.normalize(form, "forêt") for form in (of_archive, said))
    new, again = (unicodedata.normalize(form, "rivière") for form in ("NFC", "NFD"))
    file = tmp_path / "decisions.csv"
    rows = f"1,lac,relabel,{other} ,,\n2,{other},keep,{other},,\n3,lac,relabel,{new},,\n4,lac,relabel,{again},,\n"
    file.write_text(f"image,given,verdict,decided,when,archive\n{rows}", encoding="utf-8")
    decisions = read_decisions(file, ["1", "2", "3", "4"], ["lac", name, "lac", "lac"])
    assert decisions.decided == [name, name, new, new]
    assert decisions.apply(["lac", name, "lac", "lac"])[1] == (*sorted([name, "lac"]), new)


def test_a_new_class_that_differs_in_letter_case_alone_is_refused(archive, decide):
    first = decide(("ash/1.png", "ash", "relabel", "Birch"), ("ash/2.png", "ash", "relabel", "Oak"))
    with pytest.raises(ValueError, match="line 3: decided: 'Oak' differs from the class 'oak' in letter case alone"):
        read_decisions(first, *archive)
    first = decide(("ash/1.png", "ash", "relabel", "Birch"), name="first.csv")
    second = decide(("ash/2.png", "ash", "relabel", "birch"), name="second.csv")
    with pytest.raises(ValueError, match="second.csv: line 2: decided: 'birch' differs from the class 'Birch'"):
        read_decisions([first, second], *archive)
    labels = ["oak", "Oak", "ash"]  # an archive that has both keeps both
    file = decide(("a", "ash", "relabel", "Oak"), name="third.csv", archive="")
    assert read_decisions(file, ["b", "c", "a"], labels).decided == ["Oak"]


def test_an_image_whose_name_is_not_unique_is_named_by_its_row(tmp_path):
    paths, labels = ["1.png", "1.png", "2.png"], ["ash", "oak", "oak"]
    file = tmp_path / "decisions.csv"
    file.write_text(f"image,given,verdict,decided,when,archive\n1,oak,exclude,,,{archive_id(paths, labels)}\n")
    assert read_decisions(file, paths, labels).images.tolist() == [1]
    file.write_text("image,given,verdict,decided,when,archive\n1.png,oak,exclude,,,\n")
    with pytest.raises(ValueError, match=r"another archive: line 2: there is no image 1\.png"):
        read_decisions(file, paths, labels)


def test_names_and_classes_with_commas_quotes_and_line_breaks_are_read(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_bytes(b'\xef\xbb\xbfimage,given,verdict,decided,when,archive\r\n"a ""1"",\n.png",x,relabel,"b,c",,\r\n')
    assert read_decisions(file, ['a "1",\n.png'], ["x"]).decided == ["b,c"]


def test_a_file_name_that_is_not_utf8_is_named_as_pages_write_it(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text("image,given,verdict,decided,when,archive\n\\xff.png,7,keep,7,,\n")
    assert image_names(["\udcff.png"], 1) == ["\\xff.png"]
    assert read_decisions(file, ["\udcff.png"], [7]).decided == ["7"]


def test_an_unlabelled_image_can_get_a_label(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text("image,given,verdict,decided,when,archive\n1,,relabel,4,,\n")
    decisions = read_decisions(file, None, np.array([4, -1]))
    assert decisions.apply(np.array([4, -1]))[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("ash/1.png", "ash", "retain", "ash"), "line 2: verdict: expected one of keep, relabel, unsure, exclude"),
        (("ash/1.png", "ash", "keep", "oak"), "line 2: decided: expected 'ash' for keep, got 'oak'"),
        (("ash/1.png", "ash", "relabel", " "), "line 2: decided: expected a class for relabel, got none"),
        (("ash/1.png", "ash", "relabel", "ash"), "expected another class than the given one for relabel"),
        (("ash/1.png", "ash", "unsure", "oak"), "decided: expected '' for unsure, got 'oak'"),
        (("ash/1.png", "ash", "exclude", "oak"), "decided: expected '' for exclude, got 'oak'"),
        (("ash/1.png", "ash", "keep", "ash", "noon"), "when: expected a time as 2026-01-31T12:34:56.789Z, got 'noon'"),
        (("ash/9.png", "ash", "keep", "ash"), "of another archive: line 2: there is no image ash/9.png"),
        (("ash/1.png", "elm", "keep", "elm"), "line 2: ash/1.png has the label 'ash' and not 'elm'"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(archive, decide, row, message):
    with pytest.raises(ValueError, match="decisions.csv") as error:
        read_decisions(decide(row), *archive)
    assert message in str(error.value)


def test_decisions_of_another_archive_are_refused_although_all_rows_fit(archive, decide):
    file = decide(("ash/1.png", "ash", "keep", "ash"), archive="0" * 16)
    with pytest.raises(ValueError, match=f"is of another archive: its archive is {'0' * 16}, and this one"):
        read_decisions(file, *archive)


def test_of_many_wrong_rows_the_first_are_named(archive, decide):
    file = decide(*((f"{i}.png", "ash", "keep", "ash") for i in range(5)))
    with pytest.raises(ValueError, match=r"no image 0\.png; .*no image 2\.png and 2 more$"):
        read_decisions(file, *archive)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n1.png,oak\n", "holds no decisions: expected columns .*, got no image"),
        (b"", "got no image"),
        (b"image,given,verdict,decided,when,archive\n1,oak,keep\n", "expected 6 values in line 2"),
        (b"image,given,verdict,decided,when,archive\n1,oak,keep,oak,,,,\n", "expected 6 values in line 2"),
        (b"image,given,verdict,decided,when,archive\n\xff\n", "cannot be read"),
        (b'image,given,verdict,decided,when,archive\n"1,oak', "cannot be read"),
    ],
)
def test_a_file_that_holds_no_decisions_is_refused(archive, tmp_path, content, message):
    file = tmp_path / "decisions.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_decisions(file, *archive)


@pytest.fixture
def two_people(decide):
    """They agree on one image, each decided alone on another, and they differ on two."""
    mine = decide(
        ("ash/1.png", "ash", "relabel", "oak", EARLY),
        ("ash/2.png", "ash", "relabel", "oak", LATE),
        ("elm/1.png", "elm", "relabel", "oak", LATE),
        ("elm/2.png", "elm", "keep", "elm", EARLY),
        name="mine.csv",
    )
    yours = decide(
        ("ash/1.png", "ash", "relabel", "oak", LATE),
        ("ash/2.png", "ash", "relabel", "elm", EARLY),
        ("elm/1.png", "elm", "exclude", "", LATE),
        ("oak/1.png", "oak", "unsure", "", EARLY),
        name="yours.csv",
    )
    return mine, yours


def test_conflicts_of_two_people_are_refused_with_what_each_says(archive, two_people):
    mine, yours = two_people
    with pytest.raises(
        ConflictError, match="2 images have conflicting decisions, as ash/2.png: relabel oak in"
    ) as error:
        read_decisions(two_people, *archive)
    assert error.value.conflicts == {
        "ash/2.png": {str(mine): "relabel oak", str(yours): "relabel elm"},
        "elm/1.png": {str(mine): "relabel oak", str(yours): "exclude"},
    }


@pytest.mark.parametrize(
    ("on_conflict", "images", "decided"),
    [("latest", [0, 1, 2, 3, 4], ["oak", "oak", "", "elm", ""]), ("skip", [0, 3, 4], ["oak", "elm", ""])],
)
def test_conflicts_can_go_to_the_latest_or_be_skipped(archive, two_people, on_conflict, images, decided):
    decisions = read_decisions(two_people, *archive, on_conflict)
    assert decisions.images.tolist() == images
    assert decisions.decided == decided


def test_decisions_keep_the_codes_of_known_classes_and_put_new_ones_after(archive):
    _, labels = archive
    decisions = Decisions(torch.tensor([0, 2, 3, 4]), torch.tensor([1, 1, 2, 3]), ["birch", "aspen", "", ""], [""] * 4)
    before, classes = encode_labels(labels)
    codes, named = decisions.apply(labels)
    assert named == (*classes, "aspen", "birch")
    assert codes.tolist() == [4, 0, 3, 1, -1, 2]
    assert before.tolist() == [0, 0, 1, 1, 2, 2]
    assert decisions.apply(labels, drop_unsure=True)[0].tolist() == [4, 0, 3, -1, -1, 2]


def test_the_id_of_an_archive_follows_names_order_and_labels():
    ids = [
        archive_id(paths, labels)
        for paths, labels in (
            (["1", "2"], ["ash", "oak"]),
            (["2", "1"], ["ash", "oak"]),
            (["1", "3"], ["ash", "oak"]),
            (["1", "2"], ["ash", None]),
            (["1", "2"], ["ash", "elm"]),
        )
    ]
    assert len(set(ids)) == 5
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in ids)
    assert archive_id(None, np.array([3, -1])) == archive_id(None, torch.tensor([3, -1])) == archive_id(None, ["3", ""])
