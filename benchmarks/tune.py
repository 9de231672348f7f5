"""Choose the tile shapes in ntdne_kernels/ops/gpu/configs.json.

python -m benchmarks.tune choose [CAPABILITY ...]    into the table, for GPUs that need not be here
python -m benchmarks.tune time B N D DTYPE           on the GPU that is here: each shape that fits, beside the table's

`choose` takes for each GPU generation, arithmetic, width of D and block of queries the first shape of an order of
preference that spills no register and fits the shared memory in every variant of the kernel. What `time` finds to be
better belongs into that order, which `candidates` is.

Shapes: B queries, N bank rows, D features.
"""

import itertools
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.errors import OutOfResources

from benchmarks import problems, providers, timing
from benchmarks.aot import KERNELS, SHARED_LIMIT, checks, compile_for
from ntdne_kernels.ops import gpu as backend
from ntdne_kernels.ops.gpu import configs, launches
from ntdne_kernels.ops.gpu.configs import Config
from ntdne_kernels.ops.schema import Batch

TABLE = Path(configs.__file__).with_name("configs.json")
CAPABILITIES = (80, 86, 90, 100)  # 89 has what 86 has
WIDTHS = {"16-bit": (128, 256, 512, 1024), "tf32": (128, 256, 512, 1024), "ieee": (128, 512, 1024), "fp64": (128, 256)}
BLOCKS = {"16-bit": (16, 64, 128), "tf32": (16, 64, 128), "ieee": (16, 64), "fp64": (16,)}
ARITHMETIC = {"bfloat16": "16-bit", "float16": "16-bit", "float32": "ieee", "tf32": "tf32"}
"""By the names of `providers.DTYPES`."""
ELEMENT_BYTES = {"16-bit": 2, "tf32": 4, "ieee": 4, "fp64": 8}


def candidates(kernel: str, capability: int, arithmetic: str, width: int, block: int) -> list[Config]:
    """In the order of preference: tiles in flight, wide tiles, one group of warps for 64 queries and two for more."""
    lengths = (128, 64, 32, 16) if arithmetic in ("16-bit", "tf32") else (64, 32, 16)
    warps = (8, 4) if block == 128 else (4, 8)
    if arithmetic in ("ieee", "fp64") and width > 128:
        lengths = lengths[-2:]  # others take minutes to compile; of float64 294 KB of shared memory with triton 3.6
    found = []
    for in_flight, length, w, stages in itertools.product((True, False), lengths, warps, (3, 2, 1)):
        shared = (max(stages - 1, 1) * length + block) * width * ELEMENT_BYTES[arithmetic]
        words = 2 if arithmetic == "fp64" else 1
        registers = (block * width + 1.5 * block * length) * words / (32 * w)  # sums, logits and their rounded weights
        hopeless = shared > SHARED_LIMIT[capability] or registers > 210 or length * width > 1 << 16
        if (stages > 1) == in_flight and not hopeless:
            shape = (block, length) if kernel != "gradient" else (length, block)
            found.append(Config(*shape, w, stages, shared=0))
    return found


def best(kernel: str, capability: int, arithmetic: str, width: int, block: int) -> Config | None:
    """The first candidate without spills and within the shared memory, with the most it needs."""
    spilled = set()
    for config in candidates(kernel, capability, arithmetic, width, block):
        if config[:3] in spilled and config.num_stages > 1:
            continue  # fewer tiles in flight hardly free registers
        shared = 0
        for D, variant in checks(kernel, arithmetic, width):
            try:
                used = compile_for(kernel, capability, arithmetic, D, config, variant)
            except (OutOfResources, RuntimeError):
                break
            shared = max(shared, used.shared)
            if used.spilled:
                spilled.add(config[:3])
            if used.spilled or shared > SHARED_LIMIT[capability]:
                break
        else:
            return config._replace(shared=shared)
    return None


def entries(kernel: str, capability: int, arithmetic: str, width: int) -> list[Config]:
    """For each block of queries; for the bank's gradient, which few use, the larger feasible block."""
    blocks = BLOCKS[arithmetic]
    if kernel == "gradient":
        found = (best(kernel, capability, arithmetic, width, block) for block in (64, 16) if block in blocks)
        return list(itertools.islice(filter(None, found), 1))
    return [config for block in blocks if (config := best(kernel, capability, arithmetic, width, block)) is not None]


def choose(*capabilities: str) -> None:
    for capability in map(int, capabilities or CAPABILITIES):
        keys = [
            (kernel, capability, arithmetic, width)
            for kernel in KERNELS
            for arithmetic, widths in WIDTHS.items()
            for width in widths
        ]
        found: dict[str, dict[str, dict[int, list[Config]]]] = {}
        with ProcessPoolExecutor() as pool:
            for key, configs in zip(keys, pool.map(entries, *zip(*keys, strict=True)), strict=True):
                print(*key, *configs, sep="\n    ", flush=True)
                kernel, _, arithmetic, width = key
                if configs:  # else a device without shared memory for so wide a bank
                    found.setdefault(kernel, {}).setdefault(arithmetic, {})[width] = configs
        table = json.loads(TABLE.read_text()) | {str(capability): found}
        # One line for each kernel and arithmetic.
        TABLE.write_text(json.dumps(table).replace("}, ", "},\n") + "\n")


def time_shapes(B: str, N: str, D: str, dtype: str) -> None:
    """Of the loss's sums and means, with the classes known beforehand, in all launches that they take.

    A line for each shape as soon as it is timed, in turns with the table's, and the fastest again in the end. Other
    processes compile as many as there are processors; while shapes are timed they wait.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with providers.arithmetic(dtype), ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        problem = problems.make(int(B), int(float(N)), int(D), 45, providers.DTYPES[dtype], device)
        here = launches.describe(problem.bank.device)
        chosen = configs.choose(here, "stream", ARITHMETIC[dtype], int(D), int(B))
        in_table = partial(sum_with, chosen, problem)
        in_table()
        print(f"the table's: {chosen}", flush=True)
        todo = shapes(here, ARITHMETIC[dtype], int(D), chosen)
        found = []
        at_once = os.cpu_count() or 1
        for first in range(0, len(todo), at_once):
            batch = todo[first : first + at_once]
            on_small = partial(compiles, B=int(B), D=int(D), dtype=dtype, device=device)
            for config, why_not in zip(batch, list(pool.map(on_small, batch)), strict=True):
                if why_not is None:
                    ratio, text = beside(in_table, partial(sum_with, config, problem), device)
                    found.append((ratio, f"{text}  {config[:4]}"))
                print(f"{config[:4]}: {why_not}" if why_not is not None else found[-1][1], flush=True)
    print("the fastest first", *(line for _, line in sorted(found)[:10]), sep="\n")


def beside(in_table: timing.Call, this: timing.Call, device: str) -> tuple[float, str]:
    """Time over that of the table's shape, in turns with it, and words for it; infinite of one that fails."""
    try:
        this()
        times, failed = timing.in_turns({"table": in_table, "this": this}, device, seconds=0.1)
    except Exception as error:
        times, failed = {}, {"this": error}
    if failed:
        return math.inf, " ".join(f"{failed}".split())[:200]
    low, median, high = timing.quantiles(times["this"].device or times["this"].wall)
    ratio = median / timing.quantiles(times["table"].device or times["table"].wall)[1]
    return ratio, f"{ratio:.3f} of the table's, {1e3 * median:9.4f} ms ({1e3 * low:.4f} to {1e3 * high:.4f})"


def shapes(device: configs.Device, arithmetic: str, D: int, chosen: Config) -> list[Config]:
    """Candidates with the table's block of queries, then with others; those that may need too much are among them."""
    width = min(width for width in WIDTHS[arithmetic] if width >= D)
    blocks = sorted(BLOCKS[arithmetic], key=lambda block: block != chosen.block_b)
    found = [c for block in blocks for c in candidates("stream", device.capability, arithmetic, width, block)]
    return [config._replace(shared=chosen.shared) for config in found]


def compiles(config: Config, B: int, D: int, dtype: str, device: str) -> str | None:
    """Why a shape does not run on a small bank, or None: then what it compiled is on the disk for all."""
    try:
        with providers.arithmetic(dtype):
            sum_with(config, problems.make(B, max(4096, B), D, 45, providers.DTYPES[dtype], device))
    except (OutOfResources, RuntimeError) as error:
        return " ".join(str(error).split())[:100]
    return None


def sum_with(config: Config, problem: problems.Problem) -> Any:
    with patch.object(configs, "choose", lambda *_: config):
        given = problem.features.detach(), problem.bank, problem.labels, problem.index, problem.classes.layout
        return backend.log_scores(Batch(*given, problems.SIGMA), True)


if __name__ == "__main__":
    {"choose": choose, "time": time_shapes}[sys.argv[1]](*sys.argv[2:])
