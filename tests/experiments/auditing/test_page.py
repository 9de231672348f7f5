"""The page of an audit: what it shows of images, neighbours and classes."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ntdne_kernels.experiments.auditing import AuditOptions, Source, write_audit
from tests.experiments.auditing.helpers import NAMES, clusters


def page_of(folder: Path, source: Source, **options) -> str:
    write_audit(source, folder, AuditOptions(**options))
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
