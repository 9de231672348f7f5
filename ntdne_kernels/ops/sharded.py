"""log p of a batch against a bank of which each rank holds a shard: features and sums travel, the bank never does.

    who has how many queries                        counts       all-gather               5 int64
    their images, and what is known of these        look-up      all-gather, all-reduce   2·B int64, 2·B float64
    every rank has b_r queries, B in all            features     all-gather               B·D of the bank's dtype
    every rank sums all B over its rows             `ClassSums`
    the sums of a query over the whole bank         logarithms   all-reduce (2)           2·B float64
    ∂log p_i/∂f_i adds up from the ranks            to i's rank  all-to-all               B·D in the wide dtype

The first two are `distributed.Ranks.exchange` and `bank.batch.find`. Contributions are added in the order of the ranks:
the same batch gives the same bits again.

Each op takes its process group by name, as PyTorch's own collectives under torch.compile do, which sees one opaque op
with everything in it. `sizes` is b_r of each rank.

Shapes: W ranks, b queries of this rank, B of all, n bank rows of this rank, D features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops.chunked import class_sums
from ntdne_kernels.ops.class_sums import ClassSums, contribution, log_p_of
from ntdne_kernels.ops.leave_one_out import not_again, rows_times
from ntdne_kernels.ops.losses import LossSpec, loss_and_slope
from ntdne_kernels.ops.schema import Batch, implement

# Its name since torch 2.14, which warns of the old one.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
# Queries of all ranks that are gathered at a time, so that a GPU sums one piece while the next one travels. On CPUs
# travelling takes the time of the cores that sum: B = 4096 in 4 pieces took 2 to 13 % longer than in one.
PIECE = {"cpu": 1 << 62, "cuda": 1024}
MOST_PIECES = 4  # many ranks would send crumbs, each with a collective's latency


def _gather_rows(rows: Tensor, sizes: list[int], group: str) -> Tensor:
    """The rows (b, ...) of all ranks (B, ...), those of rank 0 first."""
    return _start_gather(rows, sizes, _group(group))()


def _max_over_ranks(x: Tensor, group: str) -> Tensor:
    """The largest of all ranks at each place."""
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, distributed.ReduceOp.MAX, group=_group(group))
    return x


def _log_scores(
    batch: Batch, need_direction: bool, backend: str, sizes: list[int], group: str
) -> tuple[Tensor, Tensor]:
    """log p (B,) of all ranks' queries, on every rank, and ∂log p/∂f (b, D) or (0, D) of this rank's.

    `batch.features` (b, D) are this rank's, labels and own (B,) all ranks'; own and layout speak of the rows (n, D)
    that the rank keeps, with −1 for queries that are in none of them.
    """
    features, shard, labels = batch.features, batch.bank, batch.labels
    assert labels is not None
    ranks = _group(group)
    rank, wide = ranks.rank(), accumulator_dtype(shard.dtype)
    rows = features.detach().to(shard.dtype)
    # A shard in host memory would cross the bus anew for each piece.
    pieces = _pieces(sizes, PIECE[shard.device.type])
    queries = _start_gather(rows[pieces[0][rank]], _lengths(pieces[0]), ranks)
    parts = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        gathered = queries()
        if following is not None:
            queries = _start_gather(rows[following[rank]], _lengths(following), ranks)
        part = batch._replace(features=gathered, labels=_cut(labels, piece, sizes), own=_cut(batch.own, piece, sizes))
        parts.append(class_sums(part, need_direction, backend))
    sums = ClassSums(*(_in_batch_order(columns, pieces) for columns in zip(*parts, strict=True)))

    log_same, log_other = _log_sum_exp(torch.stack([sums.log_same, sums.log_other]), ranks)
    log_p = log_p_of(log_same, log_other).to(wide)
    if not need_direction:
        return log_p, features.new_empty((0, features.size(1)), dtype=wide)
    outgoing = contribution(sums, log_same, log_other, batch.sigma).to(wide)
    incoming = outgoing.new_empty((len(sizes), *features.shape))
    distributed.all_to_all_single(
        incoming.flatten(0, 1), outgoing, [len(features)] * len(sizes), list(sizes), group=ranks
    )
    return log_p, incoming.sum(dim=0, dtype=torch.float64).to(wide)


class ShardedLoss(torch.autograd.Function):
    """As `leave_one_out.LeaveOneOutLoss`, of the batch of all ranks: its loss, and its log p (B,).

    Under "mean" and "sum" the loss is that of the whole batch on every rank, and each rank's gradient is W times that
    of its own features, so that their average over the ranks, which DistributedDataParallel takes, is the gradient of
    the loss. Under "none" it is the loss (b,) of the rank's own queries, with its own gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes its inputs one by one
        ctx: Any,
        features: Tensor,
        batch: Batch,
        spec: LossSpec,
        indicator: Tensor | None,
        log_chance: Tensor | None,
        backend: str,
        need_direction: bool,
        sizes: list[int],
        rank: int,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        """Arguments as `log_scores`; `indicator` (B,) and `log_chance` (B,) as `losses.loss_and_slope`."""
        log_p, direction = log_scores(batch._replace(features=features), need_direction, backend, sizes, group)
        value, slope = loss_and_slope(log_p, indicator, spec, log_chance=log_chance)
        own = own_slice(sizes, rank)
        if spec.reduction == "none":
            value, slope = value[own].clone(), slope[own]
        else:
            slope = len(sizes) * slope[own]
        ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(direction, log_p[own].clone(), slope, features)
        return value, log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the features; None for all else."""
        if grad is None:
            return (None,) * 10
        direction, log_p, slope, features = ctx.saved_tensors
        gradient = rows_times(grad * slope, direction, log_p).to(features.dtype)
        return not_again(gradient, grad, features), *(None,) * 9


def own_slice(sizes: list[int], rank: int) -> slice:
    """Where a rank's queries stand in the batch of all."""
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank])


def _group(name: str) -> ProcessGroup:
    group: ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


def _pieces(sizes: list[int], length: int) -> list[list[slice]]:
    """For each piece the rows of each rank that are in it: as many of each, `length` in all or more."""
    step = max(length // len(sizes), -(-max(sizes) // MOST_PIECES), 1)
    count = max(-(-max(sizes) // step), 1)
    return [[slice(min(c * step, b), min((c + 1) * step, b)) for b in sizes] for c in range(count)]


def _lengths(piece: list[slice]) -> list[int]:
    return [rows.stop - rows.start for rows in piece]


def _cut(x: Tensor, piece: list[slice], sizes: list[int]) -> Tensor:
    """The entries of x (B,) that are in the piece."""
    return torch.cat([of_rank[rows] for of_rank, rows in zip(x.split(sizes), piece, strict=True)])


def _in_batch_order(parts: tuple[Tensor, ...], pieces: list[list[slice]]) -> Tensor:
    """The rows of all pieces (B, ...), rank by rank again; nothing of nothing."""
    if len(parts) == 1 or not any(len(part) for part in parts):
        return parts[0]
    by_rank = zip(*(part.split(_lengths(piece)) for part, piece in zip(parts, pieces, strict=True)), strict=True)
    return torch.cat([rows for of_rank in by_rank for rows in of_rank])


def _start_gather(rows: Tensor, sizes: list[int], group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to gather the rows (b, ...) of all ranks; the function returned waits for them, (B, ...)."""
    longest = max(sizes)
    padded = rows.contiguous()
    if len(rows) < longest:
        padded = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    gathered = rows.new_empty((len(sizes), longest, *rows.shape[1:]))
    work: Any = _all_gather(gathered.flatten(0, 1), padded, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        if min(sizes) == longest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return finish


def _log_sum_exp(logs: Tensor, group: ProcessGroup) -> Tensor:
    """The logarithm of the sum over the ranks of exp(logs)."""
    highest = logs.clone()
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=group)
    highest = torch.where(highest == -torch.inf, 0, highest)  # −inf − (−inf) is NaN
    total = torch.exp(logs - highest)
    distributed.all_reduce(total, distributed.ReduceOp.SUM, group=group)
    return torch.log(total) + highest


gather_rows = implement("gather_rows", _gather_rows)
max_over_ranks = implement("max_over_ranks", _max_over_ranks)
log_scores = implement("sharded_log_scores", _log_scores)
