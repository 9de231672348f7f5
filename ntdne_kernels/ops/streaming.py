"""log p and its gradients in tiles of the bank, on any device: memory O(B·D + tile).

The walks over the tiles are written here in PyTorch, which defines them and serves every device. On CPUs csrc/ has
kernels of the three, in which each thread walks a share of the bank.

The sums of a query over any part of the bank are Σ = Σ_j exp(f_i·f_j/σ − m) and v = Σ_j exp(f_i·f_j/σ − m)·f_j. They
are made once over the rows of the query's class and once over the others, so that nothing cancels where p is near 1:

    1/p − 1        = Σ_other/Σ_same
    ∂log p_i/∂f_i  = (1 − p)·(v_same/Σ_same − v_other/Σ_other)/σ      = (μ_same − μ_all)/σ

Unit rows bound the exponents by 1/σ: down to SMALLEST_PLAIN_SIGMA the sums fit float32 with m = 0. Below it each of the
two sums has its own running maximum m; a common one would lose Σ_same where the positives are far.

Shapes: B queries, b of them in a block, N bank rows, n of a tile, D features, K classes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops.class_sums import SMALLEST_PLAIN_SIGMA, ClassSums, log_scores_of
from ntdne_kernels.ops.layout import Neighbours, neighbours_of
from ntdne_kernels.ops.leave_one_out import GradientInForward
from ntdne_kernels.ops.products import exp_, scaled_scores_, weighted_rows
from ntdne_kernels.ops.schema import Batch, implement

QUERIES_PER_TILE = 512
# Of a block's sums, in float64 and twice for each thread: 4 MB.
SUMS_ELEMENTS = 1 << 18
# One after the other in float32, by class_log_sums: of 8192 equal terms the error passes 1e-4.
ROWS_SUMMED = 1024
# On a CPU for each thread. 256 x 512 float32 logits are 512 KB: twice as many took 20 % longer with AMX, beside copies
# in bfloat16, and as long in float32 (benchmarks measure, loss and gradient, B = 256, N = 10^6).
TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}


class _Sums:
    """Σ and v of B queries over the rows seen so far; relative to exp(maximum) where that is tracked.

    Tiles are added up in float64, which costs nothing beside their products: in float32 the gradient's error grew with
    their number, to 2e-5 of its largest value at N = 500,000, where plain PyTorch's is 1.5e-6.
    """

    def __init__(self, queries: Tensor, weighted: bool) -> None:
        wide = accumulator_dtype(queries.dtype)
        self.maximum = queries.new_full((len(queries),), -torch.inf, dtype=wide)
        double = torch.float32 if queries.device.type == "mps" else torch.float64  # what a device has
        self.total = queries.new_zeros(len(queries), dtype=double)
        self.vector = torch.zeros_like(queries, dtype=double) if weighted else None
        self.dim = queries.size(1)

    def add(self, weights: Tensor, tile: Tensor, rows: slice, tracked: bool) -> None:
        """Bank rows `tile` (n, D) with their weights (b, n) for the queries `rows`; tracked: with their logits."""
        if tracked:
            weights = torch.exp(weights - self._raise_maximum(weights, rows).unsqueeze(1))
        self.total[rows].add_(weights.sum(dim=1))
        if self.vector is not None:
            self.vector[rows].add_(weighted_rows(weights, tile))

    def log_total(self, tracked: bool) -> Tensor:
        """log Σ (B,) without its offset; −inf where no row was seen."""
        return torch.log(self.total) + self.maximum if tracked else torch.log(self.total)

    def mean(self) -> Tensor:
        """v/Σ (B, D); 0 where no row was seen. (0, D) where it was not asked for."""
        if self.vector is None:
            return self.total.new_empty((0, self.dim))
        return self.vector / torch.where(self.total == 0, 1, self.total).unsqueeze(1)

    def _raise_maximum(self, logits: Tensor, rows: slice) -> Tensor:
        """The maximum (b,) with these logits, to which the sums so far are rescaled; 0 where all are masked."""
        maximum = torch.maximum(self.maximum[rows], logits.amax(dim=1))
        finite = torch.where(maximum == -torch.inf, 0, maximum)  # −inf − (−inf) is NaN
        shrink = torch.exp(self.maximum[rows] - finite)
        self.maximum[rows] = maximum
        self.total[rows].mul_(shrink)
        if self.vector is not None:
            self.vector[rows].mul_(shrink.unsqueeze(1))
        return finite


def class_sums_in_tiles(  # noqa: PLR0913  an op takes its inputs one by one
    queries: Tensor,
    bank: Tensor,
    same: Tensor,
    row_labels: Tensor | None,
    order: Tensor | None,
    excluded: Tensor,
    sigma: float,
    tracked: bool,
    need_means: bool,
    block: int,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ClassSums` holds, in float64, of queries (B, D) in the bank's dtype.

    Four arguments are those of `Neighbours`. `tracked`: with running maxima; `block` and `length`: queries and rows of
    a tile at most.
    """
    same_rows, other_rows = _Sums(queries, need_means), _Sums(queries, need_means)
    nothing = -torch.inf if tracked else 0  # what a row that does not count holds
    for start, tile, rows, weights in _tiles(queries, bank, order, excluded, sigma, block, length):
        if not tracked:
            exp_(weights)
        others = _other_class(same[rows], row_labels, start, len(tile))
        same_rows.add(weights.masked_fill(others, nothing), tile, rows, tracked)
        other_rows.add(weights.masked_fill_(~others, nothing), tile, rows, tracked)
    return same_rows.log_total(tracked), other_rows.log_total(tracked), same_rows.mean(), other_rows.mean()


def class_log_sums_in_tiles(
    features: Tensor,
    bank: Tensor,
    index: Tensor,
    offsets: Tensor,
    sigma: float,
    tracked: bool,
    block: int,
    length: int,
) -> Tensor:
    """`Backend.class_log_sums`, with the bank's rows down and the queries across; the last three as the function above.

    The sum over the rows of a class then adds whole rows of the tile, which takes little beside the tile's product;
    along the other dimension it would add number by number.
    """
    B, K, bounds = len(features), len(offsets) - 1, offsets.tolist()
    masses = bank.new_full((K, B), -torch.inf if tracked else 0, dtype=torch.float64)
    length = min(length, ROWS_SUMMED)
    buffer = bank.new_empty(min(block, B) * min(length, len(bank)), dtype=accumulator_dtype(bank.dtype))
    for start in range(0, len(bank), length):
        tile = bank[start : start + length]
        # Classes with rows in the tile, empty ones at its ends left out.
        here = slice(bisect_right(bounds, start) - 1, bisect_left(bounds, start + len(tile)))
        rows = torch.arange(start, start + len(tile), device=bank.device)
        c = torch.searchsorted(offsets, rows, right=True) - (1 + here.start)
        for first in range(0, B, block):
            queries = slice(first, min(first + block, B))
            logits = buffer[: len(tile) * (queries.stop - first)].view(len(tile), -1)
            scaled_scores_(logits, tile, features[queries], 1 / sigma)
            _exclude_(logits, index[queries].unsqueeze(0) - start, dim=0)
            sums = logits.new_zeros((here.stop - here.start, logits.size(1)))
            if tracked:
                maximum = torch.full_like(sums, -torch.inf)
                maximum.scatter_reduce_(0, c.unsqueeze(1).expand_as(logits), logits, "amax")
                finite = torch.where(maximum == -torch.inf, 0, maximum)  # −inf − (−inf) is NaN
                sums.index_add_(0, c, logits.sub_(finite[c]).exp_())
                log_sums = torch.log(sums.double()) + finite
                masses[here, queries] = torch.logaddexp(masses[here, queries], log_sums)
            else:
                masses[here, queries] += sums.index_add_(0, c, exp_(logits))
    return (masses if tracked else masses.log_()).t()


def bank_gradient_in_tiles(  # noqa: PLR0913  an op takes its inputs one by one
    queries: Tensor,
    bank: Tensor,
    same: Tensor,
    row_labels: Tensor | None,
    order: Tensor | None,
    excluded: Tensor,
    log_sum_same: Tensor,
    log_sum_all: Tensor,
    weight: Tensor,
    sigma: float,
    block: int,
    length: int,
) -> Tensor:
    """Σ_i weight_i·(p̃_ij − p_ij)·f_i (eq. 7) for each row j (N, D), from the logarithms (B,) of the sums in p̃ and p."""
    gradient = torch.empty_like(bank, memory_format=torch.contiguous_format)
    partial: Tensor | None = None
    for start, tile, rows, logits in _tiles(queries, bank, order, excluded, sigma, block, length):
        others = _other_class(same[rows], row_labels, start, len(tile))
        p_same = torch.exp(logits - log_sum_same[rows].unsqueeze(1)).masked_fill_(others, 0)
        p_all = logits.sub_(log_sum_all[rows].unsqueeze(1)).exp_()
        weights = (p_same - p_all).mul_(weight[rows].unsqueeze(1))
        contribution = weights.t() @ queries[rows].to(weights.dtype)
        partial = contribution if rows.start == 0 or partial is None else partial + contribution
        if rows.stop == len(queries):
            visited = slice(start, start + len(tile)) if order is None else order[start : start + len(tile)]
            gradient[visited] = partial.to(bank.dtype)
    return gradient if len(queries) else gradient.zero_()


_tiled_class_sums = implement("tiled_class_sums", class_sums_in_tiles)
_tiled_class_log_sums = implement("tiled_class_log_sums", class_log_sums_in_tiles)
_tiled_bank_gradient = implement("tiled_bank_gradient", bank_gradient_in_tiles)


def _sums(batch: Batch, need_means: bool) -> ClassSums:
    """The sums of the queries over the bank, and their means; all float64."""
    bank, tracked = batch.bank, batch.sigma < SMALLEST_PLAIN_SIGMA
    with torch.autocast(bank.device.type, enabled=False):
        queries = batch.features.to(bank.dtype)
        neighbours = _neighbours(batch)
        sizes = _tile_sizes(bank, len(queries))
        return ClassSums(*_tiled_class_sums(queries, bank, *neighbours, batch.sigma, tracked, need_means, *sizes))


def _class_sums(batch: Batch, need_means: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.class_sums` in tiles."""
    wide = accumulator_dtype(batch.bank.dtype)
    log_same, log_other, *means = _sums(batch, need_means)
    return log_same, log_other, means[0].to(wide), means[1].to(wide)


def _log_scores(batch: Batch, need_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.log_scores` in tiles."""
    return log_scores_of(_sums(batch, need_direction), batch.sigma, accumulator_dtype(batch.bank.dtype))


def _bank_gradient(batch: Batch, log_p: Tensor, log_sum_all: Tensor, grad_log_p: Tensor) -> Tensor:
    """`Backend.bank_gradient` (eq. 12 without its loss factor) in tiles."""
    bank, sigma = batch.bank, batch.sigma
    with torch.autocast(bank.device.type, enabled=False):
        queries = batch.features.to(bank.dtype)
        # Queries without positives get no weight; their own sums may be empty, and −inf − (−inf) is NaN.
        log_sum_all = torch.where(log_p == -torch.inf, torch.inf, log_sum_all)
        log_sum_same = torch.where(log_p == -torch.inf, torch.inf, log_sum_all + log_p)
        of_queries = (log_sum_same, log_sum_all, grad_log_p / sigma)
        sizes = _tile_sizes(bank, len(queries))
        gradient: Tensor = _tiled_bank_gradient(queries, bank, *_neighbours(batch), *of_queries, sigma, *sizes)
        return gradient


def class_log_sums(features: Tensor, bank: Tensor, index: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """`Backend.class_log_sums` in tiles."""
    with torch.autocast(bank.device.type, enabled=False):
        sizes = _tile_sizes(bank, len(features))
        tracked = sigma < SMALLEST_PLAIN_SIGMA
        log_sums: Tensor = _tiled_class_log_sums(
            features, bank, index.contiguous(), offsets.contiguous(), sigma, tracked, *sizes
        )
        return log_sums


def _neighbours(batch: Batch) -> Neighbours:
    """As the kernels read them: contiguous, which what a user gives need not be."""
    assert batch.labels is not None
    neighbours = neighbours_of(batch.labels, batch.own, batch.layout)
    return Neighbours._make(x if x is None else x.contiguous() for x in neighbours)


def _tiles(
    queries: Tensor, bank: Tensor, order: Tensor | None, excluded: Tensor, sigma: float, block: int, length: int
) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """Yield (first row, bank rows (n, D), slice of queries, logits (b, n)); the excluded row's logit is −inf."""
    B, N = len(queries), len(bank)
    if B == 0:
        return
    buffer = queries.new_empty(min(block, B) * min(length, N), dtype=accumulator_dtype(bank.dtype))
    for start in range(0, N, length):
        stop = min(start + length, N)
        tile = bank[start:stop] if order is None else bank.index_select(0, order[start:stop])
        for first in range(0, B, block):
            rows = slice(first, min(first + block, B))
            logits = buffer[: (rows.stop - first) * len(tile)].view(-1, len(tile))
            scaled_scores_(logits, queries[rows], tile, 1 / sigma)
            _exclude_(logits, excluded[rows].unsqueeze(1) - start, dim=1)
            yield start, tile, rows, logits


def _tile_sizes(bank: Tensor, B: int) -> tuple[int, int]:
    """Queries and rows of a tile: neither its logits nor a copy of its rows, of 64 columns or more, may be larger."""
    D, block = bank.size(1), max(min(B, QUERIES_PER_TILE), 1)
    if bank.device.type == "cpu":
        block = min(block, max(SUMS_ELEMENTS // D, 64))
    elements = TILE_ELEMENTS.get(bank.device.type, TILE_ELEMENTS["cpu"])
    return block, max(elements // max(block, D, 64), 1)


def _exclude_(logits: Tensor, place: Tensor, dim: int) -> None:
    """−inf at the place of each query along the dimension of the rows; places outside the tile are left out."""
    inside = (place >= 0) & (place < logits.size(dim))
    place = torch.where(inside, place, 0)
    logits.scatter_(dim, place, torch.where(inside, -torch.inf, logits.gather(dim, place)))


def _other_class(same: Tensor, row_labels: Tensor | None, start: int, length: int) -> Tensor:
    """(b, n) mask: True where the bank row is not of the query's class."""
    if row_labels is not None:
        return same.unsqueeze(1) != row_labels[start : start + length]
    j = torch.arange(start, start + length, device=same.device)
    return (j < same[:, :1]) | (j >= same[:, 1:])


log_scores = implement("streaming_log_scores", _log_scores)
class_sums = implement("streaming_class_sums", _class_sums)
bank_gradient = implement("streaming_bank_gradient", _bank_gradient)
STREAMING = GradientInForward(log_scores, class_sums, class_log_sums, bank_gradient)
