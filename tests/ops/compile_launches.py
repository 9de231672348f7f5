"""Each kernel compiled for sm_90 from the arguments it is really launched with, on a machine without a GPU.

Run as a module, in a process without the interpreter: `kernel[grid](...)` compiles and stops there. What each needs is
one JSON line. The sums over classes, which have no tile shapes of their own, are compiled for every GPU.
"""

import json
from unittest.mock import MagicMock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot import SHARED_LIMIT, _resource_usage
from ntdne_kernels.ops import gpu, schema
from ntdne_kernels.ops.gpu.configs import Device
from ntdne_kernels.ops.layout import ClassOrder, PlainLabels
from ntdne_kernels.ops.losses import LossSpec
from tests.archives import Archive, batch_of


def launch_all(B: int, D: int, dtype: torch.dtype, by: str) -> None:
    """Every launch of a step: with and without gradient, of a whole bank and a part, of a module, both gradients."""
    batch = batch_of(Archive(B, 4000, D, 7, dtype=dtype), by)
    gpu.log_scores(batch, False)
    gpu.class_sums(batch, False)
    gpu.class_sums(batch, True)
    log_p, _, log_sum_all = gpu.log_scores(batch, True)
    for q, k, reduction in ((0.7, 0.3, "mean"), (None, None, "sum"), (0.7, None, "none")):
        gpu.fused_loss(batch, None, LossSpec(q, k, reduction), True)
    if not isinstance(batch.layout, PlainLabels):
        ordered = batch._replace(layout=ClassOrder(batch.layout.classes, batch.layout.offsets))
        images = schema.Archive(batch.labels.new_zeros(4000), torch.arange(4000), torch.empty(4001, dtype=log_p.dtype))
        for q, k, indicator, given in (
            (0.7, 0.3, "auto", None),
            (0.7, 0.3, "stored", batch.labels),
            (None,) * 2 + ("current", None),
        ):
            gpu.fused_loss(ordered._replace(labels=given), images, LossSpec(q, k, "mean", indicator), True)
        gpu.record_scores_(images.scores, log_p, batch.own, images.labels)
    gpu.bank_gradient(batch, log_p, log_sum_all, torch.ones_like(log_p))
    gpu.class_log_sums(batch.features.to(dtype), batch.bank, batch.own, torch.arange(0, 4001, 500), 0.1)


def launch_class_log_sums() -> None:
    """Classes of 64 rows and more, with and without a tracked maximum."""
    offsets = torch.arange(0, 4001, 500)
    for dtype, sigma in ((torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float32, 0.1)):
        archive = Archive(100, 4000, 128, dtype=dtype)
        gpu.class_log_sums(archive.features.to(dtype), archive.bank, archive.index, offsets, sigma)


def main() -> None:
    no_gpu = MagicMock()
    driver.set_active(no_gpu)
    compiled = {}

    def pretend(capability: int) -> None:
        no_gpu.get_current_target.return_value = GPUTarget("cuda", capability, 32)
        no_gpu.get_current_device.return_value = no_gpu.get_current_stream.return_value = capability
        gpu.launches.describe = lambda _: Device(capability, 132, SHARED_LIMIT[capability])

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[kernel.fn.__name__, made.hash] = made

        return launch

    def say() -> None:
        for (name, _), made in compiled.items():
            ptx, usage = made.asm["ptx"], _resource_usage(made.asm["cubin"])
            row = {"kernel": name, "capability": made.metadata.target.arch, "bank": made.src.signature.get("bank")}
            row |= {"shared": made.metadata.shared, "spilled": usage["STACK"] + usage["LOCAL"]}
            row |= {"wgmma": "wgmma.mma_async" in ptx, "mma": "mma.sync" in ptx or "tcgen05.mma" in ptx}
            print(json.dumps(row))
        compiled.clear()

    JITFunction.__getitem__ = compile_only
    gpu.launches.stream_of = lambda *_: None  # of CPU tensors; and launches go through __getitem__
    gpu.launches.hopper_serves = lambda _: False
    pretend(90)
    # At D = 1 the bank's stride of 1 is a constant to the compiler.
    for D, dtype, by in ((128, torch.bfloat16, "index"), (1, torch.float32, "labels"), (96, torch.float32, "index")):
        launch_all(100, D, dtype, by)
        before = len(compiled)
        launch_all(93, D, dtype, by)
        print("compiled anew for a smaller batch:", len(compiled) - before)
    say()
    for capability in SHARED_LIMIT:
        pretend(capability)
        launch_class_log_sums()
        say()


if __name__ == "__main__":
    main()
