"""Writes the review of an audit: a page on which people decide on labels, with its data and pictures beside it.

    review/review.html                 the page; nothing else need be opened
    review/data/index.js               what the page needs at once, by place in the review
    review/data/details-0.js           shares and neighbours of the places 0 to 999, and so on
    review/data/images-0.js            names and labels of the archive's rows 0 to 999, and so on
    review/pictures/0/12.jpg           the picture of row 12, in a folder for each 1,000 rows

A page that was opened as a file may not fetch others, but it may load scripts: each is a call `receive(name, content)`.

Shapes: N images of the archive, n images of the review, K neighbours.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ntdne_kernels
from ntdne_kernels.audit import LabelAudit, nearest_neighbours
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.experiments.auditing.inputs import PICTURE_SIZE, Source
from ntdne_kernels.experiments.auditing.pictures import FORMATS, small_pictures
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.page import render
from ntdne_kernels.experiments.reviewing.decisions import archive_id, image_names
from ntdne_kernels.labels import encode_labels

FOLDER, DATA, PICTURES = "review", "data", "pictures"
PAGE = f"{FOLDER}/review.html"
LOWEST = 1000  # images of the lowest quality that are in a review at least, suspects or not
CHUNK = 1000  # places or rows of a file


def write_review(
    audit: LabelAudit,
    bank: MemoryBank,
    source: Source,
    folder: Path,
    *,
    method: str | float | None,
    count: int | None,
    neighbours: int,
) -> Path:
    """Write the review of an audit into `review/` in a folder, in the place of an earlier one.

    It is written under another name first. Other files in `review/`, decisions for instance, stay.

    Args:
        audit: whose ranking is reviewed.
        bank: of the features, where neighbours are looked up.
        source: what was audited.
        folder: of the audit's outputs.
        method: how suspects are chosen, see `LabelAudit.suspects`; None: there are none.
        count: how many labels, see `images_to_review`.
        neighbours: K, shown beside each image.

    Returns:
        The page.

    Raises:
        OSError: a file cannot be written.
    """
    given, _ = encode_labels(source.labels)  # codes of audit.classes, which may have further ones
    suspects = torch.zeros_like(audit.judged) if method is None else audit.suspects(method)
    rows = images_to_review(audit, suspects, count)
    found, similarity = nearest_neighbours(bank, rows, neighbours) if len(rows) else (rows.view(0, 1),) * 2
    partial = folder / "review.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / DATA).mkdir(parents=True)
        shown = torch.cat([rows, found.flatten()]).unique().tolist()
        formats = _write_pictures(partial / PICTURES, source, shown)
        index = _index(audit, source, rows, given) | {
            "judging": method is not None,
            "suspects": int(suspects.sum()),
            "noise_rate": None if method is None or audit.doubt else audit.noise_rate,
            "pictures": bool(formats),
        }
        _write_data(partial / DATA, "index", index)
        for chunk, places in enumerate(torch.arange(len(rows)).split(CHUNK)):
            details = _details(audit, rows[places], found[places], similarity[places])
            _write_data(partial / DATA, f"details-{chunk}", details)
        names, labels = image_names(source.paths, len(audit)), given.tolist()
        for start in range(0, len(audit), CHUNK):
            part = range(start, min(start + CHUNK, len(audit)))
            content = {
                "names": [names[row] for row in part],
                "given": [labels[row] for row in part],
                "formats": [formats.get(row, "") for row in part],
            }
            _write_data(partial / DATA, f"images-{start // CHUNK}", content)
        page = render("review.html", {"name": source.name, "version": ntdne_kernels.__version__})
        _replace(folder / FOLDER, partial, page.encode(errors="replace"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / PAGE


def check_review(folder: Path) -> None:
    """ValueError where the folder of the audit's outputs has other files where the review's would be."""
    final = folder / FOLDER
    taken = [final / name for name in (DATA, PICTURES) if (final / name).exists()]
    ours = (folder / PAGE).exists() or (final / DATA / "index.js").exists()
    if (final.exists() and not final.is_dir()) or (taken and not ours):
        raise ValueError(
            f"--output: {(taken or [final])[0]} is of no review, and would be replaced; give another folder"
        )


def images_to_review(audit: LabelAudit, suspects: Tensor, count: int | None) -> Tensor:
    """(n,) rows in the order of the review: suspects, other labels, and unlabelled images with a suggestion.

    Labels are in the order of the ranking, unlabelled images by the share of the suggested class.

    Args:
        audit: whose ranking is reviewed.
        suspects: (N,) bool.
        count: how many labels, and how many unlabelled images at most; None: all suspects, all labels that an exact
            copy contradicts, and at least the `LOWEST` of the ranking; and as many unlabelled images.
    """
    ranked = audit.ranking[(audit.judged & ~audit.checked)[audit.ranking]]
    ranked = torch.cat([ranked[suspects[ranked]], ranked[~suspects[ranked]]])
    if count is None:
        first = torch.arange(len(ranked)) < LOWEST
        labelled = ranked[first | suspects[ranked] | audit.conflicting[ranked]]
    else:
        labelled = ranked[:count]
    unlabelled = ((audit.labels < 0) & ~audit.checked & (audit.suggested >= 0)).nonzero()[:, 0]
    surest = audit.suggested_share[unlabelled].argsort(descending=True, stable=True)
    return torch.cat([labelled, unlabelled[surest[: LOWEST if count is None else count]]])


def _index(audit: LabelAudit, source: Source, rows: Tensor, given: Tensor) -> dict[str, Any]:
    return {
        "archive": archive_id(source.paths, source.labels),
        "classes": list(map(str, audit.classes)),
        "images": len(audit),
        "judged": int(audit.judged.sum()),
        "doubt": audit.doubt,
        "chunk": CHUNK,
        "rows": rows.tolist(),
        "given": given[rows].tolist(),
        "suggested": audit.suggested[rows].tolist(),
        "copies": _copies(audit, rows),
    }


def _copies(audit: LabelAudit, rows: Tensor) -> list[list[int]]:
    """Places of exact and near copies, for each group of which more than one image is in the review."""
    places: dict[int, list[int]] = {}
    for place, first in enumerate(audit.copy_group[rows].tolist()):
        if first >= 0:
            places.setdefault(first, []).append(place)
    return [each for each in places.values() if len(each) > 1]


def _details(audit: LabelAudit, rows: Tensor, neighbours: Tensor, similarity: Tensor) -> dict[str, Any]:
    return {
        "label_share": _rounded(audit.label_share[rows]),
        "suggested_share": _rounded(audit.suggested_share[rows]),
        "neighbours": neighbours.tolist(),
        "similarity": [_rounded(each) for each in similarity],
    }


def _rounded(values: Tensor) -> list[float | None]:
    """Numbers as the page shows them, None for NaN."""
    return [None if value != value else round(value, 3) for value in values.tolist()]


def _write_pictures(folder: Path, source: Source, rows: Iterable[int]) -> dict[int, str]:
    """Write the pictures of rows that can be opened; gives their formats, which end the names of the files."""
    formats: dict[int, str] = {}
    if source.picture is None:
        return formats
    for row, picture, format in small_pictures(source.picture, rows, PICTURE_SIZE):
        file = folder / str(row // CHUNK) / f"{row}{FORMATS[format]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
        formats[row] = FORMATS[format]
    return formats


def _write_data(folder: Path, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    (folder / f"{name}.js").write_text(f"receive({json.dumps(name)},{text});\n", encoding="ascii")


def _replace(final: Path, partial: Path, page: bytes) -> None:
    """Put a new review in the place of an earlier one, the page last: where it is, so is all that it needs."""
    final.mkdir(exist_ok=True)
    page_file = final.parent / PAGE
    page_file.unlink(missing_ok=True)
    for name in (PICTURES, DATA):
        if (final / name).exists():
            (final / name).rename(partial / f"earlier-{name}")
        if (partial / name).exists():
            (partial / name).rename(final / name)
    write_whole(page_file, lambda file: file.write(page))
