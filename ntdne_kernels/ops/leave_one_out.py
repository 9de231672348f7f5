"""log p_i, the leave-one-out score (eq. 4), and any loss of it, as one differentiable operation.

    log p_i        = log(Σ_same_i / Σ_all_i)               sums of exp(f_i·f_j/σ) over bank rows j ≠ r_i
    ∂log p_i/∂f_i  = (μ_same_i − μ_all_i)/σ                softmax-weighted means of bank rows      (eq. 6)
    ∂log p_i/∂f_j  = ([same]·p̃_ij − p_ij)/σ · f_i          p̃_ij = p_ij/p_i                          (eq. 7)

The gradient of the queries is made in the forward pass: backward multiplies it by a number, and nothing of the bank has
to be kept. The gradient of the bank, wanted by few, is a second pass over it.

Shapes: B queries, N bank rows, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, SHORTEST, UNLABELLED, accumulator_dtype
from ntdne_kernels.ops import losses
from ntdne_kernels.ops.bank_update import skipped_counter

# Equals no label, also none that a user's bank_labels could hold by mistake.
_MATCHES_NOTHING = torch.iinfo(torch.int64).min


class Neighbours(NamedTuple):
    """Which bank rows count for which query.

    Bank rows are visited in `order` (N,), or as they stand where it is None; j counts in that order.
    """

    same: Tensor
    """With `bank_labels`: (B,) labels, j is of the query's class where they are equal. Without: (B, 2) ranges of j."""
    bank_labels: Tensor | None
    """(N,), or None where a class is one range of j."""
    order: Tensor | None
    excluded: Tensor
    """(B,): the query itself, which is not its own neighbour; −1 where it is not in the bank."""


def neighbours_of(labels: Tensor, index: Tensor, classes: list[Tensor]) -> Neighbours:
    """Neighbours of queries with `labels` (B,) in the bank rows `index` (B,), −1 for none.

    `classes` says which bank rows belong to which class: [labels of the rows (N,)], or the tensors of a `LabelIndex`,
    [classes (C,), offsets (C + 1,)] for rows in class order, with [..., order (N,), position (N,)] for others.
    """
    if len(classes) == 1:
        return Neighbours(torch.where(labels >= 0, labels, _MATCHES_NOTHING), classes[0], None, index)
    ranges = class_ranges(labels, classes[0], classes[1])
    if len(classes) == 2:
        return Neighbours(ranges, None, None, index)
    order, position = classes[2:]
    inside = (index >= 0) & (index < len(position))
    place = torch.where(inside, position[index.clamp(0, len(position) - 1)], NOT_IN_BANK)
    return Neighbours(ranges, None, order, place)


def class_ranges(labels: Tensor, classes: Tensor, offsets: Tensor) -> Tensor:
    """(B, 2) begin and end, in class order, of the rows with each of the (B,) labels; (0, 0) where none has."""
    if len(classes) == 0:
        return labels.new_zeros((len(labels), 2))
    c = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    ranges = torch.stack([offsets[c], offsets[c + 1]], dim=1)
    return torch.where((classes[c] == labels).unsqueeze(1), ranges, 0)


class Queries(NamedTuple):
    """What a backend needs to know of a batch, (B, ...)."""

    features: Tensor
    """Unit rows; 0 for features without a direction."""
    labels: Tensor
    """−1 is unlabelled."""
    places: Tensor
    """Bank rows of the queries; −1 for none."""
    norms: Tensor
    """Lengths of the features before they were normalised, 0 for those without a direction; (0,) for unit rows."""
    indicator: Tensor | None
    """Log scores that decide on pruning in place of the current ones where they are not NaN."""

    @property
    def counted(self) -> Tensor | None:
        """Which features have a direction; None: all."""
        return None if len(self.norms) == 0 and len(self.features) > 0 else self.norms != 0


def look_up(
    features: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    dtype: torch.dtype,
    indicator: str,
) -> Queries:
    """The batch as backends take it.

    `archive` is empty for unit features with labels, whose index is a bank row; or it is what a `MemoryBank` keeps of
    N images: [labels (N,), position (N,), scores (N + 1,)]. Then `index` is an image, −1 for features of none, to which
    `labels` belong (None: they are unlabelled), and features are of any length; their dtype becomes `dtype`.
    """
    if not archive:
        assert labels is not None
        return Queries(features, labels, index, features.new_empty(0), None)
    image_labels, position, scores = archive
    N = len(position)
    known = (index >= 0) & (index < N)
    image = index.clamp(0, N - 1)
    labels = torch.where(known, image_labels[image], UNLABELLED if labels is None else labels)
    units, norms = normalise(features, dtype)
    if features.device.type == "cuda" and not torch.compiler.is_compiling():  # on a CPU they raised before
        skipped_counter(features.device).add_((norms == 0).sum())
    stored = indicator_of(indicator, scores[image], labels, index, classes, N)
    return Queries(units, labels, torch.where(known, position[image], NOT_IN_BANK), norms, stored)


def normalise(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows (B, D) and lengths (B,) of the features, in `dtype`; both 0 where there is no direction.

    A direction has what `torch.nn.functional.normalize` can divide: a finite length of at least SHORTEST.
    """
    features = features.to(dtype)
    lengths = torch.linalg.vector_norm(features.detach(), dim=1, keepdim=True)
    directed = (lengths >= SHORTEST) & (lengths < torch.inf)
    features = torch.where(directed, features, 0)  # before the norm, whose gradient at NaN is NaN times 0
    norms = torch.linalg.vector_norm(features, dim=1)
    return features / torch.where(directed, norms.unsqueeze(1), 1), norms


def indicator_of(
    indicator: str, stored: Tensor, labels: Tensor, index: Tensor, classes: list[Tensor], N: int
) -> Tensor | None:
    """The log scores (B,) that decide on pruning in place of the current ones, NaN for images of none; or None.

    They are the scores `stored` (B,) of images, of which those never scored are kept. With "auto" an image is pruned
    whose score is at most chance: the share of the other N − 1 images that carry its label.
    """
    if indicator == "current":
        return None
    if indicator == "auto":
        stored = torch.where(stored <= log_chance(labels, classes, N), -torch.inf, torch.inf)
    return torch.where(index >= 0, stored.nan_to_num(nan=torch.inf, neginf=-torch.inf), torch.nan)


def log_chance(labels: Tensor, classes: list[Tensor], N: int) -> Tensor:
    """(B,) float64: log of the share of N − 1 other images that carry each of the labels (B,) of images."""
    begin, end = class_ranges(labels, classes[0], classes[1]).unbind(1)
    return torch.log((end - begin - 1).double() / max(N - 1, 1))  # half precision ends at 65,504 images


def loss_of(
    log_scores: Callable[..., tuple[Tensor, Tensor, Tensor]],
    features: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    index: Tensor,
    classes: list[Tensor],
    archive: list[Tensor],
    sigma: float,
    loss: losses.Loss,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Backend.loss` of a backend that has no better way than one after the other."""
    queries = look_up(features, labels, index, classes, archive, accumulator_dtype(bank.dtype), loss.indicator)
    log_p, direction, log_sum_all = log_scores(
        queries.features, bank, queries.labels, queries.places, classes, sigma, need_gradient
    )
    if queries.counted is not None:
        log_p = torch.where(queries.counted, log_p, torch.nan)
    value, slope = losses.loss_and_slope(log_p, queries.indicator, loss, queries.counted)
    gradient = rows_times(slope, direction, log_p) if need_gradient else direction
    if need_gradient and archive:  # of f = x/|x| the gradient of x is (g − (g·f)f)/|x|
        along = (gradient * queries.features).sum(dim=1, keepdim=True)
        norms = torch.where(queries.norms != 0, queries.norms, 1).unsqueeze(1)
        gradient = (gradient - along * queries.features) / norms
    return value, log_p, slope, gradient, log_sum_all


def rows_times(factor: Tensor, direction: Tensor, log_p: Tensor) -> Tensor:
    """factor (B,) · direction (B, D); exactly 0, whatever comes in, where a query has no positives or no direction."""
    return torch.where((log_p > -torch.inf).unsqueeze(1), factor.unsqueeze(1) * direction, 0)


ClassSumsFunction = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """What a device does best in its own way; labels, index and classes as in `neighbours_of`."""

    log_scores: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(features, bank, labels, index, classes, sigma, need_direction) →

    log p (B,), ∂log p/∂f (B, D) or (0, D), log Σ_all (B,).
    """
    class_sums: ClassSumsFunction
    """(features, bank, labels, index, classes, sigma, need_means) → what `ClassSums` holds, over a part of a bank."""
    class_masses: Callable[..., Tensor]
    """(features (B, D), bank (n, D) of the same dtype, index (B,), offsets (K + 1,), sigma) →

    (B, K) float64: log Σ of exp(f_i·f_j/σ) over the rows j ≠ index_i of each of K ranges, from offsets[c] to
    offsets[c + 1]; −inf for no row. offsets[0] is 0, offsets[K] is n; index is −1 for a query in no row.
    """
    bank_gradient: Callable[..., Tensor]
    """(features, bank, labels, index, classes, sigma, log_p, log_sum_all, grad_log_p) → gradient of the bank (N, D)."""
    fused_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] | None = None
    """`loss` in fewer steps than `loss_of`, where the device has a way."""

    def loss(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(features, bank, labels or None, index, classes, archive, sigma, loss, need_gradient), as `look_up` says →

        the loss, log p (B,), dL/dlog p (B,), dL/df (B, D) or (0, D), log Σ_all (B,). Features without a direction have
        log p = NaN and are left out of the loss. Under "none" row i of the gradient is that of loss i.
        """
        return loss_of(self.log_scores, *arguments) if self.fused_loss is None else self.fused_loss(*arguments)


class _NotAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("the loss can be differentiated once; a second derivative needs backend='reference'")


def not_again(gradient: Tensor, *sources: Tensor) -> Tensor:
    """The gradient, which raises where its dependence on the `sources` is differentiated.

    `once_differentiable` raises only where the incoming gradient is differentiated: through an encoder a second
    derivative would come out wrong.
    """
    if not torch.is_grad_enabled():
        return gradient
    known: Tensor = _NotAgain.apply(gradient.detach(), *sources)
    return known


class LeaveOneOutLoss(torch.autograd.Function):
    """The loss and log p (B,) of the queries; for no loss, log p alone.

    Differentiable once, in the features and, where asked for, in the bank; the log p beside a loss is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        bank: Tensor,
        labels: Tensor | None,
        index: Tensor,
        classes: list[Tensor],
        archive: list[Tensor],
        sigma: float,
        loss: losses.Loss | None,
        backend: Backend,
        need_direction: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if loss is None:
            log_p, gradient, log_sum_all = backend.log_scores(
                features, bank, labels, index, classes, sigma, need_direction
            )
            value, slope = log_p, torch.ones_like(log_p) if ctx.needs_input_grad[1] else None
        else:
            value, log_p, slope, gradient, log_sum_all = backend.loss(
                features, bank, labels, index, classes, archive, sigma, loss, need_direction
            )
            ctx.mark_non_differentiable(log_p)
            ctx.set_materialize_grads(False)  # of log p: a tensor of zeros
        ctx.sigma, ctx.backend = sigma, backend
        for_bank = (slope, log_sum_all, bank, labels, index, *classes) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(log_p, gradient, features, *for_bank)
        return log_p if loss is None else (value, log_p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing depends on the loss
            return (None,) * 10
        log_p, gradient, features, *for_bank = ctx.saved_tensors
        grad_features = grad_bank = None
        if ctx.needs_input_grad[0]:
            scaled = gradient * grad if grad.dim() == 0 else rows_times(grad, gradient, log_p)
            grad_features = not_again(scaled.to(features.dtype), grad, features)
        if ctx.needs_input_grad[1]:
            slope, log_sum_all, bank, labels, index, *classes = for_bank
            grad_log_p = torch.where(log_p > -torch.inf, grad * slope, 0)
            grad_bank = ctx.backend.bank_gradient(
                features, bank, labels, index, classes, ctx.sigma, log_p, log_sum_all, grad_log_p
            )
            grad_bank = not_again(grad_bank, grad, bank)
        return grad_features, grad_bank, *(None,) * 8


def log_scores_fake(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `Backend.log_scores`."""
    B, D = features.shape
    wide = accumulator_dtype(bank.dtype)
    return (
        bank.new_empty(B, dtype=wide),
        bank.new_empty((B if need_direction else 0, D), dtype=wide),
        bank.new_empty(B, dtype=wide),
    )


def class_sums_fake(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    index: Tensor,
    classes: list[Tensor],
    sigma: float,
    need_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `Backend.class_sums`."""
    B, D = features.shape
    log_sum = bank.new_empty(B, dtype=torch.float64)
    mean = bank.new_empty((B if need_means else 0, D), dtype=accumulator_dtype(bank.dtype))
    return log_sum, torch.empty_like(log_sum), mean, torch.empty_like(mean)


def bank_gradient_fake(features: Tensor, bank: Tensor, *rest: Any) -> Tensor:
    """Shape and dtype of `Backend.bank_gradient`."""
    return torch.empty_like(bank, memory_format=torch.contiguous_format)
