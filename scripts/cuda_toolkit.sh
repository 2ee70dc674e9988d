#!/usr/bin/env bash
# Installs what of NVIDIA's CUDA toolkit compiles kernels, from PyPI, into a folder, and prints where nvcc is.
#
#   scripts/cuda_toolkit.sh [FOLDER]      # default: BITNET_CUDA_TOOLKIT, or ~/.cache/bitnet-cuda/13.4
#
# 127 MB to download, 500 MB in the folder; x86-64 Linux, Python 3 with pip, and g++. No driver and no device are needed, and
# none are installed. A folder that is complete is left as it is. 13.4 is the last version that Candle 0.11's cudarc knows.
set -euo pipefail

folder=${1:-${BITNET_CUDA_TOOLKIT:-$HOME/.cache/bitnet-cuda/13.4}}
nvcc=$folder/nvidia/cu13/bin/nvcc
packages=(nvidia-cuda-nvcc==13.4.92 nvidia-nvvm==13.4.92 nvidia-cuda-crt==13.4.92 nvidia-cuda-runtime==13.4.92
    nvidia-cuda-cccl==13.3.4.3.1)

if [[ ! -x $nvcc ]]; then
    mkdir -p "$(dirname "$folder")"
    part=$(mktemp -d "$folder.XXXXXX")
    trap 'rm -rf "$part"' EXIT
    python3 -m pip install --quiet --no-deps --no-compile --target "$part" "${packages[@]}" >&2
    chmod 755 "$part"
    # What links against libcuda or libcudart asks for lib64 and for names without a version.
    ln -s lib "$part/nvidia/cu13/lib64"
    rm -rf "$folder"
    mv "$part" "$folder"
fi
"$nvcc" --version >/dev/null
echo "$nvcc"
