"""How a launch is cut up: tile shapes for a device and a problem, and into how many splits the bank goes.

The tile shapes in configs.json were found offline by `python -m benchmarks.tune choose`, which takes none that
spills registers or needs more shared memory than the device has. Nothing is tuned in a training loop.

Shapes: B queries, N bank rows, D features.
"""

import json
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

SMALLEST_CAPABILITY = 80  # Triton has no tensor-core code for older cards
_SAFE = "86"  # the smallest shared memory of all: what fits there fits everywhere
TABLE = json.loads(Path(__file__).with_name("configs.json").read_text())
# The float32 precision setting cannot be read while tracing, so the limit is the one that holds for both modes.
_ARITHMETIC = {
    torch.float64: ("fp64",),
    torch.float32: ("ieee", "tf32"),
    torch.float16: ("16-bit",),
    torch.bfloat16: ("16-bit",),
}
_LARGEST_D = {
    (capability, dtype): min(max(map(int, kernel[a])) for kernel in kernels.values() for a in arithmetic)
    for capability, kernels in TABLE.items()
    for dtype, arithmetic in _ARITHMETIC.items()
}
# A program's start (queries, first tiles) and end (its sums, and their merge) cost about as much as this many tiles.
_TILES_PER_START = 4
_LARGEST_PARTIAL_SUMS = 32 << 20  # bytes
MERGE_WARPS = 4  # for the 16 KB of one query, of each of both sums


class Config(NamedTuple):
    """One entry of the table."""

    block_b: int
    """Queries per program."""
    block_n: int
    """Bank rows per tile."""
    num_warps: int
    num_stages: int
    """Tiles in flight."""
    shared: int
    """Bytes of shared memory that a program takes."""


class Device(NamedTuple):
    """What the choice depends on."""

    capability: int
    """90 for sm_90."""
    multiprocessors: int
    shared: int
    """Largest shared memory of a program, bytes."""


HOPPER = 90
"""The compute capability that the kernel of hopper.py is made for."""
# Bank rows per tile by columns: with more the sums of 64 queries do not fit the registers of a warp group.
_HOPPER_ROWS = {64: 128, 128: 128, 256: 64}
_HOPPER_RESERVED = 2 << 10  # bytes beside the tiles: barriers, and what reductions exchange


def hopper_width(D: int) -> int:
    """Columns of a tile that holds D: a power of two, of which a TMA copy fills those past D with 0."""
    return max(1 << (D - 1).bit_length(), 64)


def hopper_tiles(device: Device, D: int, B: int) -> Config | None:
    """Tiles of the kernel for Hopper GPUs, as many in flight as fit; None where the portable kernel is better.

    That is for up to 16 queries, for which its tensor-core instruction is four times too tall, and where more than a
    quarter of the columns would be filled up.
    """
    width = hopper_width(D)
    if device.capability != HOPPER or B <= 16 or width not in _HOPPER_ROWS or 4 * D < 3 * width or D % 8 != 0:
        return None
    block_b, rows = 64 if B <= 64 else 128, _HOPPER_ROWS[width]
    stages = (device.shared - _HOPPER_RESERVED - 2 * block_b * width) // (2 * rows * width)
    return Config(block_b, rows, 8, stages, device.shared)


def largest_D(capability: int, dtype: torch.dtype) -> int:
    """Columns of the widest bank of a dtype that a device has tiles for."""
    return _LARGEST_D[str(capability) if str(capability) in TABLE else _SAFE, dtype]


def columns(D: int) -> tuple[int, int]:
    """D1 + D2 ≥ D columns in two powers of two, or one and 0: 384 is 256 + 128 and not 512."""
    largest = 1 << (max(D, 16).bit_length() - 1)
    if largest >= D:
        return largest, 0
    rest = max(1 << (D - largest - 1).bit_length(), 16)
    return (largest, rest) if rest < largest else (2 * largest, 0)


def merge_blocks(D: int, element_size: int, splits: int) -> dict[str, int]:
    """What a program that merges splits holds at once: all columns of splits that make 16 KB."""
    BLOCK_D = 1 << (D - 1).bit_length()
    fitting = max((16 << 10) // (BLOCK_D * element_size), 1)
    return {"BLOCK_D": BLOCK_D, "BLOCK_K": min(fitting, 1 << (splits - 1).bit_length())}


@cache
def choose(device: Device, kernel: str, arithmetic: str, D: int, rows: int) -> Config:
    """Tiles for a kernel that keeps the sums of `rows` queries ("stream") or bank rows ("gradient").

    arithmetic is "16-bit", "tf32", "ieee" or "fp64". Of the entries that fit the device, the first whose block holds
    all rows, else the one of most. Batches up to 16, up to 64, and all larger ones share a block, so that a last,
    smaller batch seldom compiles anew.
    """
    by_width = TABLE.get(str(device.capability), TABLE[_SAFE])[kernel][arithmetic]
    width = min(int(width) for width in by_width if int(width) >= sum(columns(D)))
    entries = [Config(*entry) for entry in by_width[str(width)]]
    fitting = [entry for entry in entries if entry.shared <= device.shared]
    kept = "block_n" if kernel == "gradient" else "block_b"
    return next((entry for entry in fitting if getattr(entry, kept) >= rows), fitting[-1])


@cache
def split_count(device: Device, config: Config, B: int, N: int, D: int) -> int:
    """Into how many splits the bank goes: the fewest of those that take the least time.

    The device works in rounds of as many programs as it holds at once; every program of a round takes as long as its
    tiles and its start. With 2 blocks of queries on 132 multiprocessors, 66 splits fill one round; with 32 blocks 4
    splits do to 97 %. Partial sums are to stay small beside the bank.
    """
    blocks, tiles = ceil(B / config.block_b), ceil(N / config.block_n)
    # The kernels use all registers that 8 warps can have.
    per_multiprocessor = max(min(device.shared // config.shared, 8 // config.num_warps), 1)
    programs = device.multiprocessors * per_multiprocessor
    bytes_per_split = blocks * config.block_b * 2 * (D + 2) * 4
    least = ceil(N / (1 << 30))  # a split's rows are counted in 32 bits
    most = max(min(tiles, programs, _LARGEST_PARTIAL_SUMS // bytes_per_split), least)

    def time(splits: int) -> int:
        return ceil(blocks * splits / programs) * (ceil(tiles / splits) + _TILES_PER_START)

    return min(range(least, most + 1), key=time)


def class_tile(config: Config, N: int, C: int) -> int:
    """Bank rows per tile of a kernel that sums C classes of N rows one by one: no more than most of them have.

    None is wider than 64: a Hopper multiprocessor then holds two programs (82 KB and 120 registers each, at D = 128 in
    16 bits), of which one multiplies as the other exponentiates. That is the compiler's count, no measured time.
    """
    return min(1 << max((N // C).bit_length() - 1, 4), config.block_n, 64)
