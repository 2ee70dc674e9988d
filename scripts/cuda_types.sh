#!/usr/bin/env bash
# Checks the types of everything that the feature `cuda` adds, and lints it. Our kernels are compiled by the real nvcc of
# scripts/cuda_toolkit.sh, Candle's by a stand-in: nothing is linked, and neither a driver nor a device is needed.
#
#   scripts/cuda_types.sh [ARGUMENT...]      # arguments go to cargo clippy
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${BITNET_NVCC:-${BITNET_CUDA_TOOLKIT:-$HOME/.cache/bitnet-cuda/13.4}/nvidia/cu13/bin/nvcc}
[[ -x $nvcc ]] || { echo "${0##*/}: no $nvcc: run scripts/cuda_toolkit.sh, or set BITNET_NVCC" >&2 && exit 1; }
BITNET_NVCC=$nvcc NVCC=$PWD/scripts/nvcc_stand_in.sh CUDARC_CUDA_VERSION=13040 CUDA_COMPUTE_CAP=80 \
    cargo clippy -p bitnet-model -p bitnet-train -p bitnet-cli --features bitnet-model/cuda,bitnet-train/cuda,bitnet-cli/cuda \
    --locked "$@" -- -D warnings
