#!/usr/bin/env bash
# rustc for the crates of this workspace (RUSTC_WORKSPACE_WRAPPER), with the counters that libFuzzer follows; nothing of it is
# unstable. Other crates are compiled as always, so what was compiled before is taken. scripts/fuzz.sh uses it.
set -euo pipefail
case " $* " in
*" --crate-name build_script_build "*) exec "$@" ;; # programs of their own, which are linked without libFuzzer
esac
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
