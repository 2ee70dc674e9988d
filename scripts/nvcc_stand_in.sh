#!/usr/bin/env bash
# Takes the place of nvcc for kernels that are not ours, where only types are checked: answers what it is asked for, and
# writes empty files. Candle's own kernels take the real one a quarter of an hour.
set -euo pipefail

while (($#)); do
    case $1 in
    --version) printf '\n\n\nCuda compilation tools, release 13.4, V13.4.92\n' ;;
    --list-gpu-code) printf 'sm_80\n' ;;
    -o | --output-file)
        : >"$2"
        shift
        ;;
    esac
    shift
done
