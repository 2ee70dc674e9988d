#!/usr/bin/env bash
# Executes the notebooks.
#
#   scripts/notebook.sh [BITNET]             trains tiny models on this repository's own texts with the binary (default:
#                                            target/release/bitnet) and executes copies: a check that leaves nothing behind
#   scripts/notebook.sh --runs DIR [NAME]    executes notebooks/NAME.ipynb itself (default: qat_experiments), in place, on the
#                                            runs in DIR
#   scripts/notebook.sh --install            makes the environment and executes nothing
#
# Needs Python 3.11 and, the first time, PyPI: packages go into a virtual environment outside the repository,
# $NOTEBOOK_VENV or ~/.cache/bitnet-notebook.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${NOTEBOOK_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-notebook}

if [[ ! -x $venv/bin/jupyter-nbconvert ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        matplotlib==3.11.2 nbconvert==7.17.2 ipykernel==7.4.0
fi
[[ ${1-} == --install ]] && exit
# The environment's own kernel, whatever kernels the user has installed.
export JUPYTER_PATH=$venv/share/jupyter

execute() { # execute NAME RUNS ARGUMENT...: nbconvert with the runs' folder
    BITNET_RUNS=$2 "$venv/bin/jupyter-nbconvert" --to notebook --execute "${@:3}" "$root/notebooks/$1.ipynb"
}

if [[ ${1-} == --runs ]]; then
    [[ -d ${2-} ]] || { echo "usage: $0 --runs DIR [NAME]: no such folder: ${2-}" >&2 && exit 2; }
    execute "${3:-qat_experiments}" "$(cd "$2" && pwd)" --inplace
    exit
fi

bitnet=$(realpath "${1:-$root/target/release/bitnet}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check() { # check NAME RUNS PICTURES: executes a copy, which must show so many runs and pictures at least
    execute "$1" "$scratch/$1" --output-dir "$scratch"
    python3 - "$scratch/$1.ipynb" "$2" "$3" <<'PYTHON'
import json, sys
path, runs, least = sys.argv[1], sys.argv[2], int(sys.argv[3])
cells = json.load(open(path))["cells"]
outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
pictures = sum("image/png" in output.get("data", {}) for output in outputs)
texts = "".join("".join(output.get("text", [])) for output in outputs)
skipped = texts.count("skipped")
print(f"{len(cells)} cells, {pictures} pictures, {skipped} sections skipped")
if f"{runs} runs in " not in texts or pictures < least:
    sys.exit(f"{path}: the notebook did not show the runs")
PYTHON
}

cat >"$scratch/recipe.toml" <<TOML
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
vocab_size = 400
max_position_embeddings = 64
[data]
sequence_length = 64
train = [{ path = "$root/docs/performance.md", documents = "file" }]
validation = [{ path = "$root/README.md", documents = "file" }]
validation_bytes = 4000
[train]
batch_size = 4
steps = 60
eval_every = 10
save_every = 60
[optimizer]
peak_lr = 2e-3
warmup_steps = 5
[output]
dir = "bitnet"
TOML
train() { "$bitnet" train qat "$scratch/recipe.toml" --quiet -o "$scratch/qat_experiments/$1" "${@:2}" >/dev/null; }
train bitnet
train full --precision full
train slow --peak-lr 5e-4
check qat_experiments 3 6

for number in {1..12}; do
    echo "{\"prompt\": \"What comes after $number?\", \"completion\": \"After $number comes $((number + 1)).\"}"
done >"$scratch/numbers.jsonl"
tune() {
    "$bitnet" train lora --data "$scratch/numbers.jsonl" --validation-split 0.2 --steps 6 --eval-every 2 --max-length 48 \
        --gradient-accumulation 2 --prompt "What comes after 3?" --quiet -o "$scratch/lora_finetuning/$1" "${@:2}" >/dev/null
}
tune fast --rank 4 --alpha 8 --lr 2e-3
tune slow --rank 4 --alpha 8 --lr 2e-4
tune small --rank 2 --alpha 4 --lr 2e-3
check lora_finetuning 3 3

evaluate() {
    mkdir -p "$scratch/eval_summary/$1"
    "$bitnet" eval --quiet --data "$root/tests/fixtures/eval" --tasks arc_easy,boolq,piqa,hellaswag,lambada_openai --bootstrap 1000 \
        -o "$scratch/eval_summary/$1/items.jsonl" --report "$scratch/eval_summary/$1/report.json" "${@:2}" >/dev/null
}
evaluate exact
evaluate small --lm-head q4 --kv-cache int8
"$bitnet" eval --compare "$scratch/eval_summary/exact" "$scratch/eval_summary/small" \
    --report "$scratch/eval_summary/compare.json" >/dev/null
check eval_summary 2 3
