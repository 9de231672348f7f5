"""The nearest neighbours of images in a memory bank.

Shapes: n images, M images that they are compared with, D features, k neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, accumulator_dtype, check_range
from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.labels import as_index

QUERY_BLOCK = 1024  # images compared with a block of rows


def nearest_neighbours(bank: MemoryBank, images: Any, k: int, *, among: Any = None) -> tuple[Tensor, Tensor]:
    """The k images most similar to each of the images (n,), which is not its own neighbour; the nearest first.

    Example:
        >>> from ntdne_kernels.audit import feature_bank
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> neighbours, similarity = nearest_neighbours(feature_bank(features, torch.tensor([0, 0, 1])), [0, 2], k=1)
        >>> neighbours.tolist()
        [[1], [1]]
        >>> similarity
        tensor([[0.9950],
                [0.0995]])

    Args:
        bank: kept by one process.
        images: (n,) integers, as `IndexedDataset` numbers them.
        k: how many neighbours, from 1.
        among: (M,) integers: the images that are looked at, each once, however often it stands there; None: all.

    Returns:
        (n, k) images and their cosine similarities, on the CPU; fewer than k where one of the images has fewer than k
        others to look at.

    Raises:
        TypeError: images are no integers.
        ValueError: images have not one dimension, or k is not 1 or more.
        IndexError: an image is not in the bank.
    """
    images = as_index(images, "images")
    check_range("images", images, len(bank))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected 1 or more neighbours, got {k!r}")
    if among is None:
        rows = torch.arange(len(bank), device=bank.device)
    else:
        among = as_index(among, "among")
        check_range("among", among, len(bank))
        if bool((among == NOT_IN_BANK).any()):
            raise IndexError(f"among: expected images from 0 to {len(bank) - 1}, got -1")
        rows = bank.positions(among.to(bank.device)).unique()  # in the order in which they lie
    queries = images.to(bank.device)
    others = len(rows) - int(torch.isin(bank.positions(queries), rows).any())
    found = [_nearest(bank, block, rows, min(k, others)) for block in queries.split(QUERY_BLOCK)]
    neighbours, similarity = zip(*found, strict=True)
    return torch.cat(neighbours), torch.cat(similarity)


def _nearest(bank: MemoryBank, images: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype, block = accumulator_dtype(bank.storage.dtype), rows_per_block(QUERY_BLOCK)
    queries, own_rows = bank.rows(images).to(dtype), bank.positions(images)
    similarity, nearest_rows = queries.new_empty((len(images), 0)), own_rows.new_empty((len(images), 0))
    for part in rows.split(block):
        products = queries @ bank.stored_rows(part).to(dtype).t()
        products.masked_fill_(part == own_rows.unsqueeze(1), -torch.inf)
        best, columns = products.topk(min(k, len(part)), dim=1)
        candidates = torch.cat([similarity, best], dim=1)
        similarity, chosen = candidates.topk(min(k, candidates.size(1)), dim=1)
        nearest_rows = torch.cat([nearest_rows, part[columns]], dim=1).gather(1, chosen)
    return bank.order[nearest_rows].cpu(), similarity.cpu()
