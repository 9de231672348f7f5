"""The images of an archive nearest to new ones: exact, streamed over the archive's features.

Shapes: N images of the archive, n queries, F features, D of them behind a head, k neighbours.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.experiments.columns import read_matrix
from ntdne_kernels.experiments.embedding import Batches, Embeddings, open_embeddings
from ntdne_kernels.experiments.pretrained import make_extractor

Head = Callable[[Tensor], Tensor]


@torch.inference_mode()
def search(
    archive: Any, queries: Any, k: int = 10, *, head: Head | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The k images of an archive with the features most similar to those of each query, the nearest first.

    All N·n pairs are compared. The archive is read once, block by block, so that its features may be larger than
    memory; beside a block it takes (n, k) results.

    Example:
        >>> archive = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], np.float16)
        >>> neighbours, similarity = search(archive, np.array([[0.0, 1.0]]), k=2)
        >>> neighbours
        tensor([[1, 2]])
        >>> similarity
        tensor([[1.0000, 0.7071]])

    Args:
        archive: what `embed` wrote, or its folder; features (N, F) of any length but 0, as a tensor, array or memory
            map; or a .npy, .npz or .parquet file of them.
        queries: image files, where the archive is what `embed` wrote: they are encoded as its images were; or features
            (n, F), as the archive.
        k: from 1.
        head: what a trained encoder makes (b, D) of features (b, F), of archive and queries alike.
        device: where to compare; None: a GPU where there is one.

    Returns:
        (n, k) rows of the archive and their cosine similarities, on the CPU; fewer than k where the archive has fewer.

    Raises:
        ValueError: k is not 1 or more; archive and queries differ in F, are no features, or have rows that are 0 or
            not finite; or a query cannot be read or encoded as the archive was.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected 1 or more neighbours, got {k!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(archive, str | Path):
        archive = open_embeddings(archive) if Path(archive).is_dir() else read_matrix(Path(archive), ["features"])
    if not hasattr(queries, "shape"):  # names of files
        queries = _encoded(archive, [os.fspath(file) for file in queries], str(device))
    features = archive.features if isinstance(archive, Embeddings) else archive
    for name, values in (("archive", features), ("queries", queries)):
        if len(getattr(values, "shape", ())) != 2 or 0 in values.shape:
            raise ValueError(f"{name}: expected features (N, F), got {getattr(values, 'shape', type(values).__name__)}")
    if features.shape[1] != queries.shape[1]:
        raise ValueError(f"queries: expected {features.shape[1]} features, as the archive has, got {queries.shape[1]}")
    wanted = _unit(queries, 0, "queries", head, device)
    n, N = len(wanted), len(features)
    similarity, neighbours = wanted.new_empty((n, 0)), torch.empty((n, 0), dtype=torch.int64, device=device)
    block = rows_per_block(max(n, features.shape[1]))
    for start in range(0, N, block):
        products = wanted @ _unit(features[start : start + block], start, "archive", head, device).t()
        rows = torch.arange(start, start + products.size(1), device=device).expand(n, -1)
        similarity, columns = torch.cat([similarity, products], dim=1).topk(min(k, similarity.size(1) + rows.size(1)))
        neighbours = torch.cat([neighbours, rows], dim=1).gather(1, columns)
    return neighbours.cpu(), similarity.cpu()


def _unit(rows: Any, start: int, name: str, head: Head | None, device: torch.device) -> Tensor:
    """Rows (b, F), of which `start` is the first, as unit rows (b, D) of float32."""
    if not isinstance(rows, Tensor):
        # A copy in native byte order: torch takes no other order, and warns of memory maps that are read-only.
        rows = torch.from_numpy(np.array(rows, rows.dtype.newbyteorder("=")))
    rows = rows.to(device).float()
    found = rows if head is None else head(rows).float()
    norm = torch.linalg.vector_norm(found, dim=1, keepdim=True)
    usable = (norm > 0) & norm.isfinite()
    if not usable.all():
        row = start + int((~usable).nonzero()[0, 0])
        raise ValueError(f"{name}: expected rows of a positive, finite norm, got another in row {row}")
    unit: Tensor = found / norm
    return unit


def _encoded(archive: Any, files: Sequence[str], device: str) -> Tensor:
    """Features (n, F) of image files, by the encoder of the archive."""
    if not isinstance(archive, Embeddings):
        raise ValueError("queries: expected features, as the archive is; image files need a folder of ntdne embed")
    about = archive.about
    extractor = make_extractor(about["encoder"], about["weights"], about["image_size"])
    if extractor.fingerprint() != about["weights_sha256"] or str(extractor.transform) != about["transform"]:
        raise ValueError(
            f"archive: {about['encoder']} with weights {about['weights']} is not what made its features; "
            f"they were made with {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
        )
    found, remaining = [], iter(files)
    pixels = about["bands"], about.get("white"), about["max_pixels"]  # no white in those of former versions
    for features, reasons in Batches(extractor, files, *pixels, device=device):
        for reason, file in zip(reasons, remaining, strict=False):
            if reason:
                raise ValueError(f"{file} cannot be read: {reason}")
        found.append(features)
    return torch.cat(found)
