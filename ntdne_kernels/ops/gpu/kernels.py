"""The kernels, and nothing else: what each program does with its tiles.

For queries f_i, bank rows f_j, x_ij = f_i·f_j·log2(e)/σ and an offset m_i, the sums of a query over any bank rows are
Σ_i = Σ_j 2^(x_ij − m_i) and v_i = Σ_j 2^(x_ij − m_i)·f_j. They are made once over the *other* classes' rows and once
over the rows of the query's own class, so that nothing cancels where p is near 1:

    1/p − 1        = Σ_other/Σ_same
    ∂log p_i/∂f_i  = (1 − p)·(v_same/Σ_same − v_other/Σ_other)/σ      = (μ_same − μ_all)/σ

A launch over the whole bank ends in these two, one over a part of it in log Σ and v/Σ of both sums.

The bank stands in class order, or is visited in it through `order`: a class is one range of rows, and queries stand
sorted by class. Between two ends of ranges no query changes from other to same, so a program sums such a *segment* as
any attention kernel would, without a look at labels, and adds it to the sum it belongs to. That costs one pass over the
bank, whether there are 2 classes, 45 or one; a second pass over the classes alone would be 1 + 1/C, a second
accumulator 1.5. Segments end in a ragged tile: where each query has a class of its own (C = N/2) that is up to
2·BLOCK_B tiles more per block of queries, on average 3 % at N = 10^6. Snapshots of one accumulator at the ends of a
range would spare adding segments up, and cancel log2(1/p) bits.

The sums over each of many classes need no vectors: one product, one exponential, and no label, for a program walks the
ranges one after the other with its tiles and writes each sum once. A class costs its ragged last tile and a start of
the pipeline: of 1000 rows a few percent, of 10 rows and less several times its products.

Fixed offset: unit rows bound x by log2(e)/σ, which is m. TRACKED: each of the two sums has its running maximum, for a
common one would lose Σ_same where the positives are far; the largest weight is 2^SHIFT, which keeps the smallest that
matter out of float16's subnormals.

Sums are float32 (float64 for a float64 bank). Tensor cores round them towards zero, an error that grows with the rows:
after at most FOLD_ROWS they are added to memory, to the nearest. Partial sums are merged in a fixed order, and no two
programs write one address: results are the same from run to run, bit for bit. Sizes that change from batch to batch are
not specialised on: a smaller batch compiles nothing anew.

Shapes: B queries, B' with those that fill the last block, N bank rows, D features, C classes, K splits of the bank. D
is cut into D1 + D2 columns, powers of two (384 = 256 + 128; D2 may be 0). Where a tile or a program's rows begin is
always a 64-bit offset.
"""

import math

import triton
import triton.language as tl

from ntdne_kernels.ops import losses as definition

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_SMALLEST_CHANCE = tl.constexpr(math.log(definition.SMALLEST_CHANCE))
LN_2 = tl.constexpr(0.6931471805599453)
OUT_OF_SIGHT = tl.constexpr(2**31 - 1)  # a row that no split reaches
BEHIND_ALL = tl.constexpr(2**62)  # a row of no bank
LOW, HIGH, OWN, SOURCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # columns of `neighbours`
# The interpreter holds bfloat16 as integers: it would multiply those, and cuts digits off instead of rounding them.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# A part of a kernel. The interpreter would set itself up anew at each call of a jitted one.
_part = (lambda function: function) if triton.knobs.runtime.interpret else triton.jit


@_part
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision=PRECISION)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@_part
def _rounded(x, dtype: tl.constexpr):
    """x in dtype, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@_part
def _operand(x, D: tl.constexpr, PRECISION: tl.constexpr):
    """x as a factor of a product: for TF32 rounded to its 10 bits as cuBLAS does; tensor cores would cut the rest off.

    Not of rows wider than 512, where that takes more registers than there are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32 and D <= 512:
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    return x


@_part
def _label_of(labels, images, image_labels, i, live, N, HAS_LABELS: tl.constexpr, LOOK_UP: tl.constexpr):
    """The labels of the queries i, −1 for none: those of their images where these are looked up, else those given."""
    label = tl.full(i.shape, -1, tl.int64)
    if HAS_LABELS:
        label = tl.load(labels + i, mask=live, other=-1)
    if LOOK_UP:
        image = tl.load(images + i, mask=live, other=-1)
        known = (image >= 0) & (image < N)
        label = tl.where(known, tl.load(image_labels + image, mask=known, other=-1), label)
    return label


@_part
def _search(classes, label, left, right, C, search_steps, BEHIND: tl.constexpr):
    """Place of the first of the ascending `classes` in [left, right) that is not below the label; BEHIND: above it."""
    for _ in range(search_steps):
        middle = (left + right) // 2
        here = tl.load(classes + middle, mask=middle < C, other=0)
        below = (left < right) & ((here <= label) if BEHIND else (here < label))
        right = tl.where(below, right, tl.maximum(middle, left))
        left = tl.where(below, middle + 1, left)
    return left


@triton.jit(do_not_specialize=["B", "N", "C", "search_steps"])
def prepare(
    features, labels, index, classes, offsets, position, image_labels,
    queries,  # out (B', D): the features in the bank's dtype, sorted by label where classes are ranges
    neighbours,  # out (B', 4): LOW and HIGH, the range of j of the query's class; OWN, j of the query itself; SOURCE,
    # which query stands here. Then, in a row: 0, where `merge_to_log_scores` counts the queries it finished, and for
    # each program how many queries count in a mean
    norms,  # out (B,): lengths of the features, 0 for those without a direction
    skipped,  # in and out: how many had none since the program started
    B, N, C, stride_b, stride_d, search_steps,
    D: tl.constexpr, SORTED_LABELS: tl.constexpr, GATHER: tl.constexpr, LOOK_UP: tl.constexpr,
    HAS_LABELS: tl.constexpr, SNCA: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries: their places in the order of labels, their classes' ranges, their own rows.

    SORTED_LABELS: `classes` are the labels of all rows, sorted, and a class is a run of them.
    LOOK_UP: `index` are images of an archive of N; their labels and rows are looked up, and features are normalised.
    The programs go on to the end of the last block of queries with features of 0 that have no class and no row.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = i < B
    label = _label_of(labels, index, image_labels, i, live, N, HAS_LABELS, LOOK_UP)
    itself = tl.load(index + i, mask=live, other=-1)
    before = tl.full((BLOCK_Q,), 0, tl.int32)
    for first in range(0, B, BLOCK):
        k = first + tl.arange(0, BLOCK)
        other = _label_of(labels, index, image_labels, k, k < B, N, HAS_LABELS, LOOK_UP)
        comes_first = (other[None, :] < label[:, None]) | (
            (other[None, :] == label[:, None]) & (k[None, :] < i[:, None])
        )
        before += tl.sum((comes_first & (k < B)[None, :]).to(tl.int32), 1)
    place = tl.where(live, before, i)

    if SORTED_LABELS:
        begin = _search(classes, label, i * 0, i * 0 + C, C, search_steps, False)
        stop = _search(classes, label, begin, i * 0 + C, C, search_steps, True)
        low = tl.where(live & (label >= 0), begin, 0)
        high = tl.where(live & (label >= 0), stop, 0)
    else:
        # Where the labels are 0, 1, 2, ... a class stands at its label, and nothing is searched.
        guess = tl.maximum(tl.minimum(label, C - 1), 0)
        at_guess = tl.load(classes + guess, mask=guess < C, other=-1) == label
        c = tl.where(at_guess, guess, 0)
        if tl.min(at_guess.to(tl.int32), 0) == 0:
            c = _search(classes, label, c, tl.where(at_guess, c, C), C, search_steps, False)
        found = live & (tl.load(classes + c, mask=c < C, other=-1) == label) & (label >= 0)
        low = tl.load(offsets + c, mask=found, other=0)
        high = tl.load(offsets + c + 1, mask=found, other=0)
    if GATHER or LOOK_UP:
        inside = (itself >= 0) & (itself < N)
        itself = tl.load(position + itself, mask=inside, other=-1)
    tl.store(neighbours + place * 4 + LOW, low)
    tl.store(neighbours + place * 4 + HIGH, high)
    tl.store(neighbours + place * 4 + OWN, itself)
    tl.store(neighbours + place * 4 + SOURCE, i)

    counted = live
    if SNCA:  # ignores queries without positives
        counted = counted & (high - low > ((low <= itself) & (itself < high)).to(tl.int64))
    norm = tl.full((BLOCK_Q,), 1, norms.dtype.element_ty)
    if LOOK_UP:
        squares = norm * 0
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            rows = _load_features(features, i, live, d, stride_b, stride_d, D).to(norm.dtype)
            squares += tl.sum(rows * rows, 1)
        norm = tl.sqrt(squares)
        directed = (norm >= SHORTEST) & (norm < float("inf"))  # not NaN
        undirected = tl.sum((live & (directed == 0)).to(tl.int64), 0)
        tl.atomic_add(skipped, undirected, mask=undirected > 0)
        tl.store(norms + i, tl.where(directed, norm, 0.0), mask=live)
        norm = tl.where(directed, norm, float("inf"))
        counted = counted & directed
    counts = neighbours + tl.num_programs(0) * (BLOCK_Q * 4)
    if tl.program_id(0) == 0:
        tl.store(counts, 0)
    tl.store(counts + 1 + tl.program_id(0), tl.sum(counted.to(tl.int64), 0))
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        rows = _load_features(features, i, live, d, stride_b, stride_d, D)
        if LOOK_UP:
            rows = tl.where(norm[:, None] == float("inf"), 0.0, rows.to(norm.dtype) / norm[:, None])
        tl.store(
            queries + place[:, None] * D + d[None, :], _rounded(rows, queries.dtype.element_ty), mask=(d < D)[None, :]
        )


@_part
def _load_features(features, i, live, d, stride_b, stride_d, D: tl.constexpr):
    """Columns d of the queries i of any strides; 0 past D and B."""
    pointers = features + i[:, None] * stride_b + d[None, :].to(tl.int64) * stride_d
    return tl.load(pointers, mask=(d < D)[None, :] & live[:, None], other=0.0)


@_part
def _load_queries(queries, i, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """(queries, WIDTH) columns from FIRST on; 0 past D."""
    d = FIRST + tl.arange(0, WIDTH)
    pointers = queries + (i[:, None] * D + d[None, :])
    if FIRST + WIDTH <= D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@_part
def _load_rows(base, row_offset, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """(rows, WIDTH) columns from FIRST on; 0 past D and where not inside."""
    d = FIRST + tl.arange(0, WIDTH)
    pointers = base + (row_offset[:, None] + d[None, :])
    if FIRST + WIDTH <= D:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@_part
def _from(rows, origin):
    """Bank rows counted from `origin`, in 32 bits; −1 for all before it, OUT_OF_SIGHT for those far behind it."""
    return tl.maximum(tl.minimum(rows - origin, OUT_OF_SIGHT), -1).to(tl.int32)


@_part
def _halves(v):
    """The left and the right half of the columns of v, without moving values between threads."""
    return tl.split(tl.permute(tl.reshape(v, (v.shape[0], 2, v.shape[1] // 2)), (0, 2, 1)))


@_part
def _fold(vectors, row, v, held, factor_held, factor_new, FIRST: tl.constexpr, D: tl.constexpr):
    """vectors[row] = factor_held·vectors[row] + factor_new·v in the columns from FIRST on; rows not held are empty.

    32 columns at a time: old and new values of more do not fit the registers.
    """
    WIDTH: tl.constexpr = v.shape[1]
    if WIDTH > 32:
        left, right = _halves(v)
        _fold(vectors, row, left, held, factor_held, factor_new, FIRST, D)
        _fold(vectors, row, right, held, factor_held, factor_new, FIRST + WIDTH // 2, D)
    else:
        d = tl.arange(0, WIDTH) + FIRST
        pointers = vectors + (row[:, None] * D + d[None, :])
        here = (d < D)[None, :]
        old = tl.load(pointers, mask=here & held[:, None], other=0.0)
        tl.store(pointers, old * factor_held[:, None] + v * factor_new[:, None], mask=here)


@triton.jit(do_not_specialize=["B", "N", "rows_per_split"])
def stream(
    queries, bank, order, neighbours,
    totals, maxima, vectors,  # out (K, blocks, 2, BLOCK_B), the same, (..., D): Σ, its maximum and v over the rows of
    # the other classes and over those of the query's class
    B, N, bank_stride, scale: tl.float64, rows_per_split,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr, TRACKED: tl.constexpr, SHIFT: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, FOLD_ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_B queries over one split of the bank."""
    # Programs that stand together take the same rows for other queries: all but one find them in the L2 cache.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(B, BLOCK_B)
    split = program // blocks
    block = program % blocks
    first = block * BLOCK_B
    i = tl.arange(0, BLOCK_B)  # from here on queries are counted from `first`
    neighbours += first * 4
    queries += first * D
    q1 = _operand(_load_queries(queries, i, 0, D1, D), D, PRECISION)
    q2 = q1
    if D2 > 0:
        q2 = _operand(_load_queries(queries, i, D1, D2, D), D, PRECISION)
    scale = tl.full((), scale, totals.dtype.element_ty)

    zeros = tl.full((BLOCK_B,), 0, totals.dtype.element_ty)
    first_slot = (split * blocks + block) * 2 * BLOCK_B
    totals += first_slot
    maxima += first_slot
    vectors += first_slot * D
    for slots in tl.static_range(0, 2 * BLOCK_B, BLOCK_B):
        tl.store(totals + slots + i, zeros)
        if TRACKED:
            tl.store(maxima + slots + i, zeros - float("inf"))

    # From here on bank rows are counted from the split's first, in 32 bits: 64 would spill registers.
    origin = split * rows_per_split
    end = tl.minimum(rows_per_split, N - origin).to(tl.int32)
    far_stride = origin * 0 + bank_stride  # 64 bits
    if GATHER:
        order += origin
    else:
        bank += origin * far_stride
    begin = end * 0
    while begin < end:
        stop = tl.minimum(end, begin + FOLD_ROWS)
        # Up to the next end of a range no query changes from other to same or back.
        my_low = _from(tl.load(neighbours + i * 4 + LOW), origin)
        my_high = _from(tl.load(neighbours + i * 4 + HIGH), origin)
        next_end = tl.minimum(
            tl.where(my_low > begin, my_low, OUT_OF_SIGHT), tl.where(my_high > begin, my_high, OUT_OF_SIGHT)
        )
        stop = tl.minimum(stop, tl.min(next_end, 0))
        my_row = _from(tl.load(neighbours + i * 4 + OWN), origin)
        next_own = tl.min(tl.where(my_row >= begin, my_row, OUT_OF_SIGHT), 0)

        total = zeros
        maximum = zeros - float("inf")
        v1 = tl.full((BLOCK_B, D1), 0, zeros.dtype)
        v2 = v1
        if D2 > 0:
            v2 = tl.full((BLOCK_B, D2), 0, zeros.dtype)
        for start in tl.range(begin, stop, BLOCK_N):
            j = tl.arange(0, BLOCK_N)
            inside = j < stop - start
            tile = bank
            row = j * bank_stride
            if GATHER:
                row = tl.load(order + start + j, mask=inside, other=0) * bank_stride
            else:
                tile += start * far_stride
            t1 = _operand(_load_rows(tile, row, inside, 0, D1, D), D, PRECISION)
            t2 = t1
            x = _dot(q1, tl.trans(t1), tl.full((BLOCK_B, BLOCK_N), 0, zeros.dtype), PRECISION)
            if D2 > 0:
                t2 = _operand(_load_rows(tile, row, inside, D1, D2, D), D, PRECISION)
                x = _dot(q2, tl.trans(t2), x, PRECISION)
            # Most tiles hold no query's own row and end before the segment does: they need no mask.
            if start + BLOCK_N > tl.minimum(stop, next_own):
                my_row = _from(tl.load(neighbours + i * 4 + OWN), origin)
                x = tl.where((start + j)[None, :] == my_row[:, None], float("-inf"), x)
                x = tl.where(inside[None, :], x, float("-inf"))
                next_own = tl.min(tl.where(my_row >= start + BLOCK_N, my_row, OUT_OF_SIGHT), 0)
            if TRACKED:
                raised = tl.maximum(maximum, tl.max(x, 1) * scale)
                offset = tl.where(raised == float("-inf"), 0.0, raised - SHIFT)  # all masked: no −inf − (−inf)
                shrink = tl.exp2(maximum - SHIFT - offset)
                maximum = raised
                total *= shrink
                if WEIGHTED:
                    v1 *= shrink[:, None]
                    if D2 > 0:
                        v2 *= shrink[:, None]
                weights = tl.exp2(x * scale - offset[:, None])
            else:
                weights = tl.exp2(x * scale - scale)
            total += tl.sum(weights, 1)
            if WEIGHTED:
                rounded = _operand(_rounded(weights, t1.dtype), D, PRECISION)
                v1 = _dot(rounded, t1, v1, PRECISION)
                if D2 > 0:
                    v2 = _dot(rounded, t2, v2, PRECISION)

        tl.debug_barrier()  # what other threads of this program wrote is read now
        my_low = _from(tl.load(neighbours + i * 4 + LOW), origin)
        my_high = _from(tl.load(neighbours + i * 4 + HIGH), origin)
        slot = i + tl.where((my_low <= begin) & (begin < my_high), BLOCK_B, 0)
        held = tl.load(totals + slot)
        factor_held = zeros + 1.0
        factor_new = factor_held
        if TRACKED:
            before = tl.load(maxima + slot)
            raised = tl.maximum(before, maximum)
            offset = tl.where(raised == float("-inf"), 0.0, raised)
            factor_held = tl.exp2(before - offset)
            factor_new = tl.exp2(maximum - offset)
        tl.debug_barrier()  # several threads read one element: all have, before one of them writes
        if TRACKED:
            tl.store(maxima + slot, raised)
        tl.store(totals + slot, held * factor_held + total * factor_new)
        if WEIGHTED:
            _fold(vectors, slot, v1, held != 0, factor_held, factor_new, 0, D)
            if D2 > 0:
                _fold(vectors, slot, v2, held != 0, factor_held, factor_new, D1, D)
        begin = stop


@_part
def _merged(
    totals, maxima, vectors, i, B, scale, splits, d,
    D: tl.constexpr, BLOCK_B: tl.constexpr, TRACKED: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ, its maximum, and μ = v/Σ of the query at place i: of its class's rows, then of the others'; 0 of no row.

    Both sums are read in one loop, and which slots are empty is read ahead: what the loop waits for is memory.
    """
    k = tl.arange(0, BLOCK_K)
    first = i // BLOCK_B * 2 * BLOCK_B + i % BLOCK_B
    stride = (first * 0 + tl.cdiv(B, BLOCK_B)) * 2 * BLOCK_B
    zero = tl.full((), 0, totals.dtype.element_ty)
    total_other, total_same = zero, zero
    v_other = tl.full(d.shape, 0, totals.dtype.element_ty)
    v_same = v_other
    highest_other, highest_same = zero - float("inf"), zero - float("inf")
    if TRACKED:
        for split in range(0, splits, BLOCK_K):
            slot = first + (split + k) * stride
            here = split + k < splits
            maximum = tl.load(maxima + slot, mask=here, other=float("-inf"))
            highest_other = tl.maximum(highest_other, tl.max(maximum, 0))
            maximum = tl.load(maxima + slot + BLOCK_B, mask=here, other=float("-inf"))
            highest_same = tl.maximum(highest_same, tl.max(maximum, 0))
    slot = first + k * stride
    next_other = tl.load(totals + slot, mask=k < splits, other=0.0)
    next_same = tl.load(totals + slot + BLOCK_B, mask=k < splits, other=0.0)
    for split in range(0, splits, BLOCK_K):
        part_other, part_same = next_other, next_same
        slot = first + (split + k) * stride
        if WEIGHTED:
            pointers = vectors + slot[:, None] * D + d[None, :]
            inside = (d < D)[None, :]
            # The vector of an empty slot was never written.
            rows_other = tl.load(pointers, mask=(part_other != 0)[:, None] & inside, other=0.0)
            rows_same = tl.load(pointers + BLOCK_B * D, mask=(part_same != 0)[:, None] & inside, other=0.0)
        following = split + BLOCK_K + k
        next_slot = first + following * stride
        next_other = tl.load(totals + next_slot, mask=following < splits, other=0.0)
        next_same = tl.load(totals + next_slot + BLOCK_B, mask=following < splits, other=0.0)
        factor_other = tl.full((BLOCK_K,), 1.0, zero.dtype)
        factor_same = factor_other
        if TRACKED:
            here = split + k < splits
            factor_other = _relative(maxima + slot, here, highest_other)
            factor_same = _relative(maxima + slot + BLOCK_B, here, highest_same)
        total_other += tl.sum(part_other * factor_other, 0)
        total_same += tl.sum(part_same * factor_same, 0)
        if WEIGHTED:
            v_other += tl.sum(rows_other * factor_other[:, None], 0)
            v_same += tl.sum(rows_same * factor_same[:, None], 0)
    mean_same = v_same / tl.where(total_same != 0, total_same, 1.0)
    mean_other = v_other / tl.where(total_other != 0, total_other, 1.0)
    return total_same.to(tl.float64), total_other.to(tl.float64), highest_same, highest_other, mean_same, mean_other


@_part
def _relative(maxima, here, highest):
    """2^(maximum − highest) of the slots, 0 of those without rows."""
    maximum = tl.load(maxima, mask=here, other=float("-inf"))
    return tl.where(maximum == float("-inf"), 0.0, tl.exp2(maximum - highest))


@_part
def _log_of(total, highest, scale, TRACKED: tl.constexpr, SHIFT: tl.constexpr):
    """log Σ in float64: the GPU's fast float32 logarithm is wrong by 2e-7 near 1."""
    offset = scale
    if TRACKED:
        offset = tl.where(total != 0, (highest - SHIFT).to(tl.float64), 0.0)
    return tl.log(total) + offset * LN_2


@triton.jit(do_not_specialize=["B", "N", "splits"])
def merge_to_log_scores(
    totals, maxima, vectors, neighbours,
    log_p,  # out (B,)
    gradient,  # out (B, D): of each query's loss in a mean or a sum; for no loss of log p
    log_sum_all,  # out (B,)
    index, scores, features, norms,
    value,  # out (B,), or one number: the loss
    slope,  # out (B,): dL/dlog p
    losses,  # out (B,): of each query
    B, N, stride_b, stride_d, scale: tl.float64, splits, q: tl.float64, log_k: tl.float64, pruned_loss: tl.float64,
    unit: tl.float64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, TRACKED: tl.constexpr, SHIFT: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr, LOSS: tl.constexpr, PRUNING: tl.constexpr, INDICATOR: tl.constexpr,
    REDUCTION: tl.constexpr, LOOK_UP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query over the whole bank: log p, log Σ_all, its loss, and the gradient of that.

    LOSS is "ntdne" (eq. 9, 13), divided by `unit`·c^q as in `losses.in_units` where `unit` is not 0, "snca" (eq. 5), or
    "" for none. LOOK_UP: the gradient is that of the features before they were normalised. The last program to finish
    reduces the losses, in the order of the batch.
    """
    i = tl.program_id(0).to(tl.int64)
    out = tl.load(neighbours + i * 4 + SOURCE)
    d = tl.arange(0, BLOCK_D)
    same, other, highest_same, highest_other, mean_same, mean_other = _merged(
        totals, maxima, vectors, i, B, scale, splits, d, D, BLOCK_B, TRACKED, SHIFT, WEIGHTED, BLOCK_K
    )
    has_positive = same != 0  # NaN counts, and stays NaN
    # log p = −log(1 + Σ_other/Σ_same); log Σ_all = log(Σ_same + Σ_other)
    if TRACKED:
        log_same = _log_of(same, highest_same, scale, TRACKED, SHIFT)
        log_other = _log_of(other, highest_other, scale, TRACKED, SHIFT)
        log_odds = log_other - log_same
        rest = tl.log(1.0 + tl.exp(-tl.abs(log_odds)))
        score = -(tl.maximum(log_odds, 0.0) + rest)
        log_all = tl.where(has_positive, tl.maximum(log_same, log_other) + rest, log_other)
        one_minus_p = 1.0 / (1.0 + tl.exp(-log_odds))
    else:  # the sums have one offset: float64 logarithms and exponentials take most of a program's time
        score = -tl.log(1.0 + other / tl.where(has_positive, same, 1.0))
        log_all = _log_of(same + other, highest_same, scale, TRACKED, SHIFT)
        one_minus_p = other / (same + other)
    score = tl.where(has_positive, score, float("-inf"))
    norm = tl.full((), 1, norms.dtype.element_ty)
    if LOOK_UP:
        norm = tl.load(norms + out)
        score = tl.where(norm != 0, score, float("nan"))
    rounded_score = score.to(log_p.dtype.element_ty)
    tl.store(log_p + out, rounded_score)
    tl.store(log_sum_all + out, log_all.to(log_sum_all.dtype.element_ty))
    derivative = scale * 0 + 1.0
    counts = neighbours + tl.cdiv(B, BLOCK_B) * (BLOCK_B * 4)
    if LOSS != "":
        x = rounded_score.to(tl.float64)
        counted = norm != 0
        if LOSS == "snca":
            counted = counted & has_positive
            loss = -x
            derivative = x * 0 - 1.0
        else:
            others = tl.load(neighbours + i * 4 + HIGH) - tl.load(neighbours + i * 4 + LOW) - 1
            log_chance = tl.log(others.to(tl.float64) / tl.maximum(N - 1, 1).to(tl.float64))
            u = x * q
            # For small u the difference loses digits and three terms of its series suffice.
            loss = tl.where(u > -1e-5, -u * (1.0 + u / 2.0 * (1.0 + u / 3.0)), 1.0 - tl.exp(u)) / q
            derivative = -tl.exp(u)
            if PRUNING:
                pruned = x <= log_k
                if INDICATOR != "current":
                    image = tl.load(index + out)
                    known = (image >= 0) & (image < N)
                    stored = tl.load(scores + image, mask=known, other=0.0).to(tl.float64)
                    threshold = log_k
                    if INDICATOR == "auto":
                        threshold = log_chance
                    pruned = tl.where(known, stored <= threshold, pruned)  # NaN, never scored, is kept
                loss = tl.where(pruned, pruned_loss, loss)
                derivative = tl.where(pruned, 0.0, derivative)
            if unit > 0:
                per_unit = tl.exp(-q * tl.maximum(log_chance, x * 0 + LOG_SMALLEST_CHANCE)) / unit
                per_unit = tl.where(others > 0, per_unit, 1.0)
                loss *= per_unit
                derivative *= per_unit
        loss = tl.where(counted, loss, 0.0)
        derivative = tl.where(counted, derivative, 0.0)
        divisor = scale * 0 + 1.0
        if REDUCTION == "mean":
            kept = tl.full((BLOCK,), 0, tl.int64)
            for begin in range(0, tl.cdiv(B, BLOCK_Q), BLOCK):
                program = begin + tl.arange(0, BLOCK)
                kept += tl.load(counts + 1 + program, mask=program < tl.cdiv(B, BLOCK_Q), other=0)
            divisor = tl.maximum(tl.sum(kept, 0), 1).to(tl.float64)
            derivative /= divisor
        tl.store(slope + out, derivative.to(slope.dtype.element_ty))
    if WEIGHTED:
        factor = derivative * one_minus_p * scale * LN_2  # scale·ln 2 = 1/σ
        row = (mean_same - mean_other) * factor.to(mean_same.dtype)
        if LOOK_UP:  # of f = x/|x| the gradient of x is (g − (g·f)f)/|x|
            x = tl.load(features + out * stride_b + d.to(tl.int64) * stride_d, mask=d < D, other=0.0)
            unit = x.to(row.dtype) / norm
            row = (row - tl.sum(row * unit, 0) * unit) / norm
        tl.store(gradient + out * D + d, tl.where(has_positive & (norm != 0), row, 0.0), mask=d < D)
    if LOSS != "" and REDUCTION == "none":
        tl.store(value + out, loss.to(value.dtype.element_ty))
    elif LOSS != "":
        tl.store(losses + out, loss)
        tl.debug_barrier()  # another thread may have written that
        if tl.atomic_add(counts, 1, sem="acq_rel") == B - 1:
            total = tl.full((BLOCK,), 0, tl.float64)
            directed = tl.full((BLOCK,), 0, tl.int32)
            for begin in range(0, B, BLOCK):
                j = begin + tl.arange(0, BLOCK)
                total += tl.load(losses + j, mask=j < B, other=0.0, cache_modifier=".cg")
                if LOOK_UP:
                    directed += (tl.load(norms + j, mask=j < B, other=0.0) != 0).to(tl.int32)
            reduced = tl.sum(total, 0) / divisor
            if LOOK_UP:  # of no feature that has a direction: an encoder that diverged must not train on in silence
                reduced = tl.where(tl.sum(directed, 0) == 0, float("nan"), reduced)
            tl.store(value, reduced.to(value.dtype.element_ty))


@triton.jit(do_not_specialize=["B", "splits"])
def merge_to_class_sums(
    totals, maxima, vectors, neighbours,
    log_same, log_other, mean_same, mean_other,  # out (B,), (B,), (B, D), (B, D)
    B, scale: tl.float64, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, TRACKED: tl.constexpr, SHIFT: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query over a part of the bank: log Σ and μ of both sums, from which parts are merged."""
    i = tl.program_id(0).to(tl.int64)
    out = tl.load(neighbours + i * 4 + SOURCE)
    d = tl.arange(0, BLOCK_D)
    same, other, highest_same, highest_other, row_same, row_other = _merged(
        totals, maxima, vectors, i, B, scale, splits, d, D, BLOCK_B, TRACKED, SHIFT, WEIGHTED, BLOCK_K
    )
    tl.store(log_same + out, _log_of(same, highest_same, scale, TRACKED, SHIFT))
    tl.store(log_other + out, _log_of(other, highest_other, scale, TRACKED, SHIFT))
    if WEIGHTED:
        tl.store(mean_same + out * D + d, row_same, mask=d < D)
        tl.store(mean_other + out * D + d, row_other, mask=d < D)


@triton.jit(do_not_specialize=["B", "N"])
def record(
    log_p, index, image_labels,
    scores,  # in and out (N,)
    B, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores of BLOCK queries, remembered for their images: of an image given twice the higher one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = tl.load(index + i, mask=i < B, other=-1)
    known = (image >= 0) & (image < N)
    labelled = tl.load(image_labels + image, mask=known, other=-1) >= 0
    highest = tl.full((BLOCK,), float("nan"), log_p.dtype.element_ty)
    for first in range(0, B, 64):
        k = first + tl.arange(0, 64)
        score = tl.load(log_p + k, mask=k < B, other=float("nan"))
        same = tl.load(index + k, mask=k < B, other=-2)[None, :] == image[:, None]
        here = tl.where(same & (score == score)[None, :], score[None, :], float("-inf"))
        seen = tl.max((same & (score == score)[None, :]).to(tl.int32), 1) > 0
        before = tl.where(highest == highest, highest, float("-inf"))
        highest = tl.where(seen, tl.maximum(before, tl.max(here, 1)), highest)
    tl.store(scores + image, highest.to(scores.dtype.element_ty), mask=known & labelled & (highest == highest))


@_part
def _within(value, start, LENGTH: tl.constexpr):
    """value − start, kept in [−1, LENGTH] for 32-bit comparisons with a tile's columns: 64-bit ones spill registers."""
    return tl.maximum(tl.minimum(value - start, LENGTH), -1).to(tl.int32)


@triton.jit(do_not_specialize=["B", "N"])
def gradient_to_bank(
    queries, bank, order, neighbours, log_p, log_sum_all, grad_log_p,
    gradient,  # out (N, D)
    B, N, bank_stride, scale: tl.float64, sigma: tl.float64,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N bank rows: Σ_i g_i/σ·([same]·p̃_ij − p_ij)·f_i over all queries, in their order (eq. 7)."""
    accumulator: tl.constexpr = log_p.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    j = tl.arange(0, BLOCK_N)
    inside = j < tl.minimum(N - start, BLOCK_N).to(tl.int32)
    row = start + j
    if GATHER:
        row = tl.load(order + row, mask=inside, other=0)
    t1 = _load_rows(bank, row * bank_stride, inside, 0, D1, D)
    t2 = t1
    g1 = tl.full((BLOCK_N, D1), 0, accumulator)
    g2 = g1
    if D2 > 0:
        t2 = _load_rows(bank, row * bank_stride, inside, D1, D2, D)
        g2 = tl.full((BLOCK_N, D2), 0, accumulator)
    scale = tl.full((), scale, accumulator)
    sigma = tl.full((), sigma, accumulator)
    for first in tl.range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B).to(tl.int64)
        query = tl.load(neighbours + i * 4 + SOURCE)
        score = tl.load(log_p + query, mask=i < B, other=float("-inf"))
        live = score != float("-inf")  # without positives a query has no gradient, and its sums may be empty
        log_all = tl.load(log_sum_all + query, mask=live, other=0.0)
        upstream = tl.load(grad_log_p + query, mask=live, other=0.0) / sigma
        q1 = _load_queries(queries, i, 0, D1, D)
        q2 = q1
        x = _dot(q1, tl.trans(t1), tl.full((BLOCK_B, BLOCK_N), 0, accumulator), PRECISION)
        if D2 > 0:
            q2 = _load_queries(queries, i, D1, D2, D)
            x = _dot(q2, tl.trans(t2), x, PRECISION)
        x *= scale
        my_row = tl.load(neighbours + i * 4 + OWN)
        my_low = tl.load(neighbours + i * 4 + LOW)
        my_high = tl.load(neighbours + i * 4 + HIGH)
        begin = _within(my_low, start, BLOCK_N)
        stop = _within(my_high, start, BLOCK_N)
        same = (j[None, :] >= begin[:, None]) & (j[None, :] < stop[:, None])
        counts = live[:, None] & inside[None, :] & (j[None, :] != _within(my_row, start, BLOCK_N)[:, None])
        # p̃_ij − p_ij = p̃_ij·(1 − p_i) in the query's class, −p_ij elsewhere
        log_sum = tl.where(same, ((log_all + score) * LOG2_E)[:, None], (log_all * LOG2_E)[:, None])
        one_minus_p = tl.where(score > -1e-4, -score * (1.0 + score / 2.0 * (1.0 + score / 3.0)), 1.0 - tl.exp(score))
        share = tl.where(same, (upstream * one_minus_p)[:, None], -upstream[:, None])
        weights = tl.where(counts, tl.exp2(x - log_sum) * share, 0.0)
        # The weights have both signs and any size, which 16 bits would round or lose: they meet the queries as TF32.
        g1 = _dot(tl.trans(weights), q1.to(accumulator), g1, PRECISION)
        if D2 > 0:
            g2 = _dot(tl.trans(weights), q2.to(accumulator), g2, PRECISION)
    d = tl.arange(0, D1)
    here = inside[:, None] & (d < D)[None, :]
    tl.store(gradient + row[:, None] * D + d[None, :], _rounded(g1, gradient.dtype.element_ty), mask=here)
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        here = inside[:, None] & (d < D)[None, :]
        tl.store(gradient + row[:, None] * D + d[None, :], _rounded(g2, gradient.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["B", "C", "splits"])
def class_log_sums(
    features, bank, index, offsets,
    log_sums,  # out (C, B)
    B, C, features_stride, bank_stride, scale: tl.float64, splits,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    TRACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log Σ of BLOCK_B queries over the rows of every `splits`-th class, one class after the other."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(B, BLOCK_B)  # programs that stand together take the same rows, as in `stream`
    first = program % blocks * BLOCK_B
    i = tl.arange(0, BLOCK_B)  # from here on queries are counted from `first`
    live = i < B - first
    features += first * features_stride
    index += first
    log_sums += first
    q1 = _operand(_load_rows(features, i * features_stride, live, 0, D1, D), D, PRECISION)
    q2 = q1
    if D2 > 0:
        q2 = _operand(_load_rows(features, i * features_stride, live, D1, D2, D), D, PRECISION)
    accumulator: tl.constexpr = tl.float64 if q1.dtype == tl.float64 else tl.float32
    zeros = tl.full((BLOCK_B,), 0, accumulator)
    narrow_scale = tl.full((), scale, accumulator)
    far_stride = first * 0 + bank_stride  # 64 bits

    next_own = first * 0  # the tiles up to here hold no query's own row
    for c in range(program // blocks, C, splits):
        begin = tl.load(offsets + c)
        end = tl.load(offsets + c + 1)
        total = zeros
        # By how much rounding has raised the total: a sum of 40,000 rows was wrong by 1.5e-6 without it, 4e-8 with it.
        excess = zeros
        maximum = zeros - float("inf")
        for start in tl.range(begin, end, BLOCK_N):
            j = tl.arange(0, BLOCK_N)
            inside = j < tl.minimum(end - start, BLOCK_N).to(tl.int32)
            tile = bank + start * far_stride
            t = _operand(_load_rows(tile, j * bank_stride, inside, 0, D1, D), D, PRECISION)
            s = _dot(q1, tl.trans(t), tl.full((BLOCK_B, BLOCK_N), 0, accumulator), PRECISION)
            if D2 > 0:
                t = _operand(_load_rows(tile, j * bank_stride, inside, D1, D2, D), D, PRECISION)
                s = _dot(q2, tl.trans(t), s, PRECISION)
            if start + BLOCK_N > tl.minimum(end, next_own):
                my_row = tl.load(index + i, mask=live, other=-1)
                s = tl.where(j[None, :] == _within(my_row, start, BLOCK_N)[:, None], float("-inf"), s)
                s = tl.where(inside[None, :], s, float("-inf"))
                stop = tl.minimum(start + BLOCK_N, end)
                next_own = tl.min(tl.where(my_row >= stop, my_row, BEHIND_ALL), 0)
            if TRACKED:
                raised = tl.maximum(maximum, tl.max(s, 1))
                offset = tl.where(raised == float("-inf"), 0.0, raised)  # all masked: no −inf − (−inf)
                shrink = tl.exp2((maximum - offset) * narrow_scale)
                maximum = raised
                total *= shrink
                excess *= shrink
                weights = tl.exp2((s - offset[:, None]) * narrow_scale)
            else:
                weights = tl.exp2(s * narrow_scale - narrow_scale)
            part = tl.sum(weights, 1) - excess
            rounded = total + part
            excess = (rounded - total) - part
            total = rounded
        offset = maximum if TRACKED else zeros + 1.0
        log_mass = tl.log(total.to(tl.float64)) + offset.to(tl.float64) * (scale * LN_2)
        tl.store(log_sums + c * B + i, log_mass, mask=live)
