"""log p as the formula reads, through PyTorch autograd and b×N matrices: the definition that tests the other backends.

Shapes: B queries, N bank rows, D features.
"""

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops.leave_one_out import Neighbours, neighbours_of


def log_scores(
    features: Tensor, bank: Tensor, labels: Tensor, index: Tensor, classes: list[Tensor], sigma: float
) -> Tensor:
    """log p (B,): the log of Σ_{j of i's class} p_ij, where p_ij is the softmax of f_i·f_j/σ over j ≠ r_i (eq. 2-4)."""
    with torch.autocast(bank.device.type, enabled=False):
        neighbours = neighbours_of(labels, index, classes)
        if neighbours.order is not None:
            bank = bank[neighbours.order]
        same, neighbour = _masks(neighbours, len(bank))
        logits = _logits(features, bank, sigma)
        # A query without positives (or without neighbours) gets its −inf at the end: inside, −inf has no gradient.
        has_positive = same.any(dim=1)
        log_share = torch.log_softmax(logits.masked_fill(~neighbour & has_positive.unsqueeze(1), -torch.inf), dim=1)
        log_p = torch.logsumexp(log_share.masked_fill(~same & has_positive.unsqueeze(1), -torch.inf), dim=1)
        return torch.where(has_positive, log_p.clamp(max=0), -torch.inf)


def class_sums(
    features: Tensor, bank: Tensor, labels: Tensor, index: Tensor, classes: list[Tensor], sigma: float, need_means: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.class_sums`: over the rows of each query's class, and over the others."""
    with torch.autocast(bank.device.type, enabled=False):
        neighbours = neighbours_of(labels, index, classes)
        if neighbours.order is not None:
            bank = bank[neighbours.order]
        same, neighbour = _masks(neighbours, len(bank))
        logits, rows = _logits(features, bank, sigma), _values_of(bank, bank.dtype)
        log_sums, means = [], []
        for rows_that_count in (same, ~same & neighbour):
            log_sum = torch.logsumexp(logits.double().masked_fill(~rows_that_count, -torch.inf), dim=1)
            weights = torch.exp(logits - log_sum.unsqueeze(1)).masked_fill(~rows_that_count, 0)
            log_sums.append(log_sum)
            means.append(weights.to(rows.dtype) @ rows if need_means else rows[:0])
        return log_sums[0], log_sums[1], means[0], means[1]


def class_masses(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """`Backend.class_masses`: over the rows of each class (B, K)."""
    with torch.autocast(bank.device.type, enabled=False):
        logits = _logits(features, bank, sigma).double()
        logits.masked_fill_(torch.arange(len(bank), device=bank.device) == index.unsqueeze(1), -torch.inf)
        return torch.stack([torch.logsumexp(rows, dim=1) for rows in logits.split(offsets.diff().tolist(), dim=1)], 1)


def _masks(neighbours: Neighbours, N: int) -> tuple[Tensor, Tensor]:
    """(B, N) which rows are of the query's class, itself left out, and which are any row but the query itself."""
    j = torch.arange(N, device=neighbours.excluded.device)
    if neighbours.bank_labels is not None:
        same = neighbours.same.unsqueeze(1) == neighbours.bank_labels
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
