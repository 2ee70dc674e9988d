#!/usr/bin/env bash
# Proves data-parallel training over MPI with a tiny run on this machine: two ranks equal one with twice the batch, four with
# a teacher one with four times the batch, a killed rank ends the job, the job resumes to the bits of an undisturbed one,
# Ctrl-C saves.
#
#   scripts/mpi.sh [--only-equality] [BUILD OPTIONS, such as --release]
#
# Installs Open MPI and libclang with apt where they are missing and that is possible; otherwise says so and ends with 77.
set -euo pipefail
cd "$(dirname "$0")/.."

only_equality=false
if [[ ${1-} == --only-equality ]]; then
    only_equality=true
    shift
fi
# Debian's package of mpirun has mpicc, too, but not the header that it compiles with.
compiles() { echo '#include <mpi.h>' | mpicc -fsyntax-only -x c - 2>/dev/null; }
if ! command -v mpirun >/dev/null || ! compiles; then
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null ||
        ! { apt-get update -qq && apt-get install -y -qq libopenmpi-dev openmpi-bin libclang-dev; } >/dev/null 2>&1; then
        echo "   *** SKIPPED: Open MPI is not installed, so training over MPI was NOT checked ***" >&2
        echo "   *** apt-get install libopenmpi-dev openmpi-bin libclang-dev ***" >&2
        exit 77
    fi
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
began=$SECONDS
cargo build -p bitnet-cli --features mpi "$@"
echo "   built in $((SECONDS - began)) s"
profile=debug
for option in "$@"; do [[ $option == --release ]] && profile=release; done
# A copy: the next build without the feature replaces it.
cp "${CARGO_TARGET_DIR:-target}/$profile/bitnet" "$scratch/bitnet"

fail() { echo "   FAILED: $1" >&2 && exit 1; }

for i in $(seq 400); do
    echo "story $i: the $((i * 7 % 11)) little hens and the $i cats played in the garden, and the hen said: $((i * i % 17))"
done >"$scratch/corpus.txt"
cat >"$scratch/recipe.toml" <<'TOML'
[model]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 300
max_position_embeddings = 32
[data]
sequence_length = 32
train = [{ path = "corpus.txt", documents = "line" }]
validation = [{ path = "corpus.txt", documents = "line" }]
validation_bytes = 1000
[train]
batch_size = 4
steps = 200
eval_every = 50
save_every = 20
save_total_limit = 3
[optimizer]
peak_lr = 1e-3
warmup_steps = 5
[output]
dir = "run"
TOML

train() { # train RANKS OUTPUT OPTION...
    local ranks=$1 output=$scratch/$2
    shift 2
    local command=("$scratch/bitnet" train qat "$scratch/recipe.toml" --output "$output" "$@")
    if ((ranks > 1)); then
        # As root, and on fewer processors than ranks; mpirun waits this long before it tells the ranks to end, and again until it kills them.
        command=(mpirun --allow-run-as-root --oversubscribe --bind-to none --mca odls_base_sigkill_timeout 2 -n "$ranks" "${command[@]}")
    fi
    RAYON_NUM_THREADS=1 exec "${command[@]}"
}

same_weights() { cmp "$scratch/$1/step-200/model.safetensors" "$scratch/$2/step-200/model.safetensors"; }

same_losses() { # same_losses ONE MANY: of the first updates; later, the codes that a last bit flips decide (NUMERICS)
    python3 - "$scratch"/{"$1","$2"}/metrics.jsonl <<'PYTHON' || fail "losses differ"
import json, sys
one, many = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
assert len(one) == len(many), (len(one), len(many))
pairs = [(a, b) for a, b in zip(one, many) if a["kind"] == "train"]
off = [max(abs(a["terms"][term] - b["terms"][term]) for term in a["terms"]) for a, b in pairs]
print(f"   losses of the first update {off[0]:.1e} apart, of 10 at most {max(off[:10]):.1e}, of {len(off)} {max(off):.1e}")
assert max(off[:3]) < 1e-5
for a, b in pairs[:3]:
    assert a.get("weights", {}).keys() == b.get("weights", {}).keys(), (a, b)
    for term, weight in a.get("weights", {}).items():
        assert abs(weight - b["weights"][term]) <= 1e-4 * abs(weight), (term, weight, b["weights"][term])
PYTHON
}

wait_for() { # wait_for PATH: until it is there
    for _ in $(seq 3000); do [[ -e $1 ]] && return; sleep 0.02; done
    fail "$1 was not written"
}

echo "== two ranks × batch 4 equal one × batch 8"
(train 1 one --batch-size 8) >/dev/null 2>&1 || fail "one rank"
(train 2 two) >"$scratch/two.out" 2>"$scratch/two.err" || { cat "$scratch/two.err" >&2 && fail "two ranks"; }
(($(grep -c '^outcome' "$scratch/two.out") == 1)) || fail "more than one rank reports"
same_losses one two

echo "== four ranks × batch 2 with a teacher equal one × batch 8"
taught=(--steps 50 --set "distillation.teacher=$scratch/one/latent")
(train 1 one-taught --batch-size 8 "${taught[@]}") >/dev/null 2>&1 || fail "one rank with a teacher"
(train 4 four-taught --batch-size 2 "${taught[@]}") >/dev/null 2>"$scratch/four.err" ||
    { cat "$scratch/four.err" >&2 && fail "four ranks"; }
same_losses one-taught four-taught

$only_equality && exit

echo "== a killed rank ends the job, and it resumes to the same bits"
(train 2 killed) >/dev/null 2>"$scratch/killed.err" &
job=$!
wait_for "$scratch/killed/best.safetensors"
victim=$(pgrep -n -f "^$scratch/bitnet train")
kill -9 "$victim"
if wait "$job"; then fail "the job survived"; fi
grep -m 1 -i "signal 9" "$scratch/killed.err" || fail "no message about the killed rank"
[[ ! -e $scratch/killed/step-200 ]] || fail "the rank was killed too late"
(train 2 killed --resume) >/dev/null 2>&1 || fail "the job does not resume"
same_weights two killed || fail "the resumed job has other weights"

echo "== Ctrl-C saves once and ends all"
(train 2 interrupted --steps 2000) >/dev/null 2>"$scratch/interrupted.err" &
job=$!
wait_for "$scratch/interrupted/best.safetensors"
kill -TERM "$(pgrep -f "^mpirun .*$scratch/interrupted")"
if wait "$job"; then fail "the job went on"; fi
# The last word of the ranks may be lost with mpirun: what counts is that no update is.
last=$(grep '"kind":"train"' "$scratch/interrupted/metrics.jsonl" | wc -l)
[[ -d $scratch/interrupted/step-$last ]] || fail "the last update, $last, was not saved"
echo "   saved after update $last"
(train 2 interrupted --steps 2000 --resume) >/dev/null 2>&1 || fail "the job does not resume"
[[ -e $scratch/interrupted/step-2000 ]] || fail "the resumed job did not come to its end"
echo "   ok, $SECONDS s"
