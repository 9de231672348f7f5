"""log p as the formula reads, through PyTorch autograd and b×N matrices: the definition that tests the other backends.

Shapes: B queries, N bank rows, D features.
"""

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops import losses
from ntdne_kernels.ops.layout import Neighbours, neighbours_of
from ntdne_kernels.ops.look_up import look_up
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Archive, Batch


def log_scores(batch: Batch) -> Tensor:
    """log p (B,): the log of Σ_{j of i's class} p_ij, where p_ij is the softmax of f_i·f_j/σ over j ≠ r_i (eq. 2-4)."""
    with torch.autocast(batch.bank.device.type, enabled=False):
        bank, same, neighbour = _neighbourhoods(batch)
        logits = _logits(batch.features, bank, batch.sigma)
        # A query without positives (or without neighbours) gets its −inf at the end: inside, −inf has no gradient.
        has_positive = same.any(dim=1)
        log_share = torch.log_softmax(logits.masked_fill(~neighbour & has_positive.unsqueeze(1), -torch.inf), dim=1)
        log_p = torch.logsumexp(log_share.masked_fill(~same & has_positive.unsqueeze(1), -torch.inf), dim=1)
        return torch.where(has_positive, log_p.clamp(max=0), -torch.inf)


def class_sums(batch: Batch, need_means: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.class_sums`: over the rows of each query's class, and over the others."""
    with torch.autocast(batch.bank.device.type, enabled=False):
        bank, same, neighbour = _neighbourhoods(batch)
        logits, rows = _logits(batch.features, bank, batch.sigma), _values_of(bank, bank.dtype)
        log_sums, means = [], []
        for rows_that_count in (same, ~same & neighbour):
            log_sum = torch.logsumexp(logits.double().masked_fill(~rows_that_count, -torch.inf), dim=1)
            weights = torch.exp(logits - log_sum.unsqueeze(1)).masked_fill(~rows_that_count, 0)
            log_sums.append(log_sum)
            means.append(weights.to(rows.dtype) @ rows if need_means else rows[:0])
        return log_sums[0], log_sums[1], means[0], means[1]


def class_log_sums(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """`Backend.class_log_sums`: over the rows of each class (B, K)."""
    with torch.autocast(bank.device.type, enabled=False):
        logits = _logits(features, bank, sigma).double()
        logits.masked_fill_(torch.arange(len(bank), device=bank.device) == index.unsqueeze(1), -torch.inf)
        return torch.stack([torch.logsumexp(rows, dim=1) for rows in logits.split(offsets.diff().tolist(), dim=1)], 1)


def loss(batch: Batch, archive: Archive | None, spec: LossSpec | None) -> tuple[Tensor, Tensor]:
    """`Backend.loss`, by autograd alone: it can be differentiated any number of times."""
    queries = look_up(batch, archive, spec)
    log_p = log_scores(queries.batch)
    if queries.counted is not None:
        log_p = torch.where(queries.counted, log_p, torch.nan)
    if spec is None:
        return log_p, log_p
    return losses.value(log_p, queries.indicator, spec, queries.counted, queries.log_chance), log_p.detach()


def missing(bank: Tensor) -> None:
    """`Backend.missing`: nothing."""


def _neighbourhoods(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The bank's rows as they are visited, and the two `_masks`."""
    assert batch.labels is not None
    neighbours = neighbours_of(batch.labels, batch.own, batch.layout)
    bank = batch.bank if neighbours.order is None else batch.bank[neighbours.order]
    return bank, *_masks(neighbours, len(bank))


def _masks(neighbours: Neighbours, N: int) -> tuple[Tensor, Tensor]:
    """(B, N) which rows are of the query's class, itself left out, and which are any row but the query itself."""
    j = torch.arange(N, device=neighbours.excluded.device)
    if neighbours.row_labels is not None:
        same = neighbours.same.unsqueeze(1) == neighbours.row_labels
    else:
        same = (neighbours.same[:, :1] <= j) & (j < neighbours.same[:, 1:])
    neighbour = j != neighbours.excluded.unsqueeze(1)
    return same & neighbour, neighbour


def _logits(features: Tensor, bank: Tensor, sigma: float) -> Tensor:
    return _values_of(features, bank.dtype) @ _values_of(bank, bank.dtype).t() / sigma


def _values_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`, held in the dtype sums are made in; the gradient passes the rounding unrounded."""
    wide = x.to(accumulator_dtype(dtype))
    if x.dtype == dtype or wide.dtype == dtype:
        return wide
    return wide + (wide.detach().to(dtype).to(wide.dtype) - wide.detach())
