"""Which labels of an archive are probably wrong: each image against all others, in one streamed pass.

    p_ic = Σ_{j of class c} exp(f_i·f_j/σ) / Σ_j exp(f_i·f_j/σ),  j ≠ i      class c's share of i's neighbours
    p_i  = p_ic of i's own label c                                           the leave-one-out score (eq. 4)
    r_ic = softmax_c(z_i/T)                                                  z_i: a ridge regression without image i
    the share of class c ∝ √(p_ic·r_ic)

The neighbours know where classes lie however they are shaped, the regression what a class has in common. No image has a
part in the verdict on its own label, so the shares are class probabilities that were predicted out of sample, as a
classifier's cross-validation gives them. Methods for such probabilities (confident learning) work on them.

    inputs               features become a MemoryBank
    neighbourhood        the sums behind p_ic, and the choice of σ
    ridge                r_ic
    judgement            both of some rows, combined
    nearest, duplicates  the nearest neighbours and the exact copies of images
    result               LabelAudit: scores, ranking, suspects, noise rate
    confident_learning   confusions between classes, from the shares
    calibration          how probably each label is wrong, by what people decided on some of them
    doubt                whether the features can carry a noise rate
    near_copies          images nearer to each other than to those around them, and their groups
    outliers             images that are like no other
    agreement            how often suggestions with a share are right
    class_structure      classes that the features would rather merge or split

Shapes: N images, D features, C classes, m classes kept of each image's neighbours.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED, check_choice, check_number
from ntdne_kernels.audit.agreement import agreement_at
from ntdne_kernels.audit.class_structure import AlikeClasses, Halves, cut_class, find_alike_classes
from ntdne_kernels.audit.confident_learning import Confusions
from ntdne_kernels.audit.doubt import Evidence, sample_neighbours
from ntdne_kernels.audit.duplicates import find_duplicates
from ntdne_kernels.audit.inputs import feature_bank, free_memory
from ntdne_kernels.audit.judgement import judge
from ntdne_kernels.audit.near_copies import NO_PAIRS, NearCopies, find_near_copies, group_copies
from ntdne_kernels.audit.nearest import nearest_neighbours
from ntdne_kernels.audit.neighbourhood import SIGMAS, choose_sigma
from ntdne_kernels.audit.outliers import Outliers, find_outliers
from ntdne_kernels.audit.result import METHODS, LabelAudit, otsu_threshold
from ntdne_kernels.audit.ridge import Ridge, fit_ridge
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.bank.guard import check_unit_rows
from ntdne_kernels.labels import as_labels, encode_labels
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.progress import with_progress
from ntdne_kernels.user_warning import warn_user

__all__ = [
    "METHODS",
    "SIGMAS",
    "AlikeClasses",
    "Confusions",
    "Evidence",
    "Halves",
    "LabelAudit",
    "NearCopies",
    "Outliers",
    "Ridge",
    "agreement_at",
    "audit_bank",
    "audit_labels",
    "choose_sigma",
    "cut_class",
    "feature_bank",
    "find_alike_classes",
    "find_near_copies",
    "find_outliers",
    "fit_ridge",
    "free_memory",
    "group_copies",
    "nearest_neighbours",
    "otsu_threshold",
]

QUERY_BATCH = {"cpu": 4096, "cuda": 32768}  # fills a GPU, and reads a bank on disk only N/4096 times
BATCH_SHARES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of all classes, held in float64 a few times: 134 MB, 2.1 GB


def audit_labels(  # noqa: PLR0913 (options, given by name)
    features: Any,
    labels: Any,
    *,
    sigma: float | str = "auto",
    ridge: bool = True,
    top: int = 10,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    progress: bool = False,
    checked: Tensor | None = None,
    given: Any = None,
    unsure: Tensor | None = None,
    near_copies: bool = False,
) -> LabelAudit:
    """Score the labels of a whole archive by all other images, with nothing to set.

    Exact, over all N·(N − 1) pairs. Needs memory for one copy of the features, for the result and, with the ridge
    regression, for D×D and C×D values.

    Example:
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> audit = audit_labels(features, ["ash", "ash", "ash", "oak", "oak", "oak", "oak"])
        >>> audit
        LabelAudit(7 images, 2 classes, 7 labels judged, sigma=0.068)
        >>> int(audit.ranking[0])  # the most suspect image
        3
        >>> audit.classes[audit.suggested[3]]
        'ash'

    Args:
        features: (N, D) of any length but 0: a float tensor, NumPy array, memory map or DataFrame. Read once, in order.
        labels: (N,) integers, −1 for unlabelled, or names, of which "", None and NaN mean unlabelled, as
            `encode_labels` takes them: a tensor, array, list or Series. Label i belongs to row i, whatever the index of
            a Series says.
        sigma: temperature σ > 0 of the neighbourhood (eq. 3). "auto": `choose_sigma` chooses it by the given labels.
        ridge: combine the neighbours' shares with those of `fit_ridge`, where there are two classes or more. False: the
            neighbours alone.
        top: m, how many classes are kept of each image, at most C. Confident learning looks at these.
        device: where to compute; None: where the features are.
        dtype: of the copy, and so of the arithmetic.
        scratch: folder for the copy of an archive that is larger than memory. Nothing stays there, unless the process
            is killed while it allocates the copy.
        backend: as in `functional.leave_one_out_log_scores`.
        progress: show it on standard error.
        checked: (N,) bool, labels that a person has checked: they are no suspects, and with enough of them, see
            `LabelAudit.uncalibrated`, they say how probably each of the others is wrong. −1 among them are images that
            a person has excluded.
        given: (N,) the labels as they were before that, in which wrong ones are looked for; None: as `labels`.
        unsure: (N,) bool, images of which people could not tell; they come last among those still to be checked.
        near_copies: group near copies too, and not exact ones alone, in `copy_group`: see `find_near_copies`. Where the
            sums rule out few images, as those of a large σ do, that takes another pass over all pairs.

    Raises:
        TypeError: features, labels or dtype are of another type.
        ValueError: an argument is out of range, or labels and features differ in number. Rows of features that are 0 or
            not finite are named.
        OSError: the features cannot be read, or the scratch folder has no room.
    """
    _check_arguments(sigma, top, backend)
    codes, classes = encode_labels(labels)
    if given is not None:
        codes, given, classes = _encode_both(codes, classes, given)
    bank = feature_bank(features, codes, device=device, dtype=dtype, scratch=scratch, progress=progress)
    return audit_bank(
        bank,
        sigma=sigma,
        ridge=ridge,
        top=top,
        backend=backend,
        progress=progress,
        classes=classes,
        checked=checked,
        given=given,
        unsure=unsure,
        near_copies=near_copies,
    )


@torch.no_grad()
def audit_bank(  # noqa: PLR0913 (options, given by name)
    bank: MemoryBank,
    *,
    sigma: float | str = "auto",
    ridge: bool = True,
    top: int = 10,
    backend: str | None = None,
    progress: bool = False,
    classes: Sequence[Any] | None = None,
    checked: Tensor | None = None,
    given: Tensor | None = None,
    unsure: Tensor | None = None,
    near_copies: bool = False,
) -> LabelAudit:
    """Score the labels of a memory bank by its rows as they are: fill it first, as `criterion.fill_bank` does.

    Example:
        >>> from ntdne_kernels import MemoryBank
        >>> bank = MemoryBank([0, 0, 0, 1, 1, 1, 1], dim=2)
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> audit = audit_bank(bank.update_(features, torch.arange(7), momentum=0.0), classes=["ash", "oak"])
        >>> [audit.classes[code] for code in audit.suggested]
        ['ash', 'ash', 'ash', 'ash', 'oak', 'oak', 'oak']

    Args:
        bank: of N images, kept by one process.
        sigma: as in `audit_labels`; that of training, where NTDNE made the features, will do as well.
        ridge: as in `audit_labels`.
        top: as in `audit_labels`.
        backend: as in `audit_labels`.
        progress: as in `audit_labels`.
        classes: names of bank.classes (C,), and of those of `given` that the bank has not, in ascending order; None:
            the integers themselves.
        checked: as in `audit_labels`, where the bank has the labels as they are now known.
        given: (N,) integers, as in `audit_labels`; None: the bank's labels.
        unsure: as in `audit_labels`.
        near_copies: as in `audit_labels`.

    Raises:
        TypeError: the bank is no MemoryBank, or another argument is of the wrong type.
        ValueError: an argument is out of range, the bank is sharded, there are not as many names as classes, or labels
            differ from the given ones where they were not checked.
        RuntimeError: something outside wrote rows into the bank that are not of unit length.
    """
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank: expected a MemoryBank, got {type(bank).__name__}; a criterion's is criterion.memory")
    _check_arguments(sigma, top, backend)
    if bank.process_group is not None:
        raise ValueError("bank: expected one that is not sharded; give its rows and labels to audit_labels")
    known = bank.labels.cpu()
    checked, unsure = (_mask(name, mask, len(bank)) for name, mask in (("checked", checked), ("unsure", unsure)))
    given = known if given is None else _check_given(given, known, checked)
    every = torch.unique(torch.cat([bank.classes.cpu(), given[given != UNLABELLED]]))
    classes = tuple(every.tolist() if classes is None else classes)
    if len(classes) != len(every):
        raise ValueError(f"classes: expected {len(every)} names, got {len(classes)}")
    if bank.fresh:
        warn_user("bank: its rows are still the random ones of its start; fill_bank brings an encoder's")
    check_unit_rows(bank.shard)  # a write through NumPy or .data leaves no trace that the bank's guard could see
    fit = fit_ridge(bank) if ridge and len(bank.classes) > 1 else None
    chosen = choose_sigma(bank) if isinstance(sigma, str) else float(sigma)
    N, C = len(bank), len(bank.classes)
    # The range of each given label. A class that only labels since corrected had has no neighbours, and no range.
    own = None if given is known else _ranges(given, bank.classes.cpu())
    log_score, log_ratio, log_density = torch.empty((3, N), dtype=torch.float32, device="cpu")
    top_classes = torch.empty((N, min(int(top), C)), dtype=torch.int64, device="cpu")
    # float32 would round the share 1 − 1e-9 of a tight class to 1, and its labels' quality to noise.
    top_shares = torch.empty(top_classes.shape, dtype=torch.float64, device="cpu")
    device = bank.device.type if bank.device.type in QUERY_BATCH else "cpu"
    batch = max(min(QUERY_BATCH[device], BATCH_SHARES[device] // max(C, 1)), 1)
    starts: Iterable[int] = range(0, N, batch)
    for start in with_progress(starts, "Comparing images") if progress else starts:
        rows = torch.arange(start, min(start + batch, N), device=bank.device)
        images = bank.order[rows].cpu()
        of_label = None if own is None else own[images].to(bank.device)
        found = judge(bank, rows, chosen, fit, backend, of_label)
        log_score[images], log_density[images] = found.log_score.float().cpu(), found.log_density.float().cpu()
        log_ratio[images] = found.log_ratio.float().cpu()
        largest = found.shares.topk(top_classes.size(1), dim=1)
        top_classes[images], top_shares[images] = largest.indices.cpu(), largest.values.double().cpu()
    labels, decided = (_codes(each, every) for each in (given, known))
    sample, neighbour_labels = sample_neighbours(bank, labels)
    duplicate_of = find_duplicates(bank)
    pairs = find_near_copies(bank, duplicate_of, log_density, chosen) if near_copies else NO_PAIRS
    return LabelAudit(
        classes=classes,
        labels=labels,
        decided=decided,
        checked=checked,
        unsure=unsure,
        sigma=chosen,
        ridge=fit is not None,
        log_score=log_score,
        log_ratio=log_ratio,
        top_classes=torch.searchsorted(every, bank.classes.cpu())[top_classes],
        top_shares=top_shares,
        log_density=log_density,
        duplicate_of=duplicate_of,
        copy_group=group_copies(duplicate_of, pairs),
        sample=sample,
        neighbour_labels=neighbour_labels,
    )


def _encode_both(codes: Tensor, classes: tuple[Any, ...], given: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Labels and given ones (N,) numbered alike, and the classes of both."""
    of_given, given_classes = encode_labels(given)
    if len(of_given) != len(codes):
        raise ValueError(f"given: expected as many as labels, {len(codes)}, got {len(of_given)}")
    position = {name: code for code, name in enumerate(given_classes)}
    numbers = [position.setdefault(name, len(position)) for name in classes]
    renumbered = torch.tensor([*numbers, UNLABELLED], device="cpu")
    return renumbered[codes], of_given, tuple(position)


def _check_given(given: Any, known: Tensor, checked: Tensor) -> Tensor:
    """The given labels (N,); ValueError where the known ones differ though nobody has checked them."""
    found = as_labels(given, "given").cpu().long()
    if len(found) != len(known):
        raise ValueError(f"given: expected one for each of the {len(known)} images, got {len(found)}")
    changed = ((found != known) & ~checked).nonzero().squeeze(1)
    if len(changed) > 0:
        raise ValueError(f"given: expected the labels of images that are not checked, got another of {int(changed[0])}")
    return found


def _mask(name: str, mask: Any, N: int) -> Tensor:
    """(N,) bool on the CPU; None: of no image."""
    if mask is None:
        return torch.zeros(N, dtype=torch.bool, device="cpu")
    found = torch.as_tensor(mask, device="cpu")
    if found.dtype != torch.bool or found.shape != (N,):
        raise ValueError(f"{name}: expected bools ({N},), got {found.dtype} {tuple(found.shape)}")
    return found


def _codes(labels: Tensor, classes: Tensor) -> Tensor:
    """(N,) positions of labels among the classes, −1 for unlabelled."""
    return torch.where(labels == UNLABELLED, UNLABELLED, torch.searchsorted(classes, labels))


def _ranges(labels: Tensor, classes: Tensor) -> Tensor:
    """(N,) the range of the class sums that each label has, 0 for labels that are none of the classes (C,)."""
    found = torch.isin(labels, classes)
    return torch.where(found, torch.searchsorted(classes, labels) + 1, 0)


def _check_arguments(sigma: float | str, top: int, backend: str | None) -> None:
    if isinstance(sigma, str):
        check_choice("sigma", sigma, ("auto",))
    else:
        check_number("sigma", sigma, 0, math.inf)
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top: expected a number of classes from 1, got {top!r}")
    if backend is not None:
        check_choice("backend", backend, tuple(BACKENDS))
