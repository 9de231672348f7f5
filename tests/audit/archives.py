"""Made archives, the formula of the audit's shares, and what the audit's tests share.

Shapes: N images, C classes.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels import audit
from ntdne_kernels.audit import LabelAudit, inputs, neighbourhood


def blobs(N: int = 120, C: int = 4, *, wrong: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, 8) around C directions, labels (N,) of which a share is wrong, and the true ones (N,)."""
    made = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % C
    centres = nn.functional.normalize(torch.randn(C, 8, generator=made, dtype=torch.float64), dim=1)
    features = centres[true] + 0.15 * torch.randn(N, 8, generator=made, dtype=torch.float64)
    shift = torch.randint(1, max(C, 2), (N,), generator=made)
    flipped = torch.rand(N, generator=made) < wrong
    return features, torch.where(flipped, (true + shift) % C, true), true


def shares(features: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """(N, C) as the formula reads, C the classes that occur."""
    rows = nn.functional.normalize(features.double(), dim=1)
    logits = (rows @ rows.t() / sigma).fill_diagonal_(-torch.inf)
    p = torch.softmax(logits, dim=1)
    return torch.stack([p[:, labels == c].sum(dim=1) for c in labels.unique().tolist() if c >= 0], dim=1)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of queries, blocks of classes, chunks of the bank and reads also in a small archive."""
    chunks_of = neighbourhood.chunks_of
    monkeypatch.setattr(
        neighbourhood, "chunks_of", lambda bank, device, length: chunks_of(bank, device, min(length, 13))
    )
    monkeypatch.setattr(neighbourhood, "CLASS_BLOCK", 3)
    monkeypatch.setattr(audit, "QUERY_BATCH", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(inputs, "BLOCK_VALUES", 400)


def same(one: LabelAudit, other: LabelAudit) -> bool:
    """Whether two audits are equal to the bit."""
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(LabelAudit))
    )
