"""Choose the tile shapes in ntdne_kernels/ops/triton/configs.json: `python -m benchmarks.tune [CAPABILITY ...]`.

For each GPU generation, arithmetic, width of D and block of queries the first shape of an order of preference is taken
that spills no register and fits the shared memory in every variant of the kernel. That needs no GPU.
"""

import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from triton.runtime.errors import OutOfResources

from benchmarks.aot import KERNELS, SHARED_LIMIT, checks, compile_for
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
    lengths = lengths[-2:] if arithmetic == "ieee" and width > 128 else lengths  # others take minutes to compile
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


def main() -> None:
    for capability in [int(x) for x in sys.argv[1:]] or CAPABILITIES:
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


if __name__ == "__main__":
    main()
