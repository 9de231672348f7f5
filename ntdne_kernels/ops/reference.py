"""log p as the formula reads, through PyTorch autograd and b×N matrices: the definition that tests the other backends.

Shapes: B queries, N bank rows, D features.
"""

import torch
from torch import Tensor

from ntdne_kernels.ops.bank_update import accumulator_dtype
from ntdne_kernels.ops.leave_one_out import neighbours_of


def log_scores(
    features: Tensor, bank: Tensor, labels: Tensor, index: Tensor, classes: list[Tensor], sigma: float
) -> Tensor:
    """log p (B,): the log of Σ_{j of i's class} p_ij, where p_ij is the softmax of f_i·f_j/σ over j ≠ r_i (eq. 2-4)."""
    neighbours = neighbours_of(labels, index, classes)
    with torch.autocast(bank.device.type, enabled=False):
        if neighbours.order is not None:
            bank = bank[neighbours.order]
        j = torch.arange(len(bank), device=bank.device)
        if neighbours.bank_labels is not None:
            same = neighbours.same.unsqueeze(1) == neighbours.bank_labels
        else:
            same = (neighbours.same[:, :1] <= j) & (j < neighbours.same[:, 1:])
        neighbour = j != neighbours.excluded.unsqueeze(1)
        same &= neighbour

        logits = _values_of(features, bank.dtype) @ _values_of(bank, bank.dtype).t() / sigma
        # A query without positives (or without neighbours) gets its −inf at the end: inside, −inf has no gradient.
        has_positive = same.any(dim=1)
        log_share = torch.log_softmax(logits.masked_fill(~neighbour & has_positive.unsqueeze(1), -torch.inf), dim=1)
        log_p = torch.logsumexp(log_share.masked_fill(~same & has_positive.unsqueeze(1), -torch.inf), dim=1)
        return torch.where(has_positive, log_p.clamp(max=0), -torch.inf)


def _values_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`, held in the dtype sums are made in; the gradient passes the rounding unrounded."""
    wide = x.to(accumulator_dtype(dtype))
    if x.dtype == dtype or wide.dtype == dtype:
        return wide
    return wide + (wide.detach().to(dtype).to(wide.dtype) - wide.detach())
