#!/usr/bin/env bash
# All that needs an NVIDIA GPU, with the python3 that holds its PyTorch:
#
#     benchmarks/gpu.sh STAGE ...      build, tests, sanitize, measure, report, tune
#
# Stages do not depend on each other but on build. What one prints is also in $OUT/STAGE.log (build/gpu). Results go into
# benchmarks/results and are copied to $OUT: where they are in place `measure` goes on where it stopped, after MINUTES (8).
# SANITIZERS (memcheck racecheck synccheck initcheck) are the tools of compute-sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"

build() {
    nvidia-smi
    python3 -m pip install --quiet --no-build-isolation --no-deps --editable . || return
    python3 -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"
    python3 -c "from ntdne_kernels.ops.bank_update import LOAD_ERRORS; print('update kernels missing:', LOAD_ERRORS or 'none')"
}

tests() { python3 -m pytest -m gpu -rs; }

# Memory is taken from the driver piece by piece: in PyTorch's own pools an access past a tensor stays unseen. Graphs
# need those pools, and of the bank of 4 GB each access would be looked at.
sanitize() {
    for tool in ${SANITIZERS:-memcheck racecheck synccheck initcheck}; do
        echo "== $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 400 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            python3 -m pytest -m gpu -rs -k "not two_to_the_31 and not graph" tests/ops/test_bank_update.py \
            tests/ops/test_triton.py
        echo "== $tool ended with $?"
    done
}

# Three times: a fault of the GPU ends the process, and what caused it is left out of the next.
all() {
    for _ in 1 2 3; do
        python3 -m benchmarks measure --device cuda --minutes "$((${MINUTES:-8} - SECONDS / 60))" "$@" && break
    done
    cp benchmarks/results/nvidia-*.csv "$OUT"
}

# What decides the targets first. To compile naive and flex attention takes most of a case's time: few cases have them.
measure() {
    local quick=(--without "naive, compiled" "flex attention" "PyTorch, compiled")
    local gradient=(--what "loss and gradient" --D 128 --dtype bfloat16)
    all "${gradient[@]}" --C 45 --B 256 --N 1e6
    all --what update --D 128 --dtype bfloat16 --B 256 --N 1e6
    all "${gradient[@]}" --C 45 "${quick[@]}"
    all "${gradient[@]}" --C 2 --B 256 1024 4096 --N 1e6 "${quick[@]}"
    all --what "training step" --N 1e6
    all "${gradient[@]}" --C 45 --B 64 256 1024 --N 1e4 1e6 8e6
    all "${quick[@]}"
    all
}

report() {
    for what in targets table; do python3 -m benchmarks "$what" --device cuda >"$OUT/$what.md"; done
    cat "$OUT/targets.md"
}

tune() {
    for B in 64 256 1024; do python3 -m benchmarks.tune time "$B" 1e6 128 bfloat16; done
}

for stage in "$@"; do
    "$stage" 2>&1 | tee "$OUT/$stage.log"
    echo "== $stage ended with ${PIPESTATUS[0]}"
done
