#!/usr/bin/env bash
# Everything continuous integration checks, cheapest first; stops at the first failure.
# Needs the pinned Rust toolchain, git and Python 3; no network once the crates are fetched, but for packages of the notebook, of
# the server's client and of CUDA's compiler from PyPI: without them these are passed over, and that is said. So are the CUDA
# kernels where there is no C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

fixtures_limit=8000000 # bytes, as SIZE_LIMIT in scripts/slim_fixtures.py
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

step() { # step HEADING COMMAND...: runs the command under a heading and says how long it took
    local heading=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$heading"
    if "$@"; then
        printf '   ok, %d s\n' $((SECONDS - began))
    else
        printf '   FAILED after %d s: %s\n' $((SECONDS - began)) "$heading" >&2
        exit 1
    fi
}

absent() { # absent PATTERN PATH...: fails where the extended regular expression occurs
    local pattern=$1 status=0
    shift
    git grep --untracked -nE -e "$pattern" -- "$@" || status=$?
    case $status in
    0) return 1 ;; # found, and printed above
    1) return 0 ;;
    *) return "$status" ;;
    esac
}

python_compiles() { PYTHONPYCACHEPREFIX=$scratch/pycache python3 -m py_compile scripts/*.py scripts/*/*.py; }

fixtures_are_small() {
    local bytes
    bytes=$(git ls-files -z --cached --others --exclude-standard -- tests/fixtures | xargs -0 cat | wc -c)
    echo "   $((bytes)) bytes of at most $fixtures_limit"
    ((bytes <= fixtures_limit))
}

dependencies_are_allowed() {
    if cargo deny --version >/dev/null 2>&1; then
        cargo deny check licenses bans sources
    else
        echo "   *** SKIPPED: cargo-deny is not installed, so licences, bans and sources were NOT checked ***"
        echo "   *** cargo install --locked cargo-deny ***"
    fi
}

documentation() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps; }

# The README's first command as on a fresh machine: no network, an empty home, a bare environment.
first_command() {
    cargo build --release || return
    local binary=${CARGO_TARGET_DIR:-target}/release/bitnet
    mkdir "$scratch/home"
    env -i PATH="$PATH" HOME="$scratch/home" HF_HUB_OFFLINE=1 \
        "$binary" generate "Once upon a time" --seed 0 --max-new-tokens 48 >"$scratch/story" || return
    cat "$scratch/story"
    (($(wc -w <"$scratch/story") >= 8)) || { echo "   hardly any text" >&2 && return 1; }
}

# Trains tiny models and executes the notebook on their metrics.
notebook_executes() {
    if ! timeout 300 scripts/notebook.sh --install; then
        echo "   *** SKIPPED: the notebook's packages cannot be had from PyPI, so it was NOT executed ***"
        return
    fi
    scripts/notebook.sh "${CARGO_TARGET_DIR:-target}/release/bitnet"
}

# OpenAI's own client for Python asks the server.
real_client() {
    if ! timeout 300 scripts/serve_clients.sh --light --install; then
        echo "   *** SKIPPED: OpenAI's client cannot be had from PyPI, so the server was NOT asked by it ***"
        return
    fi
    scripts/serve_clients.sh --light "${CARGO_TARGET_DIR:-target}/release/bitnet"
}

# Damaged files and requests, others each time, for a few seconds each: two programs of tests on two threads each.
# (With the features of the whole workspace, so that nothing is compiled again.)
mutated_inputs() {
    export BITNET_FUZZ_SECONDS=1 BITNET_FUZZ_SEED=$RANDOM
    cargo test --workspace --test mutated -- --nocapture --test-threads 2 &&
        cargo test --workspace --bin bitnet mutated -- --nocapture
}

# What libFuzzer makes of valid files and requests, for half a minute.
fuzzed_inputs() {
    local status=0
    scripts/fuzz.sh 10 >"$scratch/fuzzed" 2>&1 || status=$?
    case $status in
    0) grep -E '^(==|Done)' "$scratch/fuzzed" ;;
    77) tail -n 1 "$scratch/fuzzed" && echo "   *** SKIPPED: nothing was fuzzed ***" ;;
    *) tail -n 40 "$scratch/fuzzed" && return "$status" ;;
    esac
}

# Two processes under mpirun train as one does with twice the batch.
two_ranks() {
    local status=0
    scripts/mpi.sh --only-equality || status=$?
    ((status == 77)) || return "$status" # 77: passed over, and said so
}

# NVIDIA's compiler from PyPI compiles the kernels, and rustc checks what launches them.
cuda_compiles() {
    if ! timeout 600 scripts/cuda_toolkit.sh; then
        echo "   *** SKIPPED: CUDA's compiler cannot be had from PyPI, so neither its kernels nor its feature were compiled ***"
        return
    fi
    scripts/cuda_check.sh && scripts/cuda_types.sh
}

# Without it, tests/build.rs leaves the tests of the CUDA kernels out.
host_compiler_is_there() {
    "${CXX:-c++}" --version >/dev/null 2>&1 ||
        echo "   *** SKIPPED: no C++ compiler (${CXX:-c++}), so the CUDA kernels will NOT be tested on the host ***"
}

step "format" cargo fmt --all --check
step "file lengths" scripts/file_lengths.sh
step "dependency direction" python3 scripts/layers.py
step "no op without a gradient, no anonymous dimensions" \
    absent 'apply_op[123]_no_bwd|dims\(\)\[' 'bitnet-*/src'
step "kernels know neither Candle nor threads" absent 'candle|rayon' bitnet-model/src/kernels
step "size of the fixtures" fixtures_are_small
step "scripts compile" python_compiles
step "licences, bans, sources" dependencies_are_allowed
step "clippy" cargo clippy --workspace --all-targets -- -D warnings
step "a C++ compiler" host_compiler_is_there
step "tests" cargo test --workspace
step "damaged files and requests" mutated_inputs
step "files and requests that libFuzzer makes" fuzzed_inputs
step "two ranks over MPI" two_ranks
step "documentation" documentation
step "CUDA kernels and their feature" cuda_compiles
step "the README's first command" first_command
step "speed, in ratios" python3 scripts/ratio_gate.py "${CARGO_TARGET_DIR:-target}/release/bitnet"
step "the notebook" notebook_executes
step "a real client" real_client
printf '\nall checks passed, %d s\n' "$SECONDS"
