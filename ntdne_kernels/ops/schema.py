"""Every op of the package: what it takes, what it returns, and the shapes it returns to a compiler that traces it.

An op is defined here, in one table, and implemented once per backend or device elsewhere (`implement`).

Shapes: B queries, N bank rows, D features, n images; W ranks, b queries of one of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops.layout import FLAT_LAYOUT, ClassLayout, flatten, unflatten


class Batch(NamedTuple):
    """Queries and the bank that they are compared with."""

    features: Tensor
    """(B, D): unit rows; with an `Archive`, of any length."""
    bank: Tensor
    """(N, D) unit rows."""
    labels: Tensor | None
    """(B,), −1 for unlabelled. None with an `Archive`: the images have its labels, other features none."""
    own: Tensor
    """(B,) the query's own bank row, which is left out; with an `Archive` its image; −1 for none."""
    layout: ClassLayout
    sigma: float

    def flat(self) -> tuple[Any, ...]:
        """The batch as `BATCH` has it."""
        return self.features, self.bank, self.labels, self.own, *flatten(self.layout), self.sigma

    @staticmethod
    def of(*flat: Any) -> "Batch":
        """The batch from what `flat` made of it."""
        features, bank, labels, own, *layout, sigma = flat
        return Batch(features, bank, labels, own, unflatten(*layout), sigma)


class Archive(NamedTuple):
    """What a `MemoryBank` knows of n images, all of which have a row in the bank."""

    labels: Tensor
    """(n,), −1 for unlabelled."""
    position: Tensor
    """(n,) bank row of each image."""
    scores: Tensor
    """(n + 1,) log p when last scored, NaN for never; the last one means nothing."""


BATCH = f"Tensor features, Tensor bank, Tensor? labels, Tensor own, {FLAT_LAYOUT}, float sigma"
BATCH_LENGTH = len(BATCH.split(","))
ARCHIVE = "Tensor? image_labels, Tensor? image_position, Tensor? image_scores"


def empty_log_scores(batch: Batch, need_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log p (B,), ∂log p/∂f (B, D) or (0, D), and log Σ_all (B,)."""
    B, D = batch.features.shape
    log_p = batch.features.new_empty(B, dtype=accumulator_dtype(batch.bank.dtype))
    return log_p, log_p.new_empty((B if need_direction else 0, D)), torch.empty_like(log_p)


def empty_class_sums(batch: Batch, need_means: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what `ClassSums` holds."""
    B, D = batch.features.shape
    log_sum = batch.features.new_empty(B, dtype=torch.float64)
    mean = log_sum.new_empty((B if need_means else 0, D), dtype=accumulator_dtype(batch.bank.dtype))
    return log_sum, torch.empty_like(log_sum), mean, torch.empty_like(mean)


def empty_bank_gradient(batch: Batch, *_: Tensor) -> Tensor:
    """Room for the gradient (N, D) of the bank."""
    return torch.empty_like(batch.bank, memory_format=torch.contiguous_format)


def empty_loss(batch: Batch, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the loss () or (B,), log p (B,), dL/dlog p (B,), dL/df (B, D) or (0, D), and log Σ_all (B,)."""
    *_, reduction, _, _, need_gradient = rest
    log_p, gradient, log_sum_all = empty_log_scores(batch, need_gradient)
    return (
        log_p.new_empty(log_p.shape if reduction == "none" else ()),
        log_p,
        torch.empty_like(log_p),
        gradient,
        log_sum_all,
    )


def _empty_sharded_log_scores(
    batch: Batch, need_direction: bool, backend: str, sizes: list[int], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    _, direction, _ = empty_log_scores(batch, need_direction)
    log_p = direction.new_empty(sum(sizes))
    return log_p, direction, torch.empty_like(log_p, dtype=torch.bool)


def _nothing(*_: Any) -> None:
    return None


class Schema(NamedTuple):
    """What an op takes, beside the batch where it is an op of one, and what it returns.

    `fake` returns the like, empty; None for an op that no compiler may trace.
    """

    arguments: str
    returns: str
    fake: Callable[..., Any] | None
    of_batch: bool = False


def _of_batch(arguments: str, tensors: int, fake: Callable[..., Any]) -> Schema:
    returns = "Tensor" if tensors == 1 else f"({', '.join(['Tensor'] * tensors)})"
    return Schema(arguments, returns, fake, of_batch=True)


NEIGHBOURS = "Tensor same, Tensor? row_labels, Tensor? order, Tensor excluded"
LOG_SCORES = _of_batch("bool need_direction", 3, empty_log_scores)
CLASS_SUMS = _of_batch("bool need_means", 4, empty_class_sums)
BANK_GRADIENT = _of_batch("Tensor log_p, Tensor log_sum_all, Tensor grad_log_p", 1, empty_bank_gradient)
SCHEMAS = {
    "streaming_log_scores": LOG_SCORES,
    "streaming_class_sums": CLASS_SUMS,
    "streaming_bank_gradient": BANK_GRADIENT,
    "tiled_class_sums": Schema(
        f"Tensor queries, Tensor bank, {NEIGHBOURS}, float sigma, bool tracked, bool need_means, int block, int length",
        "(Tensor, Tensor, Tensor, Tensor)",
        None,
    ),
    "tiled_class_log_sums": Schema(
        "Tensor features, Tensor bank, Tensor index, Tensor offsets, float sigma, bool tracked, int block, int length",
        "Tensor",
        None,
    ),
    "tiled_bank_gradient": Schema(
        f"Tensor queries, Tensor bank, {NEIGHBOURS}, Tensor log_sum_same, Tensor log_sum_all, Tensor weight, "
        "float sigma, int block, int length",
        "Tensor",
        None,
    ),
    "triton_log_scores": LOG_SCORES,
    "triton_class_sums": CLASS_SUMS,
    "triton_bank_gradient": BANK_GRADIENT,
    "triton_loss": _of_batch(
        f"{ARCHIVE}, float? q, float? k, str reduction, str indicator, float? unit, bool need_gradient", 5, empty_loss
    ),
    "chunked_log_scores": _of_batch(
        "bool need_direction, str backend", 3, lambda batch, need_direction, _: empty_log_scores(batch, need_direction)
    ),
    "sharded_log_scores": _of_batch(
        "bool need_direction, str backend, SymInt[] sizes, str group", 3, _empty_sharded_log_scores
    ),
    "gather_rows": Schema(
        "Tensor rows, SymInt[] sizes, str group",
        "Tensor",
        lambda rows, sizes, group: rows.new_empty((sum(sizes), *rows.shape[1:])),
    ),
    "max_over_ranks": Schema(
        "Tensor x, str group",
        "Tensor",
        lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    "directed": Schema("Tensor norms", "Tensor", lambda norms: torch.empty_like(norms, dtype=torch.bool)),
    "update_bank_": Schema(
        "Tensor(a!) bank, Tensor features, Tensor index, float momentum, Tensor? position=None", "()", _nothing
    ),
    "skipped_rows": Schema("Tensor bank", "int", None),
    "record_scores_": Schema("Tensor(a!) scores, Tensor log_p, Tensor index, Tensor image_labels", "()", _nothing),
    "exp_": Schema("Tensor(a!) x", "()", _nothing),
    "bf16_mm_": Schema("Tensor(a!) out, Tensor a, Tensor b, float alpha", "()", _nothing),
}

_LIBRARY = torch.library.Library("ntdne_kernels", "FRAGMENT")


def _with_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a batch as one of its parts."""

    def with_parts(*flat: Any) -> Any:
        return function(Batch.of(*flat[:BATCH_LENGTH]), *flat[BATCH_LENGTH:])

    return with_parts


def _define(name: str, schema: Schema) -> None:
    arguments = f"{BATCH}, {schema.arguments}" if schema.of_batch else schema.arguments
    _LIBRARY.define(f"{name}({arguments}) -> {schema.returns}")
    if schema.fake is not None:
        fake = _with_batch(schema.fake) if schema.of_batch else schema.fake
        torch.library.register_fake(f"ntdne_kernels::{name}", fake, lib=_LIBRARY)


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema)


def implement(name: str, function: Callable[..., Any], dispatch_key: str = "CompositeExplicitAutograd") -> Any:
    """Let the function be what the op does; returns what calls it, with a `Batch` first where it is an op of one.

    A call costs 5 µs; through torch.library.custom_op 14, and 69 where a gradient is wanted (benchmarks/NOTES.md).
    """
    op = getattr(torch.ops.ntdne_kernels, name).default
    if not SCHEMAS[name].of_batch:
        _LIBRARY.impl(name, function, dispatch_key)
        return op
    _LIBRARY.impl(name, _with_batch(function), dispatch_key)
    return lambda batch, *rest, **options: op(*batch.flat(), *rest, **options)
