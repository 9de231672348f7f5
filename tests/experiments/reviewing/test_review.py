"""What a review is written of: which images, in what order, with what beside them; and what stays of an earlier one."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ntdne_kernels.audit import LabelAudit, audit_bank, feature_bank, nearest_neighbours
from ntdne_kernels.experiments.auditing import AuditOptions, Source, check_output, earlier_outputs, page, write_audit
from ntdne_kernels.experiments.reviewing import archive_id, review
from ntdne_kernels.labels import encode_labels

WRONG = (3, 21)
UNLABELLED = (10, 30)


def source_of(picture: Any = None, N: int = 40) -> Source:
    """Two classes in clusters, two wrong labels, two images without one, two copies with different labels."""
    random = np.random.default_rng(0)
    codes = np.arange(N) * 2 // N
    features = np.eye(2, 8)[codes] + 0.2 * random.standard_normal((N, 8))
    labels: list[str | None] = [["lake", "pond"][code] for code in codes]
    for image in WRONG:
        labels[image] = ["pond", "lake"][codes[image]]
    for image in UNLABELLED:
        labels[image] = None
    return Source("some", features, labels, [f"{i}.png" for i in range(N)], picture)


def audit_of(source: Source) -> tuple[LabelAudit, Any]:
    labels, classes = encode_labels(source.labels)
    bank = feature_bank(source.features, labels)
    return audit_bank(bank, sigma=0.1, classes=classes), bank


def write(
    source: Source, folder: Path, count: int | None = None, neighbours: int = 5, method: Any = "rate"
) -> LabelAudit:
    audit, bank = audit_of(source)
    review.write_review(audit, bank, source, folder, method=method, count=count, neighbours=neighbours)
    return audit


def data_of(folder: Path, name: str) -> dict[str, Any]:
    text = (folder / "review" / "data" / f"{name}.js").read_text()
    return json.loads(re.fullmatch(rf'receive\("{name}",(.*)\);\n', text)[1])


def joined(parts: list[dict[str, Any]], column: str) -> list[Any]:
    return list(itertools.chain(*(part[column] for part in parts)))


def test_suspects_come_first_then_the_ranking_then_unlabelled_images():
    audit, _ = audit_of(source_of())
    suspects = audit.suspects(0.3)
    rows = review.images_to_review(audit, suspects, None).tolist()
    ranked = [image for image in audit.ranking.tolist() if image not in UNLABELLED]
    first = [image for image in ranked if suspects[image]]
    assert set(WRONG) <= set(first)
    assert rows[:38] == first + [image for image in ranked if not suspects[image]]
    assert set(rows[38:]) == set(UNLABELLED)
    share = audit.suggested_share
    assert share[rows[38]] >= share[rows[39]]


def test_at_least_the_lowest_and_every_suspect_and_contradicted_copy(monkeypatch):
    monkeypatch.setattr(review, "LOWEST", 3)
    source = source_of()
    source.features[35] = source.features[5]
    source.labels[35] = "pond"
    audit, _ = audit_of(source)
    chosen = set(review.images_to_review(audit, audit.quality < 0.5, None).tolist())
    expected = set(audit.ranking[:3].tolist()) | {5, 35} | set((audit.quality < 0.5).nonzero()[:, 0].tolist())
    assert chosen == expected | set(UNLABELLED)
    assert len(chosen) < 20


@pytest.mark.parametrize("count", [1, 5, 100])
def test_a_number_says_how_many(count):
    audit, _ = audit_of(source_of())
    rows = review.images_to_review(audit, audit.suspects(), count)
    assert len(rows) == min(count, 38) + min(count, 2)


def test_data_are_those_of_the_audit_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(review, "CHUNK", 16)
    source = source_of()
    audit = write(source, tmp_path, neighbours=3)
    index, rows = data_of(tmp_path, "index"), review.images_to_review(audit, audit.suspects(), None)
    assert index["archive"] == archive_id(source.paths, source.labels)
    assert index["rows"] == rows.tolist()
    assert [index["classes"][code] for code in index["given"][:3]] == [source.labels[row] for row in index["rows"][:3]]
    assert index["suggested"] == audit.suggested[rows].tolist()
    assert index["chunk"] == 16
    details = [data_of(tmp_path, f"details-{part}") for part in range(3)]
    assert joined(details, "label_share")[:38] == pytest.approx(audit.label_share[rows][:38].tolist(), abs=6e-4)
    assert details[2]["label_share"][-1] is None
    found, similarity = nearest_neighbours(audit_of(source)[1], rows, 3)
    assert joined(details, "neighbours") == found.tolist()
    assert details[1]["similarity"][0] == pytest.approx(similarity[16].tolist(), abs=6e-4)
    images = [data_of(tmp_path, f"images-{part}") for part in range(3)]
    assert joined(images, "names") == source.paths
    assert joined(images, "given") == audit.labels.tolist()
    assert not (tmp_path / "review" / "data" / "details-3.js").exists()


def test_pictures_are_files_of_what_is_shown_and_can_be_opened(tmp_path):
    def picture(image: int) -> Image.Image:
        if image == WRONG[0]:
            raise OSError("truncated")
        return Image.new("RGB", (20, 10) if image == WRONG[1] else (400, 300), (image, 0, 0))

    write(source_of(picture), tmp_path, 3, neighbours=2)
    index, details = data_of(tmp_path, "index"), data_of(tmp_path, "details-0")
    shown = {*index["rows"], *itertools.chain(*details["neighbours"])} - {WRONG[0]}
    folder = tmp_path / "review" / "pictures" / "0"
    assert {int(file.stem) for file in folder.iterdir()} == shown
    formats = data_of(tmp_path, "images-0")["formats"]
    assert formats[WRONG[0]] == ""
    assert formats[WRONG[1]] == ".png"
    assert Image.open(folder / f"{WRONG[1]}.png").size == (20, 10)
    other = max(shown - {WRONG[1]})
    assert Image.open(folder / f"{other}.jpg").size == (192, 144)
    assert index["pictures"]


def test_features_alone_have_a_review_by_names(tmp_path):
    source = source_of()
    write(source, tmp_path)
    assert not data_of(tmp_path, "index")["pictures"]
    assert not (tmp_path / "review" / "pictures").exists()
    write(Source("some", source.features, source.labels, None, None), tmp_path)
    assert data_of(tmp_path, "images-0")["names"][:3] == ["0", "1", "2"]


def test_in_doubt_there_are_no_suspects_and_no_rate(tmp_path, monkeypatch):
    source = source_of()
    monkeypatch.setattr(page, "quality_histogram", lambda *rest: "data:drawn")  # which takes most of the time
    doubted = np.random.default_rng(0).standard_normal(source.features.shape)
    write_audit(Source("bad", doubted, source.labels, None, None), tmp_path, AuditOptions())
    index = data_of(tmp_path, "index")
    assert index["doubt"]
    assert (index["suspects"], index["judging"], index["noise_rate"]) == (0, False, None)


def test_a_rerun_replaces_the_review_and_keeps_other_files(tmp_path):
    source = source_of(lambda _: Image.new("RGB", (9, 9)))
    write(source, tmp_path)
    mine = tmp_path / "review" / "decisions.csv"
    mine.write_text("mine")
    before = data_of(tmp_path, "index")
    check_output(tmp_path, [], None, "csv")
    write(source, tmp_path, 2, neighbours=1)
    assert mine.read_text() == "mine"
    assert data_of(tmp_path, "index")["archive"] == before["archive"]
    assert len(data_of(tmp_path, "index")["rows"]) == 4
    assert len(list((tmp_path / "review" / "pictures" / "0").iterdir())) <= 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["review"]


def test_a_review_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    write(source_of(), tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "review").rglob("*") if file.is_file()}

    def full(*rest: Any) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(review, "_details", full)
    with pytest.raises(OSError, match="No space left"):
        write(source_of(), tmp_path)
    assert {file: file.read_bytes() for file in (tmp_path / "review").rglob("*") if file.is_file()} == before
    assert not (tmp_path / "review.partial").exists()


def test_no_review_is_written_where_none_is_wanted_and_an_earlier_one_is_named(tmp_path, monkeypatch):
    for name in ("quality_histogram", "transition_map"):
        monkeypatch.setattr(page, name, lambda *rest: "data:drawn")
    written = write_audit(source_of(), tmp_path, AuditOptions(review=0))[1]
    assert not (tmp_path / "review").exists()
    assert earlier_outputs(tmp_path, written) == []
    write(source_of(), tmp_path)
    written = write_audit(source_of(), tmp_path, AuditOptions(review=0))[1]
    assert earlier_outputs(tmp_path, written) == [tmp_path / "review" / "review.html"]


@pytest.mark.parametrize("name", ["data", "pictures"])
def test_a_folder_of_other_files_is_not_replaced(tmp_path, name):
    (tmp_path / "review" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--output: .*/review/{name} is of no review"):
        check_output(tmp_path, [], None, "csv")


@pytest.mark.parametrize("labels", [[0], [-1, -1, -1], [0, 1, 2], [0, 0, 0]])
def test_the_smallest_archives_have_a_review(tmp_path, labels):
    features = np.random.default_rng(0).standard_normal((len(labels), 4))
    write(Source("small", features, np.array(labels), None, None), tmp_path)
    assert (tmp_path / "review" / "review.html").exists()
