#!/usr/bin/env bash
# Feeds the readers of files and requests with whatever libFuzzer thinks of; stops at the first input that a reader panics on, hangs
# at or takes too much memory for, and says where it lies.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]      60 seconds each of gguf, request and safetensors; 1200: an hour in all
#
# Needs a C++ compiler for libFuzzer, which a crate brings. Inputs that reach new code are kept in fuzz/corpus, those that fail in
# fuzz/artifacts. The first input of a program is a valid one of tests/mutated.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
targets=("${@:2}")
((${#targets[@]})) || targets=(gguf request safetensors)
"${CXX:-c++}" --version >/dev/null 2>&1 || { echo "${0##*/}: no C++ compiler (${CXX:-c++})" >&2 && exit 77; }

target_dir=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# With the features of the whole workspace, so that nothing but its own crates is compiled again.
BITNET_FUZZ_CORPUS=$PWD/fuzz/corpus cargo test --quiet --workspace --test mutated seeds_of_the_fuzzer -- --ignored
RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/rustc_counters.sh \
    cargo build --workspace --features bitnet-fuzz/libfuzzer "${targets[@]/#/--bin=fuzz_}"

seed() { # what is valid, to begin with
    mkdir -p "fuzz/corpus/$1" "fuzz/artifacts/$1"
    case $1 in
    request)
        printf '\0%s' '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "n": 2, "logprobs": true, "top_logprobs": 3, "stop": ["a"], "tools": [{"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}], "tool_choice": "auto"}' >fuzz/corpus/request/chat
        printf '\1%s' '{"prompt": ["a", [1, 2]], "max_tokens": 5, "echo": true, "logprobs": 2, "temperature": 0.5, "logit_bias": {"5": 1}, "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}}' >fuzz/corpus/request/text
        printf '\2%s' '{"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "instructions": "b", "text": {"format": {"type": "json_object"}}}' >fuzz/corpus/request/response
        ;;
    esac
}

for target in "${targets[@]}"; do
    printf '\n== %s\n' "$target"
    seed "$target"
    "$target_dir/debug/fuzz_$target" "fuzz/corpus/$target" -artifact_prefix="fuzz/artifacts/$target/" -max_total_time="$seconds" \
        -rss_limit_mb=4096 -timeout=20 -max_len=65536 -print_final_stats=1
done
