"""Choose the tile shapes in ntdne_kernels/ops/triton/configs.json.

python -m benchmarks.tune choose [CAPABILITY ...]    into the table, for GPUs that need not be here
python -m benchmarks.tune time B N D DTYPE           on the GPU that is here: all shapes that fit, the fastest first

`choose` takes for each GPU generation, arithmetic, width of D and block of queries the first shape of an order of
preference that spills no register and fits the shared memory in every variant of the kernel. What `time` finds to be
better belongs into that order, which `candidates` is.

Shapes: B queries, N bank rows, D features.
"""

import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.errors import OutOfResources

from benchmarks import problems, providers, timing
from benchmarks.aot import KERNELS, SHARED_LIMIT, Variant, checks, compile_for
from ntdne_kernels.ops import triton as backend
from ntdne_kernels.ops.triton import configs
from ntdne_kernels.ops.triton.configs import Config

TABLE = Path(configs.__file__).with_name("configs.json")
CAPABILITIES = (80, 86, 90, 100)  # 89 has what 86 has
WIDTHS = {"16-bit": (128, 256, 512, 1024), "tf32": (128, 256, 512, 1024), "ieee": (128, 512, 1024), "fp64": (128, 256)}
BLOCKS = {"16-bit": (16, 64, 128), "tf32": (16, 64, 128), "ieee": (16, 64), "fp64": (16,)}
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
    """For each block of queries; for labels and the bank's gradient, which few use, the larger feasible block."""
    blocks = BLOCKS[arithmetic]
    if kernel != "range":
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
    """Of the loss's sums and means, with the classes known beforehand, in all launches that they take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with providers.arithmetic(dtype):
        problem = problems.make(int(B), int(float(N)), int(D), 45, providers.DTYPES[dtype], device)
        here = backend.describe(problem.bank.device)
        arithmetic = backend._arithmetic(problem.bank.dtype)
        chosen = configs.choose(here, "range", arithmetic, int(D), int(B))
        shapes = {config[:4]: config for config in (*feasible(here, arithmetic, int(D), dtype), chosen)}
        calls = {config: partial(sum_with, config, problem) for config in shapes.values()}
        for config, call in list(calls.items()):
            try:
                call()
            except OutOfResources as error:
                print(f"{config}: {error}")
                del calls[config]
        found, failed = timing.in_turns(calls, device, seconds=0.2)
    for config, error in failed.items():
        print(f"{config}: {error}")
    rate = 4 * int(B) * int(float(N)) * int(D) / 1e12
    for config, times in sorted(found.items(), key=lambda of: timing.quantiles(of[1].device or of[1].wall)[1]):
        low, median, high = timing.quantiles(times.device or times.wall)
        mark = " <- the table's" if config == chosen else ""
        spread = f"{1e3 * median:9.4f} ms ({1e3 * low:.4f} to {1e3 * high:.4f})"
        print(f"{spread}, {rate / median:6.1f} TFLOP/s  {config}{mark}")


def sum_with(config: Config, problem: problems.Problem) -> Any:
    with patch.object(backend, "choose", lambda *_: config):
        classes = problem.classes.tensors()
        given = problem.features.detach(), problem.bank, problem.labels, problem.index, classes
        return backend.log_scores(*given, problems.SIGMA, True)


def feasible(device: configs.Device, arithmetic: str, D: int, dtype: str) -> list[Config]:
    """What neither spills nor needs too much, with the shared memory that it takes."""
    width = min(width for width in WIDTHS[arithmetic] if width >= D)
    tried = [
        c for block in BLOCKS[arithmetic] for c in candidates("range", device.capability, arithmetic, width, block)
    ]
    variant = Variant({"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32"), tracked=dtype == "float16")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # forked ones would share this one's GPU
        jobs = [
            pool.submit(compile_for, "range", device.capability, arithmetic, D, config, variant) for config in tried
        ]
        used = [_or_none(job.result) for job in jobs]
    return [
        config._replace(shared=of.shared)
        for config, of in zip(tried, used, strict=True)
        if of is not None and not of.spilled and of.shared <= device.shared
    ]


def _or_none(result: Callable[[], Any]) -> Any:
    try:
        return result()
    except (OutOfResources, RuntimeError):
        return None


if __name__ == "__main__":
    {"choose": choose, "time": time_shapes}[sys.argv[1]](*sys.argv[2:])
