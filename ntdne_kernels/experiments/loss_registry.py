"""The registry of the losses of the paper's tables: by name, with their options, `make_loss` makes one."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.experiments.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    Criterion,
    DCNNLoss,
    MAELoss,
    NSLLoss,
    NTDNEBroadcastLoss,
    SCELoss,
    TripletLoss,
    TRNSLLoss,
)

LOSSES: dict[str, type[Criterion]] = {
    "D-CNN": DCNNLoss,
    "Triplet": TripletLoss,
    "NSL": NSLLoss,
    "SNCA": SNCALoss,
    "ArcFace": ArcFaceLoss,
    "MAE": MAELoss,
    "SCE": SCELoss,
    "t-RNSL": TRNSLLoss,
    "NTDNE": NTDNELoss,
    "Contrastive": ContrastiveLoss,
    "NTDNE-broadcast": NTDNEBroadcastLoss,
}

# Arguments of NTDNELoss and SNCALoss that say how to compute the loss, not which.
NOT_OPTIONS = {
    *("reduction", "fused", "validate", "generator"),
    *("device", "dtype", "process_group", "storage", "path"),
}


def loss_name(name: str) -> str:
    """The loss's name as in `LOSSES`, from a name in any case; ValueError where there is none.

    Example:
        >>> loss_name("ntdne")
        'NTDNE'
    """
    names = {known.lower(): known for known in LOSSES}
    found = names.get(str(name).lower())
    if found is None:
        raise ValueError(f"loss: no loss {name!r}{_closest(str(name), LOSSES)}; the losses are {', '.join(LOSSES)}")
    return found


def loss_options(name: str) -> dict[str, Any]:
    """Options of a loss and their defaults; ValueError where there is no such loss.

    Example:
        >>> loss_options("SCE")
        {'alpha': 0.1, 'beta': 1.0, 'log_zero': -4.0}
    """
    parameters = inspect.signature(LOSSES[loss_name(name)]).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in NOT_OPTIONS
    }


def make_loss(
    name: str, labels: Tensor, dim: int, *, bank: Mapping[str, Any] | None = None, **options: Any
) -> Criterion:
    """The loss of that name for an archive, a module with `forward`, `update_bank` and `set_epoch`.

    Args:
        name: one of `LOSSES`, in any case.
        labels: (N,) given class of each training image, from 0 to C − 1.
        dim: D, features per image.
        bank: dtype, storage and path of the bank, for losses that have one: see `MemoryBank`.
        options: as the loss's class describes them; `loss_options(name)` are the defaults.

    Raises:
        ValueError: no such loss; no such option of it; labels, dim or an option of wrong type or outside its range.

    Example:
        >>> import torch
        >>> criterion = make_loss("NSL", torch.tensor([0, 1, 1]), dim=4, sigma=0.1)
        >>> criterion(torch.ones(2, 4), index=torch.tensor([0, 2])).shape
        torch.Size([])
    """
    name = loss_name(name)
    known = loss_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        listed = ", ".join(f"{option} = {default!r}" for option, default in known.items()) or "none"
        raise ValueError(f"{name}: no option {unknown[0]!r}{_closest(unknown[0], known)}; its options are {listed}")
    if LOSSES[name] in (NTDNELoss, SNCALoss):
        options |= bank or {}
    try:
        return LOSSES[name](labels, dim, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _closest(word: str, known: Iterable[str]) -> str:
    """A question after the closest known name, "" where none is close."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), names, n=1)
    return f" (did you mean {names[matches[0]]!r}?)" if matches else ""
