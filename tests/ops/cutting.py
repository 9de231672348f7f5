"""Cuts small problems into as many pieces as large ones have: tiles, blocks of queries, splits, segments, rounds."""

import inspect

import pytest

from ntdne_kernels.ops import streaming
from ntdne_kernels.ops.backends import gpu


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles and query blocks also in a small archive."""
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", {"cpu": 7 * 64, "cuda": 7 * 64})
    monkeypatch.setattr(streaming, "QUERIES_PER_TILE", 4)


def small_pieces(patch: pytest.MonkeyPatch, splits: int, block_n: int = 16, fold_rows: int = 1 << 14) -> None:
    """Several blocks of queries, splits, tiles and segments also in a small archive."""
    patch.setattr(gpu.configs, "choose", lambda *_: gpu.configs.Config(16, block_n, 4, 2, 1 << 14))
    patch.setattr(gpu.configs, "split_count", lambda *_: splits)
    patch.setattr(gpu.launches, "FOLD_ROWS", fold_rows)
    patch.setattr(gpu.launches, "plan_of", inspect.unwrap(gpu.launches.plan_of))  # plans are kept beyond a test


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    """Several rounds of each loop over the batch or the columns also in a small problem."""
    original = gpu.launches.Launch.__init__

    def made(self, kernel, grid, **constants):
        original(self, kernel, grid, **constants | ({"BLOCK": 16} if "BLOCK" in constants else {}))

    patch.setattr(gpu.launches.Launch, "__init__", made)
    patch.setattr(gpu.launches, "plan_of", inspect.unwrap(gpu.launches.plan_of))
