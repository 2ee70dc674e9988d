#!/usr/bin/env bash
# Builds the program with the feature `cuda` and every kernel in it, Candle's as well, by the nvcc of scripts/cuda_toolkit.sh, and lets it
# compute a few logits, which must be the processor's. Needs neither a driver nor a device: both are tests/ptx, which executes
# the PTX in the program (scripts/cuda_interpret.sh takes Candle's from a folder instead).
#
#   scripts/cuda_build.sh [ARGUMENT...]      # arguments go to cargo build: --release
#
# Candle's kernels alone take nvcc a quarter of an hour on two cores: for a nightly run.
set -euo pipefail
cd "$(dirname "$0")/.."

toolkit=${BITNET_CUDA_TOOLKIT:-$HOME/.cache/bitnet-cuda/13.4}/nvidia/cu13
[[ -x $toolkit/bin/nvcc ]] || { echo "${0##*/}: no $toolkit/bin/nvcc: run scripts/cuda_toolkit.sh" >&2 && exit 1; }
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/cuda-build
lib=$target/lib
scripts/cuda_stand_in.sh "$lib"
ln -sf "$toolkit"/lib/libcudart.so.* "$lib/libcudart.so"

env -u BITNET_NVCC NVCC="$toolkit/bin/nvcc" CUDARC_CUDA_VERSION=13040 CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}" LIBRARY_PATH="$lib" \
    CARGO_TARGET_DIR="$target" cargo build --locked -p bitnet-cli --features cuda "$@"

profile=debug
[[ " $* " != *" --release "* ]] || profile=release
export LD_LIBRARY_PATH=$lib:$toolkit/lib
for device in cpu cuda; do
    rm -f "$target/$device.safetensors"
    "$target/$profile/bitnet" logits -q -m tests/fixtures/bitnet_packed_tied --tokens 1,17,250,3 --device "$device" \
        -o "$target/$device.safetensors"
done
cmp "$target/cpu.safetensors" "$target/cuda.safetensors"
echo "the program computes the processor's logits"
