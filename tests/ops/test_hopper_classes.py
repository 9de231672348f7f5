"""The Hopper kernel of the sums over each of many classes, in any order of events, against their definition.

Shapes: B queries, C classes.
"""

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ops import hopper_model
from tests.ops.hopper_model import SOURCE, Block, Descriptor, Pointer

WIDTH = 64  # columns of a tile; that many rows are told apart
FAR = 2**30
SCALE = 3.0


@dataclass(frozen=True)
class Problem:
    """One program's part."""

    sizes: tuple[int, ...]
    """Rows of each class."""
    far: bool
    """Another program has a class of 2^30 rows that comes first."""
    half: int
    halves: int
    block: int
    missing: int
    """How many queries the last block, which is the program's, has less than others."""
    own: tuple[int, ...]
    """Each query's own row, counted from the first that is not far; others have none."""
    block_n: int
    stages: int
    split: int
    splits: int
    order: int

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *([FAR] if self.far else []), *self.sizes])

    @property
    def first(self) -> int:
        """The first class that the program sums: not the far one."""
        return max(self.split % self.splits, int(self.far))

    @property
    def B(self) -> int:
        queries = self.half * self.halves
        return (self.block + 1) * queries - self.missing % queries


problems = st.builds(
    Problem,
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).map(tuple).filter(lambda sizes: sum(sizes) <= 50),
    far=st.booleans(), half=st.integers(1, 3), halves=st.integers(1, 2), block=st.integers(0, 1),
    missing=st.integers(0, 5), own=st.tuples(*[st.integers(-9, 55)] * 12), block_n=st.sampled_from([1, 4, 8]),
    stages=st.integers(1, 5), split=st.integers(0, 3), splits=st.integers(2, 4), order=st.integers(0, 2**32 - 1),
)  # fmt: skip


def check(p: Problem, source: str = SOURCE) -> None:
    """Run the program and compare its sums with their definition; bank rows are unit vectors."""
    queries, begin = p.half * p.halves, FAR if p.far else 0
    N, C = int(p.offsets[-1]), len(p.offsets) - 1
    features = np.random.default_rng(p.order).uniform(-1, 1, (p.B, WIDTH))
    own = np.array(p.own[: p.B], np.int64)
    index = np.where((own >= 0) & (own < N - begin), own + begin, -1)
    log_sums = np.full((C, p.B), np.nan)
    blocks = p.block + 1
    hopper_model.run(
        hopper_model.load(source, p.half), Random(p.order), p.first * blocks + p.block, "class_log_sums",
        Descriptor(features, [p.half, WIDTH]), Descriptor(np.eye(N - begin, WIDTH), [p.block_n, WIDTH], begin),
        Pointer(index), Pointer(p.offsets), Pointer(log_sums.ravel()),
        p.B, C, np.asarray(SCALE / math.log(2)).view(Block), p.splits,
        W=WIDTH, BLOCK_B=queries, BLOCK_N=p.block_n, STAGES=p.stages, REGISTERS=240, num_warps=4,
    )  # fmt: skip

    expected = np.full((C, p.B), np.nan)
    row = np.arange(begin, N)
    for c in range(p.first, C, p.splits):
        inside = (row >= p.offsets[c]) & (row < p.offsets[c + 1])
        counts = inside & (row != index[:, None])
        weights = np.where(counts, np.exp(SCALE * features[:, : len(row)]), 0)
        with np.errstate(divide="ignore"):
            expected[c, p.block * queries :] = np.log(weights.sum(1))[p.block * queries :]
    np.testing.assert_allclose(log_sums, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@given(problems)
def test_each_query_gets_each_class_in_any_order_of_events(problem):
    check(problem)


_WAIT = "                s = warpgroup_mma_wait(0, deps=[next_s])\n"
_GIVE_BACK = "                mbarrier.arrive(empty.index(stage))\n"
BROKEN = {
    "a tile is given back before its product is done": (
        _WAIT + _GIVE_BACK,
        _GIVE_BACK + _WAIT,
    ),
    "a tile is not given back": (
        _WAIT + _GIVE_BACK,
        _WAIT,
    ),
    "the first tile of a class is not given back": (
        "            s = warpgroup_mma_wait(0, deps=[s])\n            mbarrier.arrive(empty.index(stage))\n",
        "            s = warpgroup_mma_wait(0, deps=[s])\n",
    ),
    "a product is used before it is waited for": (
        "w, next_own = _weigh(s, start, rows",
        "w, next_own = _weigh(next_s, start, rows",
    ),
    "a product is not waited for": ("s = warpgroup_mma_wait(0, deps=[next_s])", "s = next_s"),
    "a group does not wait for a tile": (
        "                mbarrier.wait(full.index(stage), (taken // STAGES) & 1)\n                next_s",
        "                next_s",
    ),
    "a group waits for the phase before": (
        "            mbarrier.wait(full.index(stage), (taken // STAGES) & 1)\n            s =",
        "            mbarrier.wait(full.index(stage), (taken // STAGES) & 1 ^ 1)\n            s =",
    ),
    "a group does not wait for the queries": ("    mbarrier.wait(q_full, 0)\n", ""),
    "tiles start anew with each class": (
        "        total = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, S))\n        excess = total\n",
        "        taken, excess = 0, gl.zeros([_HALF], gl.float32, S)\n        total = excess\n",
    ),
    "the loading warp takes classes that are others'": (
        "    taken = 0\n    for c in range(first_class, C, splits):\n        begin = gl.load(offsets + c)\n",
        "    taken = 0\n    for c in range(first_class, C):\n        begin = gl.load(offsets + c)\n",
    ),
    "the last tile is counted from the first": ("_weigh(s, last, rows", "_weigh(s, 0, rows"),
    "a last tile that is full is left out": (
        "for start in range(0, rows - BLOCK_N, BLOCK_N):",
        "for start in range(0, rows - BLOCK_N - 1, BLOCK_N):",
    ),
    "rows behind a class count": (" | (j >= stop)[None, :]", ""),
    "the query's own row counts": ("(j[None, :] == own[:, None]) | ", ""),
    "the next own row is not looked up": (
        "next_own = gl.min(gl.where(own >= 0, own",
        "next_own = gl.min(gl.where(own < 0, own + _OUT_OF_SIGHT",
    ),
    "own rows are not counted from the class": ("other=-1), begin)", "other=-1), begin * 0)"),
    "both groups sum the same queries": ("first_query + WHICH * _HALF", "first_query + 0 * _HALF"),
    "own rows are read past the last query": ("mask=i < B, other=-1", "mask=i < B + 1, other=-1"),
    "sums are written past the last query": ("log_mass, mask=i < B", "log_mass, mask=i <= B"),
    "rows are counted in 32 bits from the bank's first": (
        "        rows = (gl.load(offsets + c + 1) - begin).to(gl.int32)\n        for",
        "        rows = (gl.load(offsets + c + 1) * 4).to(gl.int32)\n        for",
    ),
    "the offset is lost": (" + scale * _LN_2", ""),
    "programs stand split by split": ("first_class = program // blocks", "first_class = program % blocks"),
}  # fmt: skip
"""The kernel's rules, each broken in one place."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_needed(rule):
    hopper_model.fail_without(*BROKEN[rule], check, problems)


def test_one_place_in_the_ring_is_enough():
    """A group gives a tile back before it asks for the next one: there is no second product."""
    check(
        Problem(
            sizes=(9, 0, 4), far=False, half=1, halves=2, block=0, missing=0, own=(3,) * 12, block_n=4, stages=1,
            split=0, splits=2, order=0,
        )
    )  # fmt: skip
