"""The walk of the Hopper kernel over the bank, in any order of events, against the definition of its sums."""

from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ops import hopper_model
from tests.ops.hopper_model import SOURCE, Descriptor, Fault, Pointer

WIDTH = 64  # columns of a tile; that many rows are told apart
SCALE = 3.0


@dataclass(frozen=True)
class Problem:
    """One program's part. Rows are counted from the split's first."""

    rows: int
    behind: int
    """Rows of the bank after the split."""
    split: int
    far: bool
    """The split begins at row 2^30."""
    half: int
    halves: int
    block: int
    cuts: tuple[int, ...]
    """Where classes end."""
    classes: tuple[int, ...]
    own: tuple[int, ...]
    """Of each query: its class, by number or −1 for none, and its row."""
    block_n: int
    stages: int
    fold_rows: int
    weighted: bool
    order: int

    @property
    def rows_per_split(self) -> int:
        return 2**30 if self.far else self.rows if self.behind else self.rows + 3

    @property
    def origin(self) -> int:
        return self.rows_per_split * (1 if self.far else self.split)

    @property
    def N(self) -> int:
        return self.origin + self.rows + (0 if self.far else self.behind)

    def neighbours(self) -> np.ndarray:
        """As `prepare` writes those of the block: class by class."""
        ends = sorted({0, self.N, *(min(max(self.origin + cut, 0), self.N) for cut in self.cuts)})
        queries = self.half * self.halves
        found = np.zeros((queries, 4), np.int64)
        for i, (label, own) in enumerate(zip(sorted(self.classes[:queries]), self.own, strict=False)):
            k = label % (len(ends) - 1)
            low, high = (ends[k], ends[k + 1]) if label >= 0 else (0, 0)
            found[i] = low, high, self.origin + own if 0 <= self.origin + own < self.N else -1, 0
        return found


problems = st.builds(
    Problem,
    rows=st.integers(1, 42), behind=st.integers(0, 8), split=st.integers(0, 2), far=st.booleans(),
    half=st.integers(1, 3), halves=st.integers(1, 2), block=st.integers(0, 1),
    cuts=st.lists(st.integers(-9, 50), max_size=8).map(tuple),
    classes=st.tuples(*[st.integers(-1, 9)] * 6), own=st.tuples(*[st.integers(-9, 50)] * 6),
    block_n=st.sampled_from([1, 4, 8]), stages=st.integers(2, 5), fold_rows=st.integers(1, 60),
    weighted=st.booleans(), order=st.integers(0, 2**32 - 1),
)  # fmt: skip


def check(p: Problem, source: str = SOURCE) -> None:
    """Run the program and compare its sums with their definition.

    Bank rows are unit vectors: of which rows a sum of them was made, and with which weights, can be read from it.
    """
    queries, random = p.half * p.halves, Random(p.order)
    bank = np.eye(p.N - p.origin, WIDTH)
    features = np.random.default_rng(p.order).uniform(-1, 1, (2 * queries, WIDTH))
    neighbours = np.full((2 * queries, 4), -(10**9))  # of the other block: never read
    neighbours[p.block * queries :][:queries] = p.neighbours()
    program = p.origin // p.rows_per_split * 2 + p.block
    slots = (program + 1, 2, queries)
    totals, vectors = np.full(slots, np.nan), np.full((*slots, WIDTH), np.nan)
    hopper_model.run(
        hopper_model.load(source, p.half), random, program, "stream",
        Descriptor(features, [p.half, WIDTH]), Descriptor(bank, [p.block_n, WIDTH], p.origin),
        Pointer(neighbours.ravel()), Pointer(totals.ravel()), Pointer(vectors.ravel()),
        2 * queries, p.N, SCALE, p.rows_per_split,
        D=WIDTH, W=WIDTH, BLOCK_B=queries, BLOCK_N=p.block_n, STAGES=p.stages, WEIGHTED=p.weighted,
        FOLD_ROWS=p.fold_rows, REGISTERS=240, num_warps=4,
    )  # fmt: skip

    low, high, own, _ = p.neighbours().T[:, :, None]
    row = p.origin + np.arange(p.rows)
    same = (low <= row) & (row < high)
    mine = features[p.block * queries :][:queries]
    weights = np.where(row == own, 0.0, np.exp2(SCALE * (mine[:, : p.rows] - 1)))
    expected = np.stack([np.where(same, 0.0, weights), np.where(same, weights, 0.0)])
    np.testing.assert_allclose(totals[-1], expected.sum(-1), rtol=1e-12)
    assert np.isnan(totals[:-1]).all()
    assert np.isnan(vectors[:-1]).all()
    if p.weighted:
        summed = totals[-1] != 0  # others are never read
        np.testing.assert_allclose(vectors[-1][summed][:, : p.rows], expected[summed], rtol=1e-12)
        assert not vectors[-1][summed][:, p.rows :].any()
    else:
        assert np.isnan(vectors).all()


@pytest.mark.slow
@given(problems)
def test_each_query_gets_each_row_once_in_any_order_of_events(problem):
    check(problem)


BROKEN = {
    "a tile is given back before its second product": (
        "                mbarrier.arrive(empty.index(before))\n",
        "                mbarrier.arrive(empty.index(stage))\n",
    ),
    "the last tile of a segment is not given back": (
        "            v = warpgroup_mma_wait(0, deps=[v])\n            mbarrier.arrive(empty.index(stage))\n",
        "            v = warpgroup_mma_wait(0, deps=[v])\n",
    ),
    "without vectors a tile is not given back": (
        "                mbarrier.arrive(empty.index(stage))\n                w, next_own",
        "                w, next_own",
    ),
    "without vectors the first tile of a segment is not given back": (
        "        if not WEIGHTED:\n            mbarrier.arrive(empty.index(stage))\n",
        "",
    ),
    "one group's arrival empties a tile": ("count=BLOCK_B // _HALF", "count=1"),
    "an arrival too many is waited for": ("count=BLOCK_B // _HALF", "count=BLOCK_B // _HALF + 1"),
    "the loading warp waits for the phase before": ("& 1) ^ 1)", "& 1))"),
    "the loading warp does not wait": (
        "    mbarrier.wait(empty.index(stage), ((taken // STAGES) & 1) ^ 1)  # passes in the first round\n",
        "",
    ),
    "a group waits for the phase before": (
        "            mbarrier.wait(full.index(stage), (taken // STAGES) & 1)\n            s =",
        "            mbarrier.wait(full.index(stage), (taken // STAGES) & 1 ^ 1)\n            s =",
    ),
    "phases do not alternate": ("(taken // STAGES) & 1)\n            s =", "0)\n            s ="),
    "a group does not wait for the queries": ("    mbarrier.wait(q_full, 0)\n", ""),
    "half of the queries are waited for": ("expect(q_full, BLOCK_B *", "expect(q_full, _HALF *"),
    "tiles start anew with each segment": (
        "        begin = stop\n    gl.store",
        "        begin, taken = stop, 0\n    gl.store",
    ),
    "the wrong product is waited for": ("warpgroup_mma_wait(1, deps=[s])", "warpgroup_mma_wait(2, deps=[s])"),
    "the weights meet the next tile": (
        "v = warpgroup_mma(p, ring.index(before)",
        "v = warpgroup_mma(p, ring.index(stage)",
    ),
    "no segment ends where a class begins": (
        "gl.minimum(gl.where(low > begin, low, _OUT_OF_SIGHT), gl.where(",
        "gl.minimum(_OUT_OF_SIGHT, gl.where(",
    ),
    "no segment ends where a class ends": (
        "gl.where(high > begin, high, _OUT_OF_SIGHT))",
        "_OUT_OF_SIGHT)",
    ),
    "the loading warp sees the ends of one group alone": (
        "_ranges(neighbours, origin, BLOCK_B, 1)",
        "_ranges(neighbours, origin, _HALF, 1)",
    ),
    "the other group's class ends are not seen": (
        "_ranges(neighbours, origin, BLOCK_B, WARPS)",
        "_ranges(neighbours + WHICH * _HALF * 4, origin, _HALF, WARPS)",
    ),
    "rows behind a segment count": (" | (j >= stop)[None, :]", ""),
    "the query's own row counts": ("(j[None, :] == own[:, None]) | ", ""),
    "the next own row is not looked up": (
        "next_own = gl.min(gl.where(own >= start + BLOCK_N, own, _OUT_OF_SIGHT), 0)",
        "next_own = _OUT_OF_SIGHT",
    ),
    "own rows of the other group are looked up": (
        "own = _from(gl.load(neighbours + i * 4 + _OWN), origin)",
        "own = _from(gl.load(neighbours + (i - WHICH * _HALF) * 4 + _OWN), origin)",
    ),
    "own rows before a segment are looked for": (
        "gl.where(own >= begin, own",
        "gl.where(own >= begin + BLOCK_N, own",
    ),
    "ranges that begin before the split are cut off": ("_OUT_OF_SIGHT), -1)", "_OUT_OF_SIGHT), 1)"),
    "rows are counted in 32 bits before they are near": ("(rows - origin, _OUT_OF_SIGHT)", "(rows, _OUT_OF_SIGHT)"),
    "a class's first row is the others'": ("(my_low <= begin)", "(my_low < begin)"),
    "a class's end is its own": ("(begin < my_high)", "(begin <= my_high)"),
    "a sum that is held is overwritten": ("held = gl.where(same, total_same, total_other) != 0", "held = total < 0"),
    "a sum that is not held is added to": ("held = gl.where(same, total_same, total_other) != 0", "held = total >= 0"),
    "the halves of columns change places": (
        "_fold(vectors, slot, held, left, FIRST, D, WARPS)",
        "_fold(vectors, slot, held, right, FIRST, D, WARPS)",
    ),
    "programs stand split by split": ("block = program % blocks", "block = program // blocks"),
    "the last split is as long as others": (
        "end = gl.minimum(rows_per_split, N - origin)",
        "end = (origin * 0 + rows_per_split)",
    ),
}  # fmt: skip
"""The kernel's rules, each broken in one place."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_needed(rule):
    hopper_model.fail_without(*BROKEN[rule], check, problems)


def test_one_place_in_the_ring_is_a_deadlock():
    """A group waits for tile t before it gives back tile t − 1."""
    problem = Problem(
        rows=9, behind=0, split=0, far=False, half=1, halves=2, block=0, cuts=(), classes=(0,) * 6, own=(3,) * 6,
        block_n=4, stages=1, fold_rows=20, weighted=True, order=0,
    )  # fmt: skip
    with pytest.raises(Fault, match="deadlock"):
        check(problem)
