"""The figures of an audit's page."""

import base64
import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ntdne_kernels.audit import LabelAudit, audit_labels
from ntdne_kernels.experiments.auditing import pictures
from tests.experiments.auditing.helpers import WRONG, clusters


def audit_of(classes: int) -> LabelAudit:
    features, labels = clusters(classes=classes)
    return audit_labels(features, labels)


@pytest.mark.parametrize(
    ("method", "line"), [("auto", None), ("rate", "quality"), ("otsu", "quality"), (0.25, "score")]
)
def test_the_histogram_draws_the_threshold_that_is_one_number(monkeypatch, method, line):
    monkeypatch.setattr(pictures, "_drawn", lambda figure: figure)
    audit = audit_of(2)
    figure = pictures.quality_histogram(audit, audit.suspects(method), method)
    (axis,) = figure.axes  # type: ignore[attr-defined]
    assert sum(bar.get_height() for bar in axis.patches) == len(audit)
    lines = [float(each.get_xdata()[0]) for each in axis.lines]
    assert lines == (
        [] if line is None else [0.25] if line == "score" else [pytest.approx(float(audit.quality[WRONG]))]
    )
    assert axis.get_xlabel().startswith(line or "quality")


def test_the_heat_map_has_given_labels_across_and_leaves_out_the_diagonal(monkeypatch):
    monkeypatch.setattr(pictures, "_drawn", lambda figure: figure)
    audit = audit_of(3)
    shown = pictures.transition_map(audit).axes[0].images[0].get_array()  # type: ignore[attr-defined]
    assert float(shown[0, 1]) == pytest.approx(100 / 12)  # of 12 images of the first class, one was called the second
    assert np.isnan(np.diag(np.ma.filled(shown, np.nan))).all()
    assert pictures.transition_map(audit_of(41)) == ""


def test_figures_are_pictures_that_a_page_can_hold():
    audit = audit_of(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [
            pictures.quality_histogram(audit, audit.suspects("rate"), "rate"),
            pictures.transition_map(replace(audit, classes=("北京", "a" * 200))),
        ]
    for uri in drawn:
        assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).width > 400
