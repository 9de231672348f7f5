"""Images with exactly the same features as another one: found by hashes of the rows, confirmed by comparison.

Shapes: N images, D features.
"""

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK
from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.bank import MemoryBank


def find_duplicates(bank: MemoryBank) -> Tensor:
    """(N,) the first image whose row is the same to the bit; −1 for none, and for that first one."""
    hashes, images = _hash_rows(bank).sort(stable=True)
    _, run, sizes = torch.unique_consecutive(hashes, return_inverse=True, return_counts=True)
    firsts = images[(torch.cumsum(sizes, 0) - sizes)[run]]
    images, firsts = images[firsts != images], firsts[firsts != images]
    duplicate_of = torch.full((len(bank),), NOT_IN_BANK, device="cpu")
    block = rows_per_block(bank.storage.size(1))
    for image, first in zip(images.split(block), firsts.split(block), strict=True):
        equal = (bank.rows(image.to(bank.device)) == bank.rows(first.to(bank.device))).all(dim=1).cpu()
        duplicate_of[image[equal]] = first[equal]
    return duplicate_of


def _hash_rows(bank: MemoryBank) -> Tensor:
    """(N,) int64, by image: the sum of a row's words, each times an odd factor, modulo 2^64."""
    # With 64-bit words a changed sign would add 2^63 whatever the odd factor, so that two signs cancel. In a word of 16
    # bits it adds 2^15 times the factor.
    words = bank.storage.size(1) * bank.storage.element_size() // 2
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words,), generator=generator, device="cpu") * 2 + 1
    hashes = torch.empty(len(bank), dtype=torch.int64, device="cpu")
    block = rows_per_block(words)
    for start in range(0, len(bank), block):
        rows = bank.storage[start : start + block] + 0.0  # −0 becomes 0
        sums = (rows.view(torch.int16) * factors.to(rows.device)).sum(dim=1)
        hashes[bank.order[start : start + block].cpu()] = sums.cpu()
    return hashes
