"""Tile shapes are compared for the same sums, the table's block first, and beside the table's own shape."""

import math
import time
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from benchmarks import problems, providers, timing, tune
from ntdne_kernels.ops.gpu.configs import Config, Device


def test_every_tile_shape_sums_the_same():
    """What `benchmarks.tune time` compares."""
    problem = problems.make(20, 300, 24, 3, torch.float32)
    expected = providers.PROVIDERS["streaming"].prepare(problem, True)()[0]
    for config in (Config(16, 16, 4, 1, 1 << 14), Config(64, 32, 4, 2, 1 << 15)):
        log_p = tune.sum_with(config, problem)[0]
        torch.testing.assert_close(providers.ntdne(log_p.exp()), expected)


def test_shapes_of_the_tables_block_are_timed_first():
    device = Device(capability=90, multiprocessors=132, shared=227 << 10)
    chosen = Config(64, 128, 8, 3, 1 << 17)
    found = tune.shapes(device, "16-bit", 128, chosen)
    blocks = [config.block_b for config in found]
    assert set(blocks) == {16, 64, 128}
    assert blocks == sorted(blocks, key=lambda block: block != 64)
    assert chosen[:4] in {config[:4] for config in found}


def test_why_a_shape_does_not_run_is_said(monkeypatch):
    def too_large(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    shape = {"B": 20, "D": 16, "dtype": "float32", "device": "cpu"}
    assert tune.compiles(Config(16, 256, 4, 1, 1 << 14), **shape) is None  # few tiles for the interpreter
    monkeypatch.setattr(tune, "sum_with", too_large)
    assert "300000" in tune.compiles(Config(16, 16, 4, 1, 1 << 14), **shape)


def test_a_shape_is_timed_beside_the_tables(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 10})
    ratio, text = tune.beside(partial(time.sleep, 0.01), partial(time.sleep, 0.002), "cpu")
    assert 0.1 < ratio < 0.9
    assert text.startswith(f"{ratio:.3f} of the table's")
    assert tune.beside(partial(time.sleep, 0.01), partial(math.sqrt, -1), "cpu")[0] == math.inf
