#!/usr/bin/env bash
# All that needs an NVIDIA GPU, with the python3 that holds its PyTorch:
#
#     benchmarks/gpu.sh STAGE ...      build, tests, sanitize, measure, report, tune
#
# Stages do not depend on each other but on build. What one prints is also in $OUT/STAGE.log (build/gpu). `measure` writes
# into $OUT after each case, and in the end into benchmarks/results: where results are in place it goes on where it
# stopped, after MINUTES (6). SANITIZERS (memcheck racecheck synccheck initcheck) are the tools of compute-sanitizer, each
# of which may take 400 s.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"

# For the GPU that is here alone; without the compiled update everything else would be measured in vain.
build() {
    nvidia-smi
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}
    python3 -m pip --version
    python3 -c "import setuptools, torch, triton
print('setuptools', setuptools.__version__, 'torch', torch.__version__, 'triton', triton.__version__)"
    python3 -m pip install --quiet --no-build-isolation --no-deps --editable . || return
    python3 -c "import sys
from ntdne_kernels.ops.bank_update import LOAD_ERRORS
sys.exit(f'update kernels missing: {LOAD_ERRORS}' if LOAD_ERRORS else 0)"
}

# Without the tests that need the packages of the experiments; side by side where pytest can: most of the time compiles.
tests() {
    local workers=()
    python3 -c "import xdist" 2>/dev/null && workers=(-n 8)
    python3 -m pytest -m gpu -rs --tb=short "${workers[@]}" \
        --ignore=tests/experiments --ignore=tests/test_audit_benchmark.py --ignore=tests/test_examples.py
}

# Memory is taken from the driver piece by piece: in PyTorch's own pools an access past a tensor stays unseen. Graphs
# need those pools, of the large banks each access would be looked at, and the profiler that counts launches has no
# place beside these tools.
sanitize() {
    local left_out="not two_to_the_31 and not large_bank and not graph and not one_launch"
    for tool in ${SANITIZERS:-memcheck racecheck synccheck initcheck}; do
        echo "== $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 400 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            python3 -m pytest -m gpu -rs -k "$left_out" tests/ops/test_bank_update.py tests/ops/test_triton.py
        echo "== $tool ended with $?"
    done
}

# Three times: a fault of the GPU ends the process, and what caused it is left out of the next.
all() {
    local left file="$OUT/${RESULTS##*/}"
    for _ in 1 2 3; do
        left=$((60 * ${MINUTES:-6} - SECONDS))
        ((left > 0)) || return
        python3 -m benchmarks measure --device cuda --file "$file" --minutes "$(awk "BEGIN {print $left / 60}")" "$@" && return
    done
}

# What decides the targets first. To compile naive and flex attention takes most of a case's time: few cases have them.
measure() {
    RESULTS=$(python3 -c "from benchmarks.__main__ import default_file; print(default_file('cuda'))") || return
    [ ! -e "$RESULTS" ] || cp "$RESULTS" "$OUT"
    SECONDS=0
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
    cp "$OUT/${RESULTS##*/}" "$RESULTS"
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
    ended=${PIPESTATUS[0]}
    echo "== $stage ended with $ended"
    [ "$stage" != build ] || [ "$ended" = 0 ] || exit "$ended"
done
