#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU. python3 must be the one with the GPU's PyTorch.
#
#     benchmarks/gpu.sh STAGE ...      check, targets, tune, sanitize, audit; build, measure, report
#
# The first five end within four minutes each, and print as they go. What a stage prints is also written to
# $OUT/STAGE.log (build/gpu), and so are its results, after each case:
#
#   check     builds, then runs the tests on the GPU for the rest of the time, those of the kernels first
#   targets   measures the cases by which the speed is judged, into targets.csv, and the host's part of a step, into
#             host.csv. `python -m benchmarks merge --rows targets.csv` takes the former into benchmarks/results. OURS
#             (triton) names the providers to compare with attention
#   tune      times tile shapes for B = 64, 256, 1024, and prints a line for each
#   sanitize  runs some small tests of the kernels (SUBSET) under SANITIZERS (memcheck racecheck)
#   audit     times the two kernels of the label audit and whole audits of 10^6 images, a line of JSON for each
#
# All stages but check need the extension: `benchmarks/gpu.sh build ...`. `measure` goes through the whole grid for
# MINUTES (6), and goes on where it stopped if its results are in benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1

# Builds for this GPU alone. Fails without the compiled update: measurements with its replacement would be useless.
build() {
    nvidia-smi
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}
    python3 -m pip --version
    python3 -c "import setuptools, torch, triton
print('setuptools', setuptools.__version__, 'torch', torch.__version__, 'triton', triton.__version__)"
    timeout 150 python3 -m pip install --quiet --no-build-isolation --no-deps --editable . || return
    python3 -c "import sys
from ntdne_kernels.ops.bank_update import LOAD_ERRORS
sys.exit(f'update kernels missing: {LOAD_ERRORS}' if LOAD_ERRORS else 0)"
}

# Leaves out tests that need the packages of the experiments. Most of the time goes into compiling, so tests run side by
# side where xdist is installed; chunks of one keep their order. When its time is up, pytest still lists the failures.
check() {
    local file first=() rest=() workers=()
    SECONDS=0
    build || return
    for file in tests/ops/test_hopper*.py tests/ops/test_triton*.py; do [ ! -e "$file" ] || first+=("$file"); done
    for file in tests/ops/test_*.py tests/test_*.py tests/benchmarks/test_*.py; do
        case " ${first[*]} tests/benchmarks/test_audit.py tests/test_examples.py " in
            *" $file "*) ;;
            *) rest+=("$file") ;;
        esac
    done
    python3 -c "import xdist" 2>/dev/null && workers=(-n 14 --maxschedchunk 1)
    echo "built in $SECONDS s"
    timeout -s INT -k 10 $((225 - SECONDS > 180 ? 180 : 225 - SECONDS)) \
        python3 -m pytest -m gpu -v -rfE --tb=short "${workers[@]}" "${first[@]}" "${rest[@]}"
}

# Each tensor gets memory of its own from the driver: an access past a tensor would stay unseen in PyTorch's pools.
# Tests of graphs need those pools, and tests that count launches need a profiler, so both are left out.
sanitize() {
    local tool tools=(${SANITIZERS:-memcheck racecheck}) file files=(tests/ops/test_triton.py tests/ops/test_bank_update.py)
    local small="many_classes or strided or upstream or batch_order or hopper or (mixed_dtypes and bfloat16) or (loss_kernel and 1500)"
    local left_out="two_to_the_31 or large_bank or graph or launch or opcheck or compiles"
    for file in tests/ops/test_hopper*.py; do [ ! -e "$file" ] || files=("$file" "${files[@]}"); done
    for tool in "${tools[@]}"; do
        echo "== $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 10 $((225 / ${#tools[@]})) \
            compute-sanitizer --tool "$tool" --error-exitcode 99 \
            python3 -m pytest -m gpu -v --tb=short -k "(${SUBSET:-$small}) and not ($left_out)" "${files[@]}"
        echo "== $tool ended with $? (124: its time was up)"
    done
}

# Measures up to three times: a fault of the GPU ends the process, and the next one leaves out what caused it.
all() {
    local left file=$1
    shift
    for _ in 1 2 3; do
        left=$((60 * ${MINUTES:-6} - SECONDS))
        ((left > 0)) || return
        timeout -k 10 $((left + 60)) \
            python3 -m benchmarks measure --device cuda --file "$file" --minutes "$(awk "BEGIN {print $left / 60}")" "$@" && return
    done
}

# Starts from an empty file: earlier rows may be of other code.
targets() {
    local MINUTES=2 ours=(${OURS:-triton})
    SECONDS=0
    rm -f "$OUT/targets.csv" "$OUT/host.csv"
    all "$OUT/targets.csv" --what "loss and gradient" --D 128 --C 45 --dtype bfloat16 --seconds 0.2 \
        --B 1 64 256 1024 4096 --N 1e6 8e6 1e8 --provider "${ours[@]}" "SDPA cuDNN, folded" "SDPA flash, folded"
    timeout -k 5 $((230 - SECONDS)) \
        python3 -m benchmarks host --file "$OUT/host.csv" --minutes "$(awk "BEGIN {print (200 - $SECONDS) / 60}")"
    python3 -m benchmarks targets --device cuda --file "$OUT/targets.csv"
}

tune() {
    SECONDS=0
    for B in 256 1024 64; do
        timeout -s INT -k 5 $((225 - SECONDS > 75 ? 75 : 225 - SECONDS)) python3 -m benchmarks.tune time "$B" 1e6 128 bfloat16
    done
}

audit() {
    timeout -s INT -k 10 225 python3 -m benchmarks.audit gpu 1000000 128 45 32768
}

# Compiling naive and flex attention takes most of a case's time, so few cases have them.
measure() {
    local results file
    results=$(python3 -c "from benchmarks.__main__ import default_file; print(default_file('cuda'))") || return
    file="$OUT/${results##*/}"
    [ ! -e "$results" ] || cp "$results" "$file"
    SECONDS=0
    local quick=(--without "naive, compiled" "flex attention" "PyTorch, compiled")
    local gradient=(--what "loss and gradient" --D 128 --dtype bfloat16)
    all "$file" "${gradient[@]}" --C 45 --B 256 --N 1e6
    all "$file" --what update --D 128 --dtype bfloat16 --B 256 --N 1e6
    all "$file" "${gradient[@]}" --C 45 "${quick[@]}"
    all "$file" "${gradient[@]}" --C 2 --B 256 1024 4096 --N 1e6 "${quick[@]}"
    all "$file" --what "training step" --N 1e6
    all "$file" "${gradient[@]}" --C 45 --B 64 256 1024 --N 1e4 1e6 8e6
    all "$file" "${quick[@]}"
    all "$file"
    cp "$file" "$results"
}

report() {
    for what in targets table; do python3 -m benchmarks "$what" --device cuda >"$OUT/$what.md"; done
    cat "$OUT/targets.md"
}

for stage in "$@"; do
    "$stage" 2>&1 | tee "$OUT/$stage.log"
    ended=${PIPESTATUS[0]}
    echo "== $stage ended with $ended"
    [ "$stage" != build ] || [ "$ended" = 0 ] || exit "$ended"
done
