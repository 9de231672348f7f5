"""Every entry of the table of tile shapes and every merge, compiled for its GPU: that needs the compiler, no device.

It runs in a process of its own, because this one may have the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import HOPPER_CLASSES, HOPPER_DIMENSIONS, HOPPER_STREAM, KERNELS, MERGES, SHARED_LIMIT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def output_of(*module: str) -> list[str]:
    """Lines that a module prints in a process with the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_every_kernel_fits_its_gpu_and_multiplies_on_tensor_cores(capability):
    rows = [json.loads(line) for line in output_of("benchmarks.aot", str(capability))]
    entries = [row for row in rows if row["kernel"] in KERNELS]
    assert len(entries) >= 28
    assert {row["kernel"] for row in rows} - {HOPPER_STREAM, HOPPER_CLASSES} == KERNELS.keys() | MERGES.keys()
    for row in rows:
        used, config = row["used"], row["config"]
        # 8 bytes outside of the loop over tiles (40 with triton 3.6); and the only tile there is of such rows.
        widest_for_hopper = row["kernel"] == HOPPER_STREAM and row["D"] == 256
        widest_tf32 = row["kernel"] == "stream" and row["arithmetic"] == "tf32" and row["D"] > 512
        assert used["spilled"] <= (8 if widest_for_hopper else 40 if widest_tf32 else 0), row
        assert used["shared"] <= config["shared"] <= SHARED_LIMIT[capability], row
    for row in entries:
        used, config = row["used"], row["config"]
        if row["arithmetic"] in ("16-bit", "tf32"):
            assert used["wgmma"] or used["mma"], row
            if capability == 90 and row["kernel"] != "gradient" and config["block_b"] >= 64 and row["D"] <= 512:
                assert used["wgmma"], row
    for_hopper = [row for row in rows if row["kernel"] in (HOPPER_STREAM, HOPPER_CLASSES)]
    assert len(for_hopper) == (6 * len(HOPPER_DIMENSIONS) if capability == 90 else 0)
    for row in for_hopper:
        assert row["used"]["wgmma"], row
        assert row["used"]["tma"], row
        assert row["used"]["serialized"] == [], row
    if capability == 90:
        wide = {
            (row["arithmetic"], row["config"]["block_b"]) for row in rows if row["used"]["wgmma"] and row["D"] >= 192
        }
        assert {("16-bit", 64), ("16-bit", 128), ("tf32", 64)} <= wide


def test_launches_compile_as_they_are_and_a_smaller_batch_compiles_nothing_anew():
    lines = output_of("tests.ops.compile_launches")
    again = [line for line in lines if not line.startswith("{")]
    assert again == ["compiled anew for a smaller batch: 0"] * 3
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert {row["kernel"] for row in rows} == {
        "class_log_sums", "gradient_to_bank", "merge_to_class_sums", "merge_to_log_scores", "prepare", "record",
        "stream",
    }  # fmt: skip
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row
    class_log_sums = [row for row in rows if row["kernel"] == "class_log_sums"][-3 * len(SHARED_LIMIT) :]
    assert {row["capability"] for row in class_log_sums} == SHARED_LIMIT.keys()
    for row in class_log_sums:
        if row["bank"] != "*fp32":
            assert row["wgmma" if row["capability"] == 90 else "mma"], row
            if row["capability"] == 90:  # two programs to a multiprocessor: one multiplies as the other exponentiates
                assert 2 * row["shared"] <= SHARED_LIMIT[90], row
