"""How many made copies, odd images, divided and joined classes an audit finds, and what it names beside them.

Copies and odd images need pictures: these are changed, encoded as the archive's were, and added to its features.

Shapes: N images, n of them added, D features, C classes.
"""

import io
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks.audit.features import Row, read_rows, write_rows
from ntdne_kernels.audit import LabelAudit, audit_labels, cut_class, find_alike_classes, find_outliers
from ntdne_kernels.audit.class_structure import SAMPLE_SIZE, SMALLEST_CLASS
from ntdne_kernels.experiments.pretrained import make_extractor
from ntdne_kernels.labels import encode_labels

COPIES = 200  # images of which a changed copy is added
DIVIDED = 3  # classes divided at a time
JOINED = 60  # pairs of classes, each put under one name
SIZE = 64  # pixels a side of odd images that are drawn


class Archive(NamedTuple):
    """Features (N, D), codes of their labels (N,), and the pictures, if they are there."""

    name: str
    rows: Tensor
    labels: Tensor
    pictures: list[Path] | None


def read_archive(features: Path, labels: Path, images: Path | None) -> Archive:
    """From .npy files; the names of the images' files are in files.txt beside the features."""
    codes, _ = encode_labels(np.load(labels))
    rows = torch.from_numpy(np.load(features)).float()
    if images is None:
        return Archive(features.stem, rows, codes, None)
    names = features.with_name("files.txt").read_text().splitlines()
    return Archive(images.resolve().name, rows, codes, [images / name for name in names])


def jpeg(picture: Image.Image) -> Image.Image:
    """Saved again with a quality of 90."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 90": jpeg,
    "brightness ×1.1": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "cropped by a pixel on each side": lambda picture: ImageOps.crop(picture, 1),
    "cropped by two pixels at the left": lambda picture: ImageOps.crop(picture, (2, 0, 0, 0)),
    "mirrored": ImageOps.mirror,
}


def odd_images() -> dict[str, list[Image.Image]]:
    """Pictures that are no scenes from above, by their kind."""
    made = np.random.default_rng(0)
    sample = Path(matplotlib.get_data_path(), "sample_data")
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    photographs += [Image.open(sample / name) for name in ("grace_hopper.jpg", "logo2.png")]
    digits = [Image.fromarray((scan * 15).astype("uint8")) for scan in load_digits().images[:3]]
    noise = [made.integers(256, size=(side, side, 3), dtype=np.uint8) for side in (SIZE, SIZE // 4, SIZE // 16)]
    stripes, board, circle = (Image.new("RGB", (SIZE, SIZE), "white") for _ in range(3))
    for place in range(0, SIZE, 8):
        ImageDraw.Draw(stripes).rectangle((place, 0, place + 3, SIZE), "black")
        for other in range(place % 16, SIZE, 16):
            ImageDraw.Draw(board).rectangle((place, other, place + 7, other + 7), "red")
    ImageDraw.Draw(circle).ellipse((8, 8, SIZE - 8, SIZE - 8), "blue")
    colours = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("black", "white", "magenta")]
    kinds = {
        "photographs and drawings": photographs,
        "scans of digits": digits,
        "noise": [Image.fromarray(image) for image in noise],
        "one colour": colours,
        "patterns": [stripes, board, circle],
    }
    return {kind: [image.convert("RGB").resize((SIZE, SIZE)) for image in images] for kind, images in kinds.items()}


class Encoder:
    """That of the archive's features: pictures in, features (n, D) out.

    Raises:
        SystemExit: it gives other features for pictures of the archive than it has.
    """

    def __init__(self, archive: Archive, name: str, image_size: int) -> None:
        self.extractor = make_extractor(name, image_size=image_size)
        assert archive.pictures is not None
        some = range(0, len(archive.pictures), max(len(archive.pictures) // 8, 1))
        mine, theirs = self([Image.open(archive.pictures[image]) for image in some]), archive.rows[list(some)]
        if mine.shape != theirs.shape or cosine_similarity(mine, theirs).min() < 0.999:
            raise SystemExit(f"expected features of {name} with {image_size} pixels, of the pictures in files.txt")

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """(n, D)."""
        pixels = [self.extractor.transform(np.asarray(picture.convert("RGB"))) for picture in pictures]
        return torch.cat([self.extractor.module(torch.stack(pixels[i : i + 64])) for i in range(0, len(pixels), 64)])


def findings(archive: Archive, encoder: str, image_size: int, path: Path) -> None:
    """Write the rows of the archive, in the place of those that `path` has of it."""
    others = [row for row in read_rows(path) if row["dataset"] != archive.name] if path.exists() else []
    found = list(as_it_is(archive))
    if archive.pictures is not None:
        encode = Encoder(archive, encoder, image_size)
        found += [*copies(archive, encode), *outliers(archive, encode)]
    found += [*divided(archive), *joined(archive)]
    write_rows(others + [{"dataset": archive.name} | row for row in found], path)


def _row(finding: str, case: str, made: int, named: int, others: int) -> Row:
    """One line: how many were made, how many of them are named, and how many others beside them."""
    row = {"finding": finding, "case": case, "made": made, "named": named, "others": others}
    print(*row.values(), flush=True)
    return row


def as_it_is(archive: Archive) -> Iterator[Row]:
    """What is named where nothing was made."""
    found = audit_labels(archive.rows, archive.labels, near_copies=True)
    classes = [members for members in _members(archive.labels).values() if len(members) >= SMALLEST_CLASS]
    yield _row("copies", "as it is", 0, 0, int((found.copy_group >= 0).sum()))
    yield _row("outliers", "as it is", 0, 0, int(find_outliers(found.log_density).outlying.sum()))
    yield _row("merge", "as it is", 0, 0, len(_alike(found, archive.labels)))
    yield _row("split", "as it is", 0, 0, sum(_apart(archive.rows[members]) for members in classes))


def copies(archive: Archive, encode: Encoder) -> Iterator[Row]:
    """Changed copies of the same images."""
    assert archive.pictures is not None
    N = len(archive.rows)
    images = _drawn(N)[:COPIES]
    pictures = [Image.open(archive.pictures[image]).convert("RGB") for image in images.tolist()]
    labels = torch.cat([archive.labels, archive.labels[images]])
    before = audit_labels(archive.rows, archive.labels, ridge=False, near_copies=True).copy_group >= 0
    for case, change in CHANGES.items():
        rows = torch.cat([archive.rows, encode([change(picture) for picture in pictures])])
        group = audit_labels(rows, labels, ridge=False, near_copies=True).copy_group
        named = (group[images] >= 0) & (group[images] == group[N:])
        others = (group[:N] >= 0) & ~before
        others[images] = False
        yield _row("copies", case, len(images), int(named.sum()), int(others.sum()))


def outliers(archive: Archive, encode: Encoder) -> Iterator[Row]:
    """Odd images, all added at once."""
    kinds = odd_images()
    odd = encode([image for images in kinds.values() for image in images])
    labels = torch.cat([archive.labels, torch.full((len(odd),), -1)])
    outlying = find_outliers(audit_labels(torch.cat([archive.rows, odd]), labels, ridge=False).log_density).outlying
    parts = outlying[len(archive.rows) :].split([len(images) for images in kinds.values()])
    for kind, part in zip(kinds, parts, strict=True):
        yield _row("outliers", kind, len(part), int(part.sum()), int(outlying[: len(archive.rows)].sum()))


def divided(archive: Archive) -> Iterator[Row]:
    """Classes whose images got two names at random, a few at a time."""
    members = _members(archive.labels)
    large = [code for code in members if len(members[code]) >= 2 * SMALLEST_CLASS]
    order = [large[place] for place in _drawn(len(large)).tolist()]
    made, named, without_doubt, others = 0, 0, 0, 0
    for start in range(0, len(order), DIVIDED):
        labels, pairs = archive.labels.clone(), set()
        for code in order[start : start + DIVIDED]:
            half = members[code][_drawn(len(members[code]))[::2]]
            pairs.add((code, int(labels.max()) + 1))
            labels[half] = int(labels.max()) + 1
        found = audit_labels(archive.rows, labels)
        alike = set(_alike(found, labels))
        made, named, others = made + len(pairs), named + len(pairs & alike), others + len(alike - pairs)
        without_doubt += 0 if found.doubt else len(pairs & alike)
    yield _row("merge", "divided at random, with --force", made, named, others)
    yield _row("merge", "divided at random", made, without_doubt, 0)


def joined(archive: Archive) -> Iterator[Row]:
    """Pairs of classes under one name."""
    members = _members(archive.labels)
    pairs = list(combinations([code for code in members if len(members[code]) >= SMALLEST_CLASS], 2))
    drawn = [pairs[place] for place in _drawn(len(pairs))[:JOINED].tolist()]
    named = sum(_apart(archive.rows[torch.cat([members[one], members[other]])]) for one, other in drawn)
    yield _row("split", "two classes under one name", len(drawn), named, 0)


def _members(labels: Tensor) -> dict[int, Tensor]:
    """The images of each class."""
    return {code: (labels == code).nonzero().squeeze(1) for code in labels[labels >= 0].unique().tolist()}


def _alike(found: LabelAudit, labels: Tensor) -> list[tuple[int, int]]:
    """Pairs to merge."""
    return [(pair.one, pair.other) for pair in find_alike_classes(labels[found.judged], found.suggested[found.judged])]


def _apart(rows: Tensor) -> bool:
    return cut_class(normalize(rows[_drawn(len(rows))[:SAMPLE_SIZE]], dim=1)).apart


def _drawn(number: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))
