"""What an image's neighbours, and the ridge regression beside them, say of its label.

    combined share of class c ∝ √(p_ic · r_ic)     p: of the neighbours, r: of the ridge

Shapes: B images, C classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.audit.neighbourhood import class_log_sums, own_range
from ntdne_kernels.audit.ridge import Ridge
from ntdne_kernels.bank import MemoryBank


class Judgement(NamedTuple):
    """Of B rows of a bank; on its device, float64. The fields of `LabelAudit` that have these names say more."""

    log_score: Tensor
    """(B,)"""
    log_density: Tensor
    """(B,)"""
    log_ratio: Tensor
    """(B,)"""
    shares: Tensor
    """(B, C) of the classes: of the neighbours alone, or combined with the ridge's."""


def judge(
    bank: MemoryBank, rows: Tensor, sigma: float, fit: Ridge | None, backend: str | None, own: Tensor | None = None
) -> Judgement:
    """The judgement of rows (B,) of `bank.storage`, by their neighbours and by a fit, where there is one.

    Args:
        bank: of N images.
        rows: (B,)
        sigma: temperature of the neighbourhood.
        fit: of the bank's labels.
        backend: as in `functional.leave_one_out_log_scores`.
        own: (B,) the range of the label that is judged, 0 for none; None: of the label in the bank.
    """
    log_sums = class_log_sums(bank, rows, sigma, backend)
    own = (own_range(bank, rows) if own is None else own).unsqueeze(1)
    log_all = log_sums.logsumexp(dim=1)
    log_own = torch.where(own == 0, torch.nan, log_sums.gather(1, own)).squeeze(1)
    # −inf − (−inf) is NaN where the only row has no neighbour at all.
    log_score = torch.where(log_own == -torch.inf, log_own, log_own - log_all).clamp(max=0)
    log_shares = log_sums[:, 1:]
    if fit is None:
        log_shares = log_shares - log_all.unsqueeze(1)
    else:
        log_shares = torch.log_softmax((log_shares + fit.log_shares(bank, rows)) / 2, dim=1)
    # A last column, of no class and without a share, is the other one where there is a single class.
    padded = torch.nn.functional.pad(log_shares, (0, 1), value=-torch.inf)
    column = torch.where(own == 0, log_shares.size(1), own - 1)
    of_label = padded.gather(1, column).squeeze(1)
    of_others = padded.scatter(1, column, -torch.inf).amax(dim=1)
    return Judgement(
        log_score=log_score,
        log_density=log_all - math.log(max(len(bank) - 1, 1)),
        log_ratio=torch.where(log_score > -torch.inf, of_label - of_others, torch.nan),
        shares=log_shares.exp().nan_to_num(nan=0.0),
    )
