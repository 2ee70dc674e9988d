#!/usr/bin/env bash
# Builds the stand-in for the CUDA driver (tests/ptx) and puts it into a folder, under the names of all libraries that Candle links.
# For scripts/cuda_interpret.sh and scripts/cuda_build.sh.
#
#   scripts/cuda_stand_in.sh FOLDER
set -euo pipefail
folder=$(realpath -m "$1")
cd "$(dirname "$0")/.."

cargo build --locked -p ptx-interpreter
mkdir -p "$folder"
cp "${CARGO_TARGET_DIR:-target}/debug/libptx_interpreter.so" "$folder/libcuda.so"
for library in cublas cublasLt curand nvrtc cudart; do ln -sf libcuda.so "$folder/lib$library.so"; done
