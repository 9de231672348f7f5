"""The losses and the bank update for people who keep their own bank: checks arguments and chooses a backend.

Features and bank rows are expected to be unit vectors within 1 %; nothing here normalises them but `update_bank_`. With
much longer rows the sums of exponentials overflow to NaN; on a CPU, features longer than 1.1 raise a ValueError.
What can be checked without asking a GPU for values always is: types, shapes, devices and numbers. Values inside the
tensors of a batch (an index outside the bank, a query's label below −1) are checked on a CPU, outside torch.compile.
Where they are not, an index outside the bank excludes nothing and a label below −1 is unlabelled. A tensor of bank
labels is never searched for values below −1, which are unlabelled too; building a `LabelIndex` searches it once.
Labels and indices are integers in tensors on the device of the features, or in lists, arrays, Series and the like,
which are taken there.

Shapes: B queries, N bank rows, D features.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import (
    BANK_DTYPES,
    NOT_IN_BANK,
    accumulator_dtype,
    can_look_inside,
    check_choice,
    check_classes,
    check_directions,
    check_matrix,
    check_number,
    check_range,
)
from ntdne_kernels.label_index import LabelIndex
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.chunked import CHUNKED
from ntdne_kernels.ops.layout import ClassLayout, PlainLabels
from ntdne_kernels.ops.losses import REDUCTIONS, LossSpec
from ntdne_kernels.ops.schema import Archive, Batch
from ntdne_kernels.user_warning import warn_user

_said: set[str] = set()


def ntdne_loss(  # noqa: PLR0913  options by name
    features: Tensor,
    bank: Tensor,
    labels: Any,
    bank_labels: Any,
    index: Any = None,
    *,
    sigma: float = 0.1,
    q: float = 0.7,
    k: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """NTDNE loss (eq. 9; eq. 13 with k): (1 − p^q)/q of the leave-one-out score p, constant where p ≤ k.

    A query without a neighbour of its class has p = 0: the largest loss, 1/q, and no gradient.

    Args:
        features: (B, D) unit rows of any float dtype.
        bank: (N, D) unit rows; its dtype decides the arithmetic (float64 or float32 sums). All else may be on a GPU and
            the bank in host memory, pinned for speed: it is read in chunks, and gets no gradient.
        labels: (B,) integer class of each query; −1 is unlabelled.
        bank_labels: (N,) integer class of each bank row, or their `LabelIndex`, which is faster.
        index: (B,) bank row of each query, which is left out of its neighbours; −1 or None: it is in no row.
        sigma: temperature σ > 0 of the neighbour probabilities (eq. 3).
        q: exponent in (0, 1]; q → 0 gives SNCA, 1 the mean absolute error.
        k: pruning threshold in (0, 1), or None to prune nothing.
        reduction: "mean" over the B queries, "sum" or "none".
        backend: "triton" (GPUs; CPU tensors with TRITON_INTERPRET=1), "streaming", "reference" (b×N PyTorch), or None
            for the fastest on the bank's device.

    Returns:
        The loss, float32 (float64 for a float64 bank): a scalar, or (B,) for "none". Differentiable in features, bank.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, label or number is not as described.
        IndexError: an index lies outside the bank.
    """
    check_number("q", q, 0, 1, upper_included=True)
    if k is not None:
        check_number("k", k, 0, 1)
    check_choice("reduction", reduction, REDUCTIONS)
    spec = LossSpec(q, k, reduction)
    return loss_and_log_scores(features, bank, labels, bank_labels, index, spec, sigma=sigma, backend=backend)[0]


def snca_loss(
    features: Tensor,
    bank: Tensor,
    labels: Any,
    bank_labels: Any,
    index: Any = None,
    *,
    sigma: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """SNCA loss (eq. 5): −log p of the leave-one-out score p. Arguments, result and errors as `ntdne_loss`.

    Queries without a neighbour of their class are ignored: 0 under "none", and "mean" divides by the others.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    spec = LossSpec(None, None, reduction)
    return loss_and_log_scores(features, bank, labels, bank_labels, index, spec, sigma=sigma, backend=backend)[0]


def leave_one_out_log_scores(
    features: Tensor,
    bank: Tensor,
    labels: Any,
    bank_labels: Any,
    index: Any = None,
    *,
    sigma: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """log p (B,), the share of each query's neighbours in the bank that carry its label (eq. 2-4).

    At most 0; −inf, with zero gradient, where no other bank row has the query's label. Arguments and errors as
    `ntdne_loss`. Can be differentiated once; with the reference backend any number of times.
    """
    return loss_and_log_scores(features, bank, labels, bank_labels, index, None, sigma=sigma, backend=backend)[1]


def loss_and_log_scores(
    features: Tensor,
    bank: Tensor,
    labels: Any,
    bank_labels: Any,
    index: Any,
    spec: LossSpec | None,
    *,
    sigma: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """A loss (log p for None) and log p (B,), which beside a loss has no gradient: what the functions above share."""
    check_number("sigma", sigma, 0, math.inf)
    N = _check_bank(bank)
    B = _check_features(features, bank, bank_may_be_on_host=True)
    layout: ClassLayout
    if isinstance(bank_labels, LabelIndex):
        if bank_labels.size != N:
            raise ValueError(f"bank_labels: expected an index of the bank's {N} rows, got one of {bank_labels.size}")
        layout, labels_device = bank_labels.layout, bank_labels.offsets.device
    else:
        row_labels = as_labels(bank_labels, "bank_labels", features.device).to(torch.int64)
        if len(row_labels) != N:
            raise ValueError(f"bank_labels: expected one label for each of the bank's {N} rows, got {len(row_labels)}")
        layout, labels_device = PlainLabels(row_labels), row_labels.device
    if can_look_inside(features):
        _check_unit("features", features.detach())
    labels = _check_per_query("labels", as_labels(labels, device=features.device).to(torch.int64), B, features)
    _check_device("bank_labels", labels_device, features)
    if index is None:
        index = labels.new_full((B,), NOT_IN_BANK)
    else:
        index = _check_per_query("index", as_index(index, device=features.device), B, features)
        check_range("index", index, N)
    check_classes(labels)
    return loss_of_batch(Batch(features, bank, labels, index, layout, float(sigma)), None, spec, backend)


def loss_of_batch(
    batch: Batch, archive: Archive | None, spec: LossSpec | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """As `loss_and_log_scores`, of checked arguments, or of the images of an archive: see `ops.look_up`."""
    name = choose_backend(backend, batch.bank, batch.features.device)
    backends = BACKENDS if batch.bank.device == batch.features.device else CHUNKED
    return backends[name].loss(batch, archive, spec)


def update_bank_(
    bank: Tensor, features: Tensor, index: Any, momentum: float = 0.5, *, validate: bool = False
) -> Tensor:
    """Row index[i] of the bank becomes normalise(momentum·row + (1 − momentum)·features[i]/|features[i]|) (eq. 15).

    In place and outside autograd; features are normalised here. Where an index stands twice, its updates follow one
    another in batch order, on every device. A row whose blend nearly vanishes (norm < 1e-12) or is not finite becomes
    the new feature. Features and index may lie in the bank's memory: they are read as they were before the call.
    A bfloat16 bank stalls at a momentum near 1: at 0.999 the step is below its rounding.

    On a CPU, bad values raise and nothing is written. On a GPU the kernel leaves such a feature out and counts it
    (`MemoryBank.skipped_rows`); `validate=True` looks first, which synchronises, raises, and writes nothing.

    Args:
        bank: (N, D) contiguous, float64, float32, float16 or bfloat16.
        features: (B, D) any float dtype.
        index: (B,) bank row of each feature; a feature with −1 is not in the bank and left out.
        momentum: m in [0, 1], the weight of the old row: 1 − λ of the paper.
        validate: also check values on a GPU.

    Returns:
        The bank.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or number is not as described, the bank is not contiguous, or a feature is zero or
            not finite (the message names its row).
        IndexError: an index lies outside the bank.
    """
    N = _check_bank(bank)
    if not bank.is_contiguous():
        raise ValueError(
            f"bank: expected a contiguous tensor, got strides {bank.stride()} for shape {tuple(bank.shape)}"
        )
    features = features.detach() if isinstance(features, Tensor) else features
    index = check_update(bank, features, index, momentum, N, look=validate)
    write_rows(bank, features, index, momentum)
    return bank


def write_rows(bank: Tensor, features: Tensor, index: Tensor, momentum: float, position: Tensor | None = None) -> None:
    """As `update_bank_`, of what `check_update` has passed; with a `position` (n,) index i means row position[i]."""
    with torch.no_grad():
        try:
            torch.ops.ntdne_kernels.update_bank_(bank, features, index, float(momentum), position)
        except RuntimeError:
            # The CPU kernel found a bad value, before it wrote anything: say which.
            if can_look_inside(index):
                check_range("index", index, len(bank if position is None else position))
                check_directions("features", features, index, accumulator_dtype(bank.dtype), look=True)
            raise


def check_update(bank: Tensor, features: Tensor, index: Any, momentum: float, N: int, *, look: bool) -> Tensor:
    """The index as int64 (B,), of features (B, D) for a bank of N rows; the errors of `update_bank_`.

    Looks at values if told to.
    """
    check_number("momentum", momentum, 0, 1, lower_included=True, upper_included=True)
    B = _check_features(features, bank)
    rows = _check_per_query("index", as_index(index, device=bank.device), B, bank)
    if look:
        check_range("index", rows, N, look=True)
        check_directions("features", features, rows, accumulator_dtype(bank.dtype), look=True)
    return rows


def choose_backend(name: str | None, bank: Tensor, device: torch.device) -> str:
    """The backend's name, on the device of the features; for None the fastest: Triton where it serves, else streaming.

    Where there is a GPU that Triton does not serve, that is said once per reason.
    """
    if bank.device != device:
        bank = bank.new_empty((0, bank.size(1)), device=device)
    if name is not None:
        check_choice("backend", name, tuple(BACKENDS))
        missing = BACKENDS[name].missing(bank)
        if missing is not None:
            raise ValueError(f"backend: {name!r} needs {missing}")
        return name
    if bank.device.type != "cuda":
        return "streaming"
    missing = BACKENDS["triton"].missing(bank) if "triton" in BACKENDS else "the triton package"
    if missing is None:
        return "triton"
    if missing not in _said and not torch.compiler.is_compiling():
        _said.add(missing)
        warn_user(f"the loss streams through PyTorch: the Triton kernels need {missing}")
    return "streaming"


def _check_bank(bank: Tensor) -> int:
    check_matrix("bank", bank, "(N, D)")
    if bank.dtype not in BANK_DTYPES:
        raise TypeError(f"bank: expected float64, float32, float16 or bfloat16, got {bank.dtype}")
    if bank.numel() == 0:
        raise ValueError(f"bank: expected at least one row and one column, got shape {tuple(bank.shape)}")
    return len(bank)


def _check_features(features: Tensor, bank: Tensor, *, bank_may_be_on_host: bool = False) -> int:
    check_matrix("features", features, "(B, D)")
    if features.dtype not in BANK_DTYPES:
        raise TypeError(f"features: expected float64, float32, float16 or bfloat16, got {features.dtype}")
    if features.size(1) != bank.size(1):
        raise ValueError(f"features: expected {bank.size(1)} columns as in the bank, got shape {tuple(features.shape)}")
    on_host = bank.device.type == "cpu" and features.device.type == "cuda"
    if not (bank_may_be_on_host and on_host and not bank.requires_grad):
        _check_device("features", features.device, bank)
    return len(features)


def _check_per_query(name: str, values: Tensor, B: int, like: Tensor) -> Tensor:
    if len(values) != B:
        raise ValueError(f"{name}: expected one value for each of the {B} features, got {len(values)}")
    _check_device(name, values.device, like)
    return values


def _check_device(name: str, device: torch.device, like: Tensor) -> None:
    if device != like.device:
        raise ValueError(f"{name}: expected the bank's device, {like.device}, got {device}")


def _check_unit(name: str, rows: Tensor) -> None:
    norm = torch.linalg.vector_norm(rows.float(), dim=1)
    wrong = norm > 1.1
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected unit rows (torch.nn.functional.normalize), got norm {norm[row]} in row {row}"
        )
