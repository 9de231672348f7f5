"""The nearest neighbours of images in a memory bank.

Shapes: n images, D features, k neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype, check_range
from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.labels import as_index
from ntdne_kernels.ops.chunked import chunks_of

QUERY_BLOCK = 256  # images compared with a block of rows


def nearest_neighbours(bank: MemoryBank, images: Any, k: int) -> tuple[Tensor, Tensor]:
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

    Returns:
        (n, k) images and their cosine similarities, on the CPU; fewer than k where the bank has fewer.

    Raises:
        TypeError: images are no integers.
        ValueError: images have not one dimension, or k is not 1 or more.
        IndexError: an image is not in the bank.
    """
    images = as_index(images, "images")
    check_range("images", images, len(bank))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected 1 or more neighbours, got {k!r}")
    blocks = images.to(bank.device).split(QUERY_BLOCK)
    found = [_nearest(bank, block, min(k, len(bank) - 1)) for block in blocks]
    neighbours, similarity = zip(*found, strict=True)
    return torch.cat(neighbours), torch.cat(similarity)


def _nearest(bank: MemoryBank, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype, block = accumulator_dtype(bank.storage.dtype), rows_per_block(QUERY_BLOCK)
    queries, own_rows = bank.rows(images).to(dtype), bank.positions(images)
    similarity, nearest_rows = queries.new_empty((len(images), 0)), own_rows.new_empty((len(images), 0))
    for start, chunk in chunks_of(bank.storage, bank.device, block):
        products = queries @ chunk.to(dtype).t()
        inside = ((own_rows >= start) & (own_rows < start + len(chunk))).nonzero().squeeze(1)
        products[inside, own_rows[inside] - start] = -torch.inf
        best, rows = products.topk(min(k, len(chunk)), dim=1)
        candidates = torch.cat([similarity, best], dim=1)
        similarity, columns = candidates.topk(min(k, candidates.size(1)), dim=1)
        nearest_rows = torch.cat([nearest_rows, rows + start], dim=1).gather(1, columns)
    return bank.order[nearest_rows].cpu(), similarity.cpu()
