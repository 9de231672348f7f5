"""Each kernel compiled for sm_90 from the arguments it is really launched with, on a machine without a GPU.

Run as a module, in a process without the interpreter: `kernel[grid](...)` compiles and stops there. The sums over
classes, which have no tile shapes of their own, are compiled for every GPU; what they need is one JSON line each.
"""

import json
from unittest.mock import MagicMock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot import SHARED_LIMIT, _resource_usage
from ntdne_kernels import LabelIndex
from ntdne_kernels.ops import triton
from ntdne_kernels.ops.triton.configs import Device
from tests.conftest import Archive
from tests.ops.test_leave_one_out import arguments


def launch_all(B: int, D: int, dtype: torch.dtype, by: str) -> None:
    """Every launch of a step: with and without gradient, of a whole bank and a part, three losses, both gradients."""
    features, bank, labels, bank_labels, index = arguments(Archive(B, 4000, D, 7, dtype=dtype), by)
    classes = bank_labels.tensors() if isinstance(bank_labels, LabelIndex) else [bank_labels]
    batch = (features, bank, labels, index, classes, 0.1)
    triton.log_scores(*batch, False)
    triton.class_sums(*batch, False)
    triton.class_sums(*batch, True)
    log_p, direction, log_sum_all = triton.log_scores(*batch, True)
    for q, k, reduction in ((0.7, 0.3, "mean"), (None, None, "sum"), (0.7, None, "none")):
        value, slope = triton.loss_and_slope(log_p, None, q, k, reduction)
        triton.features_gradient(direction, log_p, slope, torch.ones_like(value), features.dtype)
    triton.features_gradient(direction, log_p, None, torch.ones_like(log_p), torch.bfloat16)
    triton.bank_gradient(*batch, log_p, log_sum_all, torch.ones_like(log_p))
    triton.class_masses(features.to(dtype), bank, index, torch.arange(0, 4001, 500), 0.1)


def launch_class_masses() -> None:
    """Classes of 64 rows and more, with and without a tracked maximum."""
    offsets = torch.arange(0, 4001, 500)
    for dtype, sigma in ((torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float32, 0.1)):
        archive = Archive(100, 4000, 128, dtype=dtype)
        triton.class_masses(archive.features.to(dtype), archive.bank, archive.index, offsets, sigma)


def main() -> None:
    no_gpu = MagicMock()
    driver.set_active(no_gpu)
    compiled = {}

    def pretend(capability: int) -> None:
        no_gpu.get_current_target.return_value = GPUTarget("cuda", capability, 32)
        no_gpu.get_current_device.return_value = no_gpu.get_current_stream.return_value = capability
        triton.describe = lambda _: Device(capability, 132, SHARED_LIMIT[capability])

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[kernel.fn.__name__, made.hash] = made

        return launch

    JITFunction.__getitem__ = compile_only
    pretend(90)
    # At D = 1 the bank's stride of 1 is a constant to the compiler.
    for D, dtype, by in ((128, torch.bfloat16, "index"), (1, torch.float32, "labels")):
        launch_all(100, D, dtype, by)
        before = len(compiled)
        launch_all(93, D, dtype, by)
        print("compiled anew for a smaller batch:", len(compiled) - before)
    print("kernels:", *sorted({name for name, _ in compiled}))
    for capability in SHARED_LIMIT:
        compiled.clear()
        pretend(capability)
        launch_class_masses()
        for made in compiled.values():
            ptx, usage = made.asm["ptx"], _resource_usage(made.asm["cubin"])
            row = {"capability": capability, "bank": made.src.signature["bank"], "shared": made.metadata.shared}
            row |= {"spilled": usage["STACK"] + usage["LOCAL"], "wgmma": "wgmma.mma_async" in ptx}
            print(json.dumps(row | {"mma": "mma.sync" in ptx or "tcgen05.mma" in ptx}))


if __name__ == "__main__":
    main()
