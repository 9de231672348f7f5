"""`kernels.stream` and `class_log_sums` for Hopper GPUs: a warp that loads tiles, and warp groups that multiply them.

The sums are those of `kernels.stream`, segment by segment, for 16-bit banks whose classes are ranges of rows and for
sigmas that need no running maximum. What differs is who does what. Tiles come by TMA into a ring of STAGES; each warp
group holds HALF = 64 queries, takes the tiles in turn, and gives each back when its second product is done:

    the loading warp:    wait until a tile's place is empty → fetch the tile, which makes it full
    each warp group:     wait until tile t is full → S_t = Q·T_tᵀ, started; v += P_{t−1}·T_{t−1}, started
                         S_t is there → P_t = 2^(S_t·scale − scale)
                         v is there → tile t − 1 is empty

Two warp groups run ahead and behind of each other freely: one multiplies while the other exponentiates. All warps walk
the same segments, which each finds for itself from `neighbours`, so that nobody waits for a tile that never comes. The
sums over each of many classes have no second product: S of tile t is made under the exponentials of tile t − 1.

Shapes: B queries, N bank rows, D features, C classes, W columns of a tile (a power of two, 0 past D), K splits of the
bank.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ntdne_kernels.ops.gpu.configs import hopper_width

HALF = 64  # queries of one warp group: the rows of its tensor-core instruction
_HALF = gl.constexpr(HALF)
_LOW, _HIGH, _OWN = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # columns of `neighbours`
_OUT_OF_SIGHT = gl.constexpr(2**31 - 1)  # a row that no split reaches
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _from(rows, origin):
    """Bank rows counted from `origin`, in 32 bits; −1 for all before it, _OUT_OF_SIGHT for those far behind it."""
    return gl.maximum(gl.minimum(rows - origin, _OUT_OF_SIGHT), -1).to(gl.int32)


@gluon.jit
def _ranges(neighbours, origin, BLOCK_B: gl.constexpr, WARPS: gl.constexpr):
    """Where the classes of the block's queries begin and end, as `_segment_end` takes them."""
    i = gl.arange(0, BLOCK_B, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return _from(gl.load(neighbours + i * 4 + _LOW), origin), _from(gl.load(neighbours + i * 4 + _HIGH), origin)


@gluon.jit
def _segment_end(low, high, begin, end, FOLD_ROWS: gl.constexpr):
    """Where the segment that begins at `begin` ends: up to there no query changes from other to same or back."""
    next_end = gl.minimum(gl.where(low > begin, low, _OUT_OF_SIGHT), gl.where(high > begin, high, _OUT_OF_SIGHT))
    return gl.minimum(gl.minimum(end, begin + FOLD_ROWS), gl.min(next_end, 0))


@gluon.jit
def _fetch_queries(queries, first_query, q_smem, q_full, BLOCK_B: gl.constexpr):
    """The block's queries, 64 for each warp group; 0 for those past the last one."""
    mbarrier.expect(q_full, BLOCK_B * queries.block_type.shape[1] * 2)
    for half in gl.static_range(BLOCK_B // _HALF):
        tma.async_copy_global_to_shared(queries, [first_query + half * _HALF, 0], q_full, q_smem.index(half))


@gluon.jit
def _fetch(bank, row, ring, full, empty, taken, STAGES: gl.constexpr):
    """The tile that begins at a row of the bank, into the next place of the ring."""
    stage = taken % STAGES
    mbarrier.wait(empty.index(stage), ((taken // STAGES) & 1) ^ 1)  # passes in the first round
    mbarrier.expect(full.index(stage), bank.block_type.nbytes)
    tma.async_copy_global_to_shared(bank, [row.to(gl.int32), 0], full.index(stage), ring.index(stage))


@gluon.jit
def _load(queries, bank, q_smem, ring, q_full, full, empty, neighbours, first_query, origin, end,
          BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FOLD_ROWS: gl.constexpr):  # fmt: skip
    """The loading warp."""
    _fetch_queries(queries, first_query, q_smem, q_full, BLOCK_B)
    low, high = _ranges(neighbours, origin, BLOCK_B, 1)
    taken = 0
    begin = 0
    while begin < end:
        stop = _segment_end(low, high, begin, end, FOLD_ROWS)
        for start in range(begin, stop, BLOCK_N):
            _fetch(bank, origin + start, ring, full, empty, taken, STAGES)
            taken += 1
        begin = stop


@gluon.jit
def _weigh(s, start, stop, next_own, own, scale, BLOCK_N: gl.constexpr, S: gl.constexpr):
    """2^(s·scale − scale) of a tile, 0 for rows at `stop` and behind it and for each query's own row."""
    # Most tiles hold no query's own row and end before the segment does: they need no mask. To end the loop at those
    # that do, and start it again behind them, took 4 % longer at B = 1024 (H200).
    if start + BLOCK_N > gl.minimum(stop, next_own):
        j = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
        s = gl.where((j[None, :] == own[:, None]) | (j >= stop)[None, :], float("-inf"), s)
        next_own = gl.min(gl.where(own >= start + BLOCK_N, own, _OUT_OF_SIGHT), 0)
    return gl.exp2(s * scale - scale), next_own  # one fused multiply-add


@gluon.jit
def _fold(vectors, slot, held, v, FIRST: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Add v to the columns from FIRST on of the rows `slot` of vectors; rows not held are empty."""
    WIDTH: gl.constexpr = v.shape[1]
    if WIDTH > 32:  # the addresses of more do not fit the registers
        left, right = gl.split(gl.permute(gl.reshape(v, [_HALF, 2, WIDTH // 2]), (0, 2, 1)))
        _fold(vectors, slot, held, left, FIRST, D, WARPS)
        _fold(vectors, slot, held, right, FIRST + WIDTH // 2, D, WARPS)
    else:
        V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
        v = gl.convert_layout(v, V)
        held = gl.convert_layout(held, gl.SliceLayout(1, V))
        slot = gl.convert_layout(slot, gl.SliceLayout(1, V))
        d = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, V))
        pointers = vectors + (slot[:, None] * D + d[None, :])
        here = (d < D)[None, :]
        # An atomic addition needs no registers for the old values. Nobody else adds here: the order is fixed.
        gl.store(pointers, v, mask=here & (held == 0)[:, None])
        gl.atomic_add(pointers, v, mask=here & held[:, None], sem="relaxed", scope="cta")


@gluon.jit
def _sum(q_smem, ring, q_full, full, empty, neighbours, totals, vectors, origin, end, scale,
         WHICH: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, W: gl.constexpr,
         STAGES: gl.constexpr, FOLD_ROWS: gl.constexpr, WEIGHTED: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """One warp group: Σ and v of its 64 queries."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16])
    V: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, W, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=V, k_width=2)
    dtype: gl.constexpr = ring.dtype
    i = WHICH * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, S))
    own = _from(gl.load(neighbours + i * 4 + _OWN), origin)
    low, high = _ranges(neighbours, origin, BLOCK_B, WARPS)
    zero = gl.zeros([_HALF, BLOCK_N], gl.float32, S)
    total_other = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, S))
    total_same = total_other
    mbarrier.wait(q_full, 0)
    q = q_smem.index(WHICH)
    taken = 0
    begin = 0
    while begin < end:
        stop = _segment_end(low, high, begin, end, FOLD_ROWS)
        my_low = _from(gl.load(neighbours + i * 4 + _LOW), origin)
        my_high = _from(gl.load(neighbours + i * 4 + _HIGH), origin)
        same = (my_low <= begin) & (begin < my_high)
        total = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, S))
        v = gl.zeros([_HALF, W], gl.float32, V)
        next_own = gl.min(gl.where(own >= begin, own, _OUT_OF_SIGHT), 0)

        stage = taken % STAGES
        mbarrier.wait(full.index(stage), (taken // STAGES) & 1)
        s = warpgroup_mma(q, ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if not WEIGHTED:
            mbarrier.arrive(empty.index(stage))
        w, next_own = _weigh(s, begin, stop, next_own, own, scale, BLOCK_N, S)
        total += gl.sum(w, 1)
        p = gl.convert_layout(w.to(dtype), P)  # stays in registers
        taken += 1
        for start in range(begin + BLOCK_N, stop, BLOCK_N):
            before = stage
            stage = taken % STAGES
            mbarrier.wait(full.index(stage), (taken // STAGES) & 1)
            s = warpgroup_mma(q, ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            if WEIGHTED:
                v = warpgroup_mma(p, ring.index(before), v, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])  # the second product goes on under the exponentials
                w, next_own = _weigh(s, start, stop, next_own, own, scale, BLOCK_N, S)
                total += gl.sum(w, 1)
                next_p = gl.convert_layout(w.to(dtype), P)
                v, p = warpgroup_mma_wait(0, deps=[v, next_p])
                mbarrier.arrive(empty.index(before))
            else:
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(empty.index(stage))
                w, next_own = _weigh(s, start, stop, next_own, own, scale, BLOCK_N, S)
                total += gl.sum(w, 1)
            taken += 1
        if WEIGHTED:
            v = warpgroup_mma(p, ring.index(stage), v, is_async=True)
            v = warpgroup_mma_wait(0, deps=[v])
            mbarrier.arrive(empty.index(stage))
        if WEIGHTED:
            held = gl.where(same, total_same, total_other) != 0
            slot = i + gl.where(same, BLOCK_B, 0)
            _fold(vectors, slot, held, v, 0, D, WARPS)
        total_other += gl.where(same, 0.0, total)
        total_same += gl.where(same, total, 0.0)
        begin = stop
    gl.store(totals + i, total_other)
    gl.store(totals + BLOCK_B + i, total_same)


@gluon.jit
def _make_ring(queries, bank, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory: room for the queries and STAGES tiles, and the barriers that say which of them are there."""
    q_smem = gl.allocate_shared_memory(queries.dtype, [BLOCK_B // _HALF, _HALF, W], queries.layout)
    ring = gl.allocate_shared_memory(bank.dtype, [STAGES, BLOCK_N, W], bank.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(empty.index(k), count=BLOCK_B // _HALF)
    fence_async_shared()
    return q_smem, ring, q_full, full, empty


@gluon.jit(do_not_specialize=["B", "N", "splits", "rows_per_split"])
def stream(
    queries, bank,  # TMA descriptors of (B', D) and (N, D)
    neighbours,
    totals, vectors,  # out (K, blocks, 2, BLOCK_B), (..., D), as those of `kernels.stream`
    B, N, scale, rows_per_split,
    D: gl.constexpr, W: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WEIGHTED: gl.constexpr, FOLD_ROWS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_B queries over one split of the bank, which is not empty."""
    # Programs that stand together take the same rows for other queries: all but one find them in the L2 cache.
    program = gl.program_id(0).to(gl.int64)
    blocks = gl.cdiv(B, BLOCK_B)
    block = program % blocks
    origin = program // blocks * rows_per_split
    end = gl.minimum(rows_per_split, N - origin).to(gl.int32)
    neighbours += block * (BLOCK_B * 4)
    totals += program * (2 * BLOCK_B)
    vectors += program * (2 * BLOCK_B * D)
    q_smem, ring, q_full, full, empty = _make_ring(queries, bank, BLOCK_B, BLOCK_N, W, STAGES)
    first_query = (block * BLOCK_B).to(gl.int32)
    if BLOCK_B == 2 * _HALF:
        gl.warp_specialize([
            (_sum, (q_smem, ring, q_full, full, empty, neighbours, totals, vectors, origin, end, scale,
                    0, BLOCK_B, BLOCK_N, D, W, STAGES, FOLD_ROWS, WEIGHTED, num_warps)),
            (_sum, (q_smem, ring, q_full, full, empty, neighbours, totals, vectors, origin, end, scale,
                    1, BLOCK_B, BLOCK_N, D, W, STAGES, FOLD_ROWS, WEIGHTED, num_warps)),
            (_load, (queries, bank, q_smem, ring, q_full, full, empty, neighbours, first_query, origin, end,
                     BLOCK_B, BLOCK_N, STAGES, FOLD_ROWS)),
        ], [num_warps, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_sum, (q_smem, ring, q_full, full, empty, neighbours, totals, vectors, origin, end, scale,
                    0, BLOCK_B, BLOCK_N, D, W, STAGES, FOLD_ROWS, WEIGHTED, num_warps)),
            (_load, (queries, bank, q_smem, ring, q_full, full, empty, neighbours, first_query, origin, end,
                     BLOCK_B, BLOCK_N, STAGES, FOLD_ROWS)),
        ], [1], [24])  # fmt: skip


@gluon.jit
def _load_classes(queries, bank, q_smem, ring, q_full, full, empty, offsets, first_query, first_class, C, splits,
                  BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loading warp of `class_log_sums`."""
    _fetch_queries(queries, first_query, q_smem, q_full, BLOCK_B)
    taken = 0
    for c in range(first_class, C, splits):
        begin = gl.load(offsets + c)
        rows = (gl.load(offsets + c + 1) - begin).to(gl.int32)
        for start in range(0, rows, BLOCK_N):
            _fetch(bank, begin + start, ring, full, empty, taken, STAGES)
            taken += 1


@gluon.jit
def _add(total, excess, weights):
    """total + Σ weights; `excess` is by how much rounding has raised the total, as in `kernels.class_log_sums`."""
    part = gl.sum(weights, 1) - excess
    rounded = total + part
    return rounded, (rounded - total) - part


@gluon.jit
def _sum_classes(q_smem, ring, q_full, full, empty, index, offsets, log_sums, first_query, first_class, B, C, splits,
                 scale, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                 WARPS: gl.constexpr):  # fmt: skip
    """One warp group: log Σ of its 64 queries over every `splits`-th class."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16])
    i = first_query + WHICH * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, S))
    narrow_scale = scale.to(gl.float32)
    zero = gl.zeros([_HALF, BLOCK_N], gl.float32, S)
    mbarrier.wait(q_full, 0)
    q = q_smem.index(WHICH)
    taken = 0
    for c in range(first_class, C, splits):
        begin = gl.load(offsets + c)  # from here on rows are counted from the class's first
        rows = (gl.load(offsets + c + 1) - begin).to(gl.int32)
        own = _from(gl.load(index + i, mask=i < B, other=-1), begin)
        total = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, S))
        excess = total
        if rows > 0:
            next_own = gl.min(gl.where(own >= 0, own, _OUT_OF_SIGHT), 0)
            stage = taken % STAGES
            mbarrier.wait(full.index(stage), (taken // STAGES) & 1)
            s = warpgroup_mma(q, ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(stage))
            taken += 1
            for start in range(0, rows - BLOCK_N, BLOCK_N):
                stage = taken % STAGES
                mbarrier.wait(full.index(stage), (taken // STAGES) & 1)
                next_s = warpgroup_mma(q, ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
                w, next_own = _weigh(s, start, rows, next_own, own, narrow_scale, BLOCK_N, S)
                total, excess = _add(total, excess, w)
                s = warpgroup_mma_wait(0, deps=[next_s])
                mbarrier.arrive(empty.index(stage))
                taken += 1
            last = (rows - 1) // BLOCK_N * BLOCK_N
            w, next_own = _weigh(s, last, rows, next_own, own, narrow_scale, BLOCK_N, S)
            total, excess = _add(total, excess, w)
        log_mass = gl.log(total.to(gl.float64)) + scale * _LN_2
        gl.store(log_sums + c * B + i, log_mass, mask=i < B)


@gluon.jit(do_not_specialize=["B", "C", "splits"])
def class_log_sums(
    queries, bank,  # TMA descriptors of (B, D) and (N, D)
    index, offsets,
    log_sums,  # out (C, B)
    B, C, scale: gl.float64, splits,
    W: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As `kernels.class_log_sums`, of 16-bit banks and a fixed offset: no maximum is tracked."""
    program = gl.program_id(0).to(gl.int64)
    blocks = gl.cdiv(B, BLOCK_B)  # programs that stand together take the same rows, as in `stream`
    first_query = (program % blocks * BLOCK_B).to(gl.int32)
    first_class = program // blocks
    q_smem, ring, q_full, full, empty = _make_ring(queries, bank, BLOCK_B, BLOCK_N, W, STAGES)
    if BLOCK_B == 2 * _HALF:
        gl.warp_specialize([
            (_sum_classes, (q_smem, ring, q_full, full, empty, index, offsets, log_sums, first_query, first_class, B, C,
                            splits, scale, 0, BLOCK_N, STAGES, num_warps)),
            (_sum_classes, (q_smem, ring, q_full, full, empty, index, offsets, log_sums, first_query, first_class, B, C,
                            splits, scale, 1, BLOCK_N, STAGES, num_warps)),
            (_load_classes, (queries, bank, q_smem, ring, q_full, full, empty, offsets, first_query, first_class, C,
                             splits, BLOCK_B, BLOCK_N, STAGES)),
        ], [num_warps, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_sum_classes, (q_smem, ring, q_full, full, empty, index, offsets, log_sums, first_query, first_class, B, C,
                            splits, scale, 0, BLOCK_N, STAGES, num_warps)),
            (_load_classes, (queries, bank, q_smem, ring, q_full, full, empty, offsets, first_query, first_class, C,
                             splits, BLOCK_B, BLOCK_N, STAGES)),
        ], [1], [24])  # fmt: skip


def descriptors(queries: Tensor, bank: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """How TMA fetches 64 of the queries (B', D), and `rows` of the bank (N, D), whose rows may be apart."""
    width = hopper_width(queries.size(1))
    return _descriptor(queries, HALF, width), _descriptor(bank, rows, width)


def _descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, width], _layout(rows, width, x.dtype))


@cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, width], element)
