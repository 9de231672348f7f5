"""What the tests of the audit share: features in clusters with one wrong label, and how pages are read."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

WRONG = 3  # the image of the first class that carries the second one's label
NAMES = ["lake", "pond"]
LABELS = ["--labels", "labels.npy"]


def clusters(each: int = 12, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Features in clusters, with a label each, one of them wrong."""
    source = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    features = np.eye(classes, 8 + classes)[labels] + 0.1 * source.standard_normal((len(labels), 8 + classes))
    labels[WRONG] = 1
    return features.astype(np.float32), labels


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pictures_on(page: Path) -> list[np.ndarray]:
    """The thumbnails of a page, in its order."""
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]
