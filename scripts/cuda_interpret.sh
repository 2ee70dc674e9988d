#!/usr/bin/env bash
# Runs the tests of a CUDA device (tests/device of bitnet-model and bitnet-train) without one: Candle's `Device::new_cuda`, our launches and the PTX
# that nvcc makes of all kernels, behind the stand-in for the driver of tests/ptx, which executes PTX.
#
#   scripts/cuda_interpret.sh [ARGUMENT...]      # arguments go to the tests: names, for example
#   scripts/cuda_interpret.sh --prepare          # builds all, runs nothing, and prints the test programs and their environment
#
# Three runs: as sm_80, the same with the threads of a block in descending order, and as sm_75. Needs the compiler of
# scripts/cuda_toolkit.sh. Has a target folder of its own, since what Candle builds here is not for a device; the first build takes
# as long as any first build.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${BITNET_NVCC:-${BITNET_CUDA_TOOLKIT:-$HOME/.cache/bitnet-cuda/13.4}/nvidia/cu13/bin/nvcc}
[[ -x $nvcc ]] || { echo "${0##*/}: no $nvcc: run scripts/cuda_toolkit.sh, or set BITNET_NVCC" >&2 && exit 1; }
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/cuda-interpret
ptx=$target/ptx lib=$target/lib
mkdir -p "$ptx"

compile() { # compile SOURCE NAME FLAG...: makes NAME.ptx, unless it is newer than all that it may be made of
    local source=$1 to=$ptx/$2.ptx
    shift 2
    [[ $to -nt $source && ! $(find "$(dirname "$source")" -name '*.cuh' -newer "$to") ]] && return
    "$nvcc" -ptx -std=c++17 -O3 "$@" -o "$to.part" "$source"
    mv "$to.part" "$to"
}
# Ours as bitnet-model/build.rs compiles them, Candle's as its own build does; of those, what a model without floats calls.
for source in bitnet-model/src/cuda/*.cu; do
    for capability in 75 80; do
        compile "$source" "$(basename "$source" .cu).$capability" -fmad=false -Wno-deprecated-gpu-targets "-arch=compute_$capability"
    done
done
candle=$(cargo metadata --locked --format-version 1 --all-features --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(*[os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "candle-kernels"])')
for name in affine binary cast fill indexing ternary unary; do
    compile "$candle/src/$name.cu" "$name" --expt-relaxed-constexpr --default-stream per-thread -arch=compute_80
done

CARGO_TARGET_DIR=$target/build scripts/cuda_stand_in.sh "$lib"

# Neither Candle's kernels nor ours are compiled into the programs: they name them, and the stand-in takes them from the folder.
variables=(NVCC="$PWD/scripts/nvcc_stand_in.sh" CUDARC_CUDA_VERSION=13040 CUDA_COMPUTE_CAP=80 LIBRARY_PATH="$lib"
    LD_LIBRARY_PATH="$lib" CARGO_TARGET_DIR="$target/build")
test=(env -u BITNET_NVCC "${variables[@]}" cargo test -p bitnet-model -p bitnet-train --features bitnet-model/cuda,bitnet-train/cuda --test device --locked)
if [[ ${1-} == --prepare ]]; then
    "${test[@]}" --no-run --message-format json |
        python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["target"]["name"] == "device":
        print(message["executable"])'
    printf 'LD_LIBRARY_PATH=%s\nBITNET_CUDA_PTX=%s\n' "$lib" "$ptx"
    exit
fi
for run in BITNET_CUDA_CAPABILITY=80 BITNET_CUDA_ORDER=descending BITNET_CUDA_CAPABILITY=75; do
    echo "== $run"
    BITNET_CUDA_PTX=$ptx "${test[@]:0:3}" "$run" "${test[@]:3}" -- "$@"
done
