"""What `ntdne search` says of the images it found: a table, and a page of pictures.

Shapes: n queries, k neighbours.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import ntdne_kernels
from ntdne_kernels.experiments.auditing.inputs import PICTURE_SIZE, as_utf8
from ntdne_kernels.experiments.auditing.pictures import thumbnails
from ntdne_kernels.experiments.columns import SUFFIXES, read_matrix
from ntdne_kernels.experiments.embedding import Embeddings, open_embeddings
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.images import as_picture, decode
from ntdne_kernels.experiments.page import render
from ntdne_kernels.experiments.retrieval import Head, search


def search_files(
    archive: Path,
    queries: Sequence[str],
    k: int,
    *,
    head: Head | None = None,
    device: str | None = None,
    page: Path | None = None,
) -> str:
    """The images nearest to each query as a table; the same with pictures on a page, where one is wanted.

    Args:
        archive: a folder of `ntdne embed`, or a file of features.
        queries: image files, or one file of features.
        k: neighbours of each.
        head: as `search`.
        device: as `search`.
        page: the HTML file; None: none is written.

    Raises:
        ValueError: as `search`, or there is no folder for the page.
        OSError: a file cannot be read or written.
    """
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise ValueError(f"--page: expected a file in a folder that is there, got {page}")
    if not archive.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(archive))
    items: list[dict[str, Any]]
    found = open_embeddings(archive) if archive.is_dir() else read_matrix(archive, ["features"])
    if len(queries) == 1 and Path(queries[0]).suffix in SUFFIXES:
        file = Path(queries[0])
        features = read_matrix(file, ["features"])
        items = [{"image": row, "path": f"row {row} of {file}", "file": None} for row in range(len(features))]
        neighbours, similarity = search(found, features, k, head=head, device=device)
    else:
        items = [{"image": i, "path": as_utf8(query), "file": Path(query)} for i, query in enumerate(queries)]
        neighbours, similarity = search(found, queries, k, head=head, device=device)
    for item, rows, values in zip(items, neighbours.tolist(), similarity.tolist(), strict=True):
        item["neighbours"] = [
            _neighbour(found, row) | {"similarity": value} for row, value in zip(rows, values, strict=True)
        ]
    if page is not None:
        _write_page(items, as_utf8(str(archive)), page)
    return "\n".join(map(_table, items))


def _neighbour(found: Any, row: int) -> dict[str, Any]:
    """What is known of a row of the archive."""
    if not isinstance(found, Embeddings):
        return {"image": row, "path": f"row {row}", "label": None, "file": None}
    return {
        "image": row,
        "path": as_utf8(found.files[row]),
        "label": as_utf8(str(found.labels[row])) or None,
        "file": Path(found.about["folder"], found.files[row]),
    }


def _table(item: dict[str, Any]) -> str:
    """A query, and a line for each of its neighbours."""
    labels = [neighbour["label"] or "" for neighbour in item["neighbours"]]
    width = max(map(len, ("class", *labels)))
    lines = [
        f"{rank:>5}  {neighbour['similarity']:>10.4f}  {label:<{width}}  {neighbour['path']}"
        for rank, (neighbour, label) in enumerate(zip(item["neighbours"], labels, strict=True), start=1)
    ]
    return "\n".join([item["path"], f"{'rank':>5}  similarity  {'class':<{width}}  file", *lines])


def _write_page(items: list[dict[str, Any]], archive: str, page: Path) -> None:
    shown = [each for item in items for each in (item, *item["neighbours"])]
    with_file = [place for place, each in enumerate(shown) if each["file"] is not None]

    def picture(place: int) -> Image.Image:
        file: Path = shown[place]["file"]
        if not file.is_file():  # reading a pipe would wait for ever
            raise FileNotFoundError(f"no file {file}")
        return Image.fromarray(as_picture(decode(file, smallest=PICTURE_SIZE)))

    drawn = thumbnails(picture, with_file)
    for place, each in enumerate(shown):
        each["thumbnail"] = drawn.get(place, "")
    content = {"items": items, "archive": archive, "pictures": bool(drawn), "version": ntdne_kernels.__version__}
    html = render("search.html", content)
    write_whole(page, lambda file: file.write(html.encode(errors="replace")))
