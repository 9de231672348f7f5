"""Compile the kernels for a GPU that need not be here, and read the compiler's account of registers and memory.

python -m benchmarks.aot CAPABILITY

prints a line of JSON for each kernel that visits the bank, with every entry of the table of tile shapes, for those that
merge its splits, and for the one for Hopper GPUs.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from ntdne_kernels.ops.gpu import kernels
from ntdne_kernels.ops.gpu.configs import (
    HOPPER,
    MERGE_WARPS,
    TABLE,
    Config,
    Device,
    columns,
    hopper_tiles,
    hopper_width,
    merge_blocks,
)
from ntdne_kernels.ops.gpu.launches import BLOCK_Q, FOLD_ROWS, PRECISION, hopper

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program can have, by compute capability (source: CUDA C++ Programming Guide)."""
BANKS = {"16-bit": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",), "fp64": ("fp64",)}
"""Triton's names of the bank's dtypes, by the arithmetic of their products."""
_POINTERS = {
    "queries": "bank", "bank": "bank", "order": "i64", "neighbours": "i64", "index": "i64",
    "totals": "sum", "maxima": "sum", "vectors": "sum", "log_p": "sum", "log_sum_all": "sum", "grad_log_p": "sum",
    "features": "sum", "norms": "sum", "scores": "sum", "value": "sum", "slope": "sum", "losses": "fp64",
    "log_same": "fp64", "log_other": "fp64", "mean_same": "sum", "mean_other": "sum",
}  # fmt: skip
_NUMBERS = {
    "scale": "fp64", "sigma": "fp64", "q": "fp64", "log_k": "fp64", "pruned_loss": "fp64", "unit": "fp64",
    "rows_per_split": "i64",
}  # fmt: skip
_ALIGNED = (
    "queries", "bank", "totals", "vectors", "gradient", "bank_stride", "features", "mean_same", "mean_other",
)  # fmt: skip
_LOSS = {
    "LOSS": "ntdne", "PRUNING": True, "INDICATOR": "auto", "REDUCTION": "mean", "LOOK_UP": True, "BLOCK_Q": BLOCK_Q,
    "BLOCK": 256,
}  # fmt: skip
"""The loss of a module: of all losses it takes most registers."""


class Resources(NamedTuple):
    """What a compiled kernel needs and uses."""

    registers: int
    spilled: int
    """Bytes per thread that did not fit into registers."""
    shared: int
    """Bytes of shared memory per program."""
    wgmma: bool
    mma: bool
    """Tensor cores: Hopper's instruction for whole warp groups, or that of other generations."""
    tma: bool
    """Hopper's unit copies whole tiles."""
    serialized: list[str]
    """Where the assembler makes products of hopper.py wait for each other: its remarks C7510 to C7519."""


class Variant(NamedTuple):
    """The options that are compiled into a kernel besides its tile shape."""

    bank: str
    gather: bool = False
    tracked: bool = False
    weighted: bool = True


KERNELS = {"stream": kernels.stream, "gradient": kernels.gradient_to_bank}
"""By the names that they have in the table of tile shapes."""
MERGES = {"log scores": kernels.merge_to_log_scores, "class sums": kernels.merge_to_class_sums}
_MERGE = Config(block_b=128, block_n=0, num_warps=MERGE_WARPS, num_stages=3, shared=48 << 10)
"""For blocks of queries and no bank rows, with Triton's default stages. Any program can have 48 KB of shared memory."""
_SPLITS = 132
"""Of a large bank: a program that merges so many needs as much as it ever does."""
HOPPER_STREAM = "hopper stream"
HOPPER_DIMENSIONS = (64, 112, 128, 256)


def checks(kernel: str, arithmetic: str, width: int) -> list[tuple[int, Variant]]:
    """(D, variant) of all that a table entry for D up to `width` has to serve, the most demanding first."""
    first, last = BANKS[arithmetic][0], BANKS[arithmetic][-1]
    two_parts = width * 3 // 4
    if kernel == "gradient":
        found = [Variant(first), Variant(first, gather=True)]
    else:  # float16 is always tracked
        found = [Variant(first), Variant(first, weighted=False), Variant(last, tracked=True)]
        found += [Variant(first, gather=True), Variant(last, gather=True, tracked=True)]
    return [(width, found[0]), (two_parts, found[0]), *((width, variant) for variant in found[1:])]


def compile_for(kernel: str, capability: int, arithmetic: str, D: int, config: Config, variant: Variant) -> Resources:
    """One variant of a kernel for sm_`capability`."""
    if kernel == HOPPER_STREAM:
        return compile_hopper(D, config, variant.weighted)
    function = (KERNELS | MERGES)[kernel]
    names = function.arg_names
    element = {"bank": variant.bank, "sum": "fp64" if variant.bank == "fp64" else "fp32"}
    D1, D2 = columns(D)
    constants: dict[str, Any] = merge_blocks(D, 8 if variant.bank == "fp64" else 4, _SPLITS) | _LOSS | {
        "D": D, "D1": D1, "D2": D2, "BLOCK_B": config.block_b, "BLOCK_N": config.block_n,
        "GATHER": variant.gather, "TRACKED": variant.tracked,
        "SHIFT": 14 if variant.tracked else 0, "WEIGHTED": variant.weighted, "PRECISION": PRECISION[arithmetic],
        "FOLD_ROWS": FOLD_ROWS,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: _NUMBERS.get(name, "i32") for name in names}
    # A merge's gradient is that of the features, in the dtype of its sums.
    pointers = _POINTERS | {"gradient": "bank" if kernel == "gradient" else "sum"}
    signature |= {name: f"*{element.get(kind, kind)}" for name, kind in pointers.items() if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in _ALIGNED}
    source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx or "tcgen05.mma" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        serialized=[],
    )


def compile_hopper(D: int, config: Config, weighted: bool) -> Resources:
    """The kernel of hopper.py for bfloat16, as it is launched."""
    function, W = hopper.stream, hopper_width(D)

    def descriptor(rows: int) -> str:
        return f"tensordesc<bf16[{rows}, {W}],{gl.NVMMASharedLayout.get_default_for([rows, W], gl.bfloat16)!r}>"

    constants: dict[str, Any] = {
        "D": D, "W": W, "BLOCK_B": config.block_b, "BLOCK_N": config.block_n, "STAGES": config.num_stages,
        "WEIGHTED": weighted, "FOLD_ROWS": FOLD_ROWS, "REGISTERS": 240, "num_warps": 4,
    }  # fmt: skip
    signature = dict.fromkeys(function.arg_names, "i32") | {
        "queries": descriptor(hopper.HALF), "bank": descriptor(config.block_n), "neighbours": "*i64", "totals": "*fp32",
        "vectors": "*fp32", "scale": "fp32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    at = function.arg_names.index
    source = GluonASTSource(
        function,
        signature,
        constexprs={(at(name),): value for name, value in constants.items()},
        attrs={(at(name),): [["tt.divisibility", 16]] for name in ("neighbours", "totals", "vectors")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options={"num_warps": 4})
    usage, sass = _resource_usage(compiled.asm["cubin"]), _output_of("nvdisasm", compiled.asm["cubin"])
    assembler = _output_of("ptxas", compiled.asm["ptx"].encode(), "-v", "--gpu-name=sm_90a", "--output-file=/dev/null")
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        wgmma="HGMMA" in sass,
        mma="HMMA" in sass,
        tma="UTMALDG" in sass,
        serialized=re.findall(r"C751\d.*", assembler),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _output_of("cuobjdump", cubin, "--dump-resource-usage")
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _output_of(tool: str, content: bytes, *options: str) -> str:
    """The output about a file of one of the CUDA toolkit's programs that come with Triton."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        command = [str(program), *options, file.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


Entry = tuple[str, int, str, int, Config, Variant]
"""Kernel, capability, arithmetic, D, tile shape, variant."""


def entries(capability: int) -> list[Entry]:
    """What to compile for a GPU.

    Each entry of the table is compiled in one of the variants that it has to serve, which take turns.
    """
    found: list[Entry] = []
    tables = TABLE["86" if capability == 89 else str(capability)]
    for kernel, by_arithmetic in tables.items():
        for arithmetic, by_width in by_arithmetic.items():
            for width, configs in by_width.items():
                choices = checks(kernel, arithmetic, int(width))
                for config in map(Config._make, configs):
                    D, variant = choices[len(found) % len(choices)]
                    found.append((kernel, capability, arithmetic, D, config, variant))
    for kernel, arithmetic in itertools.product(MERGES, ("16-bit", "fp64")):
        for width in map(int, tables["stream"][arithmetic]):  # tracked needs more registers
            found.append((kernel, capability, arithmetic, width, _MERGE, Variant(BANKS[arithmetic][-1], tracked=True)))
    if capability == HOPPER:
        for D, B, weighted in itertools.product(HOPPER_DIMENSIONS, (64, 128), (True, False)):
            tiles = hopper_tiles(Device(HOPPER, 132, SHARED_LIMIT[HOPPER]), D, B)
            assert tiles is not None
            found.append((HOPPER_STREAM, HOPPER, "16-bit", D, tiles, Variant("bf16", weighted=weighted)))
    return found


def main() -> None:
    """The command."""
    todo = entries(int(sys.argv[1]))
    with ProcessPoolExecutor() as pool:
        for entry, used in zip(todo, pool.map(compile_for, *zip(*todo, strict=True)), strict=True):
            kernel, _, arithmetic, D, config, variant = entry
            row = {"kernel": kernel, "arithmetic": arithmetic, "D": D, "variant": variant._asdict()}
            print(json.dumps(row | {"config": config._asdict(), "used": used._asdict()}), flush=True)


if __name__ == "__main__":
    main()
