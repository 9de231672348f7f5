"""Each kernel compiled for sm_90 from the arguments it is really launched with, on a machine without a GPU.

Run as a module, in a process without the interpreter: `kernel[grid](...)` compiles and stops there.
"""

from unittest.mock import MagicMock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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


def main() -> None:
    no_gpu = MagicMock()
    no_gpu.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    no_gpu.get_current_device.return_value = no_gpu.get_current_stream.return_value = 0
    driver.set_active(no_gpu)
    triton.describe = lambda _: Device(90, 132, 232_448)
    compiled = set()

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            compiled.add((kernel.fn.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs).hash))

        return launch

    JITFunction.__getitem__ = compile_only
    # At D = 1 the bank's stride of 1 is a constant to the compiler.
    for D, dtype, by in ((128, torch.bfloat16, "index"), (1, torch.float32, "labels")):
        launch_all(100, D, dtype, by)
        before = set(compiled)
        launch_all(93, D, dtype, by)
        print("compiled anew for a smaller batch:", len(compiled - before))
    print("kernels:", *sorted({name for name, _ in compiled}))


if __name__ == "__main__":
    main()
