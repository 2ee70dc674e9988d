#!/usr/bin/env bash
# Executes notebooks/qat_experiments.ipynb.
#
#   scripts/notebook.sh [BITNET]      trains tiny models on this repository's own texts with the binary (default:
#                                     target/release/bitnet) and executes a copy: a check that leaves nothing behind
#   scripts/notebook.sh --runs DIR    executes the notebook itself, in place, on the runs in DIR
#   scripts/notebook.sh --install     makes the environment and executes nothing
#
# Needs Python 3.11 and, the first time, PyPI: packages go into a virtual environment outside the repository,
# $NOTEBOOK_VENV or ~/.cache/bitnet-notebook.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${NOTEBOOK_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-notebook}
notebook=$root/notebooks/qat_experiments.ipynb

if [[ ! -x $venv/bin/jupyter-nbconvert ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        matplotlib==3.11.2 nbconvert==7.17.2 ipykernel==7.4.0
fi
[[ ${1-} == --install ]] && exit
# The environment's own kernel, whatever kernels the user has installed.
export JUPYTER_PATH=$venv/share/jupyter

execute() { # execute RUNS ARGUMENT...: nbconvert with the runs' folder
    BITNET_RUNS=$1 "$venv/bin/jupyter-nbconvert" --to notebook --execute "${@:2}" "$notebook"
}

if [[ ${1-} == --runs ]]; then
    [[ -d ${2-} ]] || { echo "usage: $0 --runs DIR: no such folder: ${2-}" >&2 && exit 2; }
    execute "$(cd "$2" && pwd)" --inplace
    exit
fi

bitnet=$(realpath "${1:-$root/target/release/bitnet}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
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
dir = "runs/bitnet"
TOML
train() { "$bitnet" train qat "$scratch/recipe.toml" --quiet -o "$scratch/runs/$1" "${@:2}" >/dev/null; }
train bitnet
train full --precision full
train slow --peak-lr 5e-4
execute "$scratch/runs" --output-dir "$scratch"
python3 - "$scratch/qat_experiments.ipynb" <<'PYTHON'
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
pictures = sum("image/png" in output.get("data", {}) for output in outputs)
texts = "".join("".join(output.get("text", [])) for output in outputs)
skipped = texts.count("skipped")
print(f"{len(cells)} cells, {pictures} pictures, {skipped} sections skipped")
if "3 runs in " not in texts or pictures < 6:
    sys.exit("the notebook did not show the runs")
PYTHON
