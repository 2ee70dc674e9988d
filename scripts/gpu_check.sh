#!/usr/bin/env bash
# Everything that is to be checked and measured on an NVIDIA device, by one command; writes a report in Markdown.
#
#   scripts/gpu_check.sh [REPORT]      # default: gpu-report.md
#   scripts/gpu_check.sh --try         # the same steps, small, on the stand-in for the driver of tests/ptx: tries this script
#
# Needs a device of compute capability 7.5 or later with its driver, the CUDA toolkit (nvcc 11.4 to 13.4, taken from NVCC, CUDA_HOME or
# PATH), a C++ compiler and Rust. The first build takes about a quarter of an hour, most of it Candle's kernels.
#
# Exit status: 0; 1 if something is wrong, all other steps having run; 2 without a compiler, 3 without a driver, 4 without a device.
set -euo pipefail
cd "$(dirname "$0")/.."

trying= report=gpu-report.md
case ${1-} in
--try) trying=1 report=gpu-report-try.md ;;
-*) echo "${0##*/}: there is no option $1" >&2 && exit 2 ;;
?*) report=$1 ;;
esac
log=${CARGO_TARGET_DIR:-target}/gpu-check
mkdir -p "$log" && rm -f "$log"/*

missing() { # missing STATUS WHAT-TO-DO...: says so, and ends
    local status=$1
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$status"
}

find_compiler() { # as bitnet-model/build.rs does
    local toolkit=${CUDA_HOME:-${CUDA_PATH:-}}
    nvcc=${NVCC:-${toolkit:+$toolkit/bin/}nvcc}
    command -v "$nvcc" >/dev/null || missing 2 "no $nvcc: install the CUDA toolkit (11.4 to 13.4), and set NVCC or CUDA_HOME to it"
    toolkit_version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    local oldest_first
    oldest_first=$(printf '%s\n' 11.4 "$toolkit_version" 13.4 | sort --version-sort | sed -n 2p)
    [[ $oldest_first == "$toolkit_version" ]] ||
        missing 2 "$nvcc is of version ${toolkit_version:-unknown}, but Candle's bindings know 11.4 to 13.4: set NVCC to another one"
    command -v "${CXX:-g++}" >/dev/null || missing 2 "no C++ compiler ${CXX:-g++}, which nvcc needs"
    command -v cargo >/dev/null || missing 2 "no cargo: https://rustup.rs"
}

find_device() {
    local folder
    driver_library=$(ldconfig -p 2>/dev/null | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -n 1)
    while IFS= read -r -d : folder; do
        [[ $folder && -e $folder/libcuda.so.1 ]] && driver_library=$folder/libcuda.so.1
    done <<<"${LD_LIBRARY_PATH-}:"
    [[ $driver_library ]] ||
        missing 3 "no libcuda.so.1: install NVIDIA's driver; in a container, start it with --gpus all"
    command -v nvidia-smi >/dev/null || missing 3 "no nvidia-smi, which comes with NVIDIA's driver"
    local fields=name,driver_version,compute_cap,memory.total
    devices=$(nvidia-smi --query-gpu="$fields" --format=csv,noheader) ||
        missing 4 "nvidia-smi finds no device: ${devices:-it says nothing}"
    [[ $devices ]] || missing 4 "nvidia-smi lists no device"
    local capability
    capability=$(head -n 1 <<<"$devices" | cut -d, -f3 | tr -d ' ')
    ((${capability/./} >= 75)) || missing 4 "device 0 has compute capability $capability; 7.5 is needed"
}

# Instead of a device: the program and the driver of scripts/cuda_interpret.sh.
prepare_stand_in() {
    local prepared
    prepared=$(scripts/cuda_interpret.sh --prepare)
    while IFS= read -r line; do
        [[ $line == *=* ]] && export "${line?}"
    done <<<"$prepared"
    export NVCC=$PWD/scripts/nvcc_stand_in.sh CUDARC_CUDA_VERSION=13040 CUDA_COMPUTE_CAP=80 LIBRARY_PATH=$LD_LIBRARY_PATH
    CARGO_TARGET_DIR=$(dirname "$LD_LIBRARY_PATH")/build
    export CARGO_TARGET_DIR
    devices="the stand-in of tests/ptx" toolkit_version="(stand-in)" nvcc=$NVCC
}

steps=() failed=
step() { # step NAME COMMAND...: its output goes to a file; what it came to, into the report
    local name=$1 began=$SECONDS status=0 result=ok
    shift
    printf '%-9s ' "$name"
    "$@" >"$log/$name.out" 2>"$log/$name.err" || status=$?
    if ((status)); then
        result="FAILED with status $status" failed=1
        { tail -n 3 "$log/$name.err" "$log/$name.out" || true; } >&2
    fi
    printf '%s, %d s\n' "$result" $((SECONDS - began))
    steps+=("| $name | $result | $((SECONDS - began)) |")
    return "$status"
}

if [[ $trying ]]; then
    prepare_stand_in
    profile=debug build=() small=(--try) model=tests/fixtures/bitnet_packed_tied prompt=4 tokens=2
else
    find_compiler
    find_device
    profile=release build=(--release) small=() model=synthetic:2b-4t prompt=512 tokens=64
fi
bitnet=${CARGO_TARGET_DIR:-target}/$profile/bitnet

same_text() { # the embedded model, greedily, on both
    local options=(generate "Once upon a time" --temperature 0 --max-new-tokens "$((trying ? 2 : 96))" --quiet)
    "$bitnet" "${options[@]}" >"$log/cpu.txt" && "$bitnet" "${options[@]}" --device cuda >"$log/cuda.txt" || return
    cat "$log/cuda.txt"
    diff "$log/cpu.txt" "$log/cuda.txt"
}

products() {
    # Nothing is compiled for speed where no speed is measured.
    if [[ $trying ]]; then
        cargo bench --profile dev -p bitnet-model --features cuda --bench cuda --locked -- "${small[@]}"
    else
        cargo bench -p bitnet-model --features cuda --bench cuda --locked
    fi
}

if step build cargo build "${build[@]}" -p bitnet-cli --features cuda --locked; then
    step tests cargo test "${build[@]}" -p bitnet-model -p bitnet-train --features bitnet-model/cuda,bitnet-train/cuda --test device --locked ||
        true
    step doctor "$bitnet" doctor --quiet || true
    step text same_text || true
    step products products || true
    step model "$bitnet" bench -m "$model" --device cuda -p "$prompt" -n "$tokens" -r "$((trying ? 1 : 5))" --markdown --quiet || true
fi

section() { # section HEADING NAME [LANGUAGE]: what a step printed
    [[ -s $log/$2.out || -s $log/$2.err ]] || return 0
    printf '\n## %s\n\n' "$1"
    [[ -z ${3-} ]] || printf '```%s\n' "$3"
    if [[ -s $log/$2.out ]]; then cat "$log/$2.out"; else tail -n 20 "$log/$2.err"; fi
    [[ -z ${3-} ]] || printf '```\n'
}
{
    printf '# On a device\n\n'
    printf -- '- devices (name, driver, compute capability, memory): %s\n' "${devices//$'\n'/; }"
    printf -- '- toolkit: nvcc %s\n' "$toolkit_version"
    printf -- '- bitnet: %s\n' "$(git describe --always --dirty 2>/dev/null || echo "not from git")"
    printf -- '- system: %s, %s\n\n' "$(uname -sr)" "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
    printf '| step | result | seconds |\n|---|---|---:|\n'
    printf '%s\n' "${steps[@]}"
    section "Ternary products" products
    section "A model" model
    section "What the embedded model says on the device" text text
    section "bitnet doctor" doctor text
    section "Tests of the device" tests text
} >"$report"
echo "$report is written; what the steps said is in $log"
[[ ! $failed ]]
