#!/usr/bin/env bash
# Compiles every CUDA kernel to PTX and that to machine code for all supported processors: no register may be spilled, and
# registers and shared memory must be those of the table in docs/cuda.md, give or take a few. Then the tests of the kernels execute
# the PTX (tests/ptx).
#
#   scripts/cuda_check.sh            # checks
#   scripts/cuda_check.sh --write    # writes the table
#
# Needs no device. Takes nvcc from NVCC, or from the folder of scripts/cuda_toolkit.sh, which must have run.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${NVCC:-${BITNET_CUDA_TOOLKIT:-$HOME/.cache/bitnet-cuda/13.4}/nvidia/cu13/bin/nvcc}
[[ -x $nvcc ]] || { echo "${0##*/}: no $nvcc: run scripts/cuda_toolkit.sh, or set NVCC" >&2 && exit 1; }
ptxas=$(dirname "$nvcc")/ptxas
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# As bitnet-model/build.rs compiles them: once for sm_75, once for all that came later.
flags=(-ptx -std=c++17 -O3 -fmad=false -Werror all-warnings -Wno-deprecated-gpu-targets)
for source in bitnet-model/src/cuda/*.cu; do
    name=$(basename "$source" .cu)
    for virtual in 75 80; do
        "$nvcc" "${flags[@]}" -arch="compute_$virtual" -o "$scratch/$name.$virtual.ptx" "$source"
    done
    for real in 75 80 86 89 90 100 120; do
        virtual=$((real < 80 ? 75 : 80))
        "$ptxas" -v -O3 -arch="sm_$real" -o "$scratch/cubin" "$scratch/$name.$virtual.ptx" 2>&1
    done
done >"$scratch/log"
python3 scripts/cuda_table.py "$scratch/log" "$@"
(($#)) || BITNET_CUDA_PTX=$scratch cargo test --workspace --test cuda
