#!/usr/bin/env bash
# The runs behind docs/experiments, one after the other; what is finished is not run again, what was cut short goes on.
#
#   scripts/experiments.sh [BITNET]
#
# Expects the texts in bitnet-train/recipes/corpora, and the conversion's model as runs/experiments/babyllama
# (scripts/llama2c_to_hf.py). Each run takes a few minutes on two cores; results are in runs/experiments, pictures in
# docs/experiments.
set -euo pipefail
cd "$(dirname "$0")/.."

bitnet=${1:-target/release/bitnet}
runs=runs/experiments
recipes=bitnet-train/recipes

run() { # run NAME RECIPE OPTIONS...
    local name=$1 recipe=$2
    shift 2
    [[ -d $runs/$name/latent ]] && return
    echo "== $name"
    "$bitnet" train qat "$recipes/$recipe.toml" --resume -o "$runs/$name" "$@"
}

run b158 scratch
run full scratch --precision full
run lr-3e-4 scratch --peak-lr 3e-4
run lr-3e-3 scratch --peak-lr 3e-3
run lr-1e-2 scratch --peak-lr 1e-2 --set train.stop_on_divergence=false --set train.stop_on_collapse=false
run distilled scratch --teacher "$runs/full/latent" --set data.tokenizer="$PWD/$runs/full/tokenizer.json"
for seed in 159 160; do
    run "b158-$seed" scratch --set train.seed=$seed
done
for seed in 158 159 160; do
    run "bf16-$seed" scratch --set train.seed=$seed --backward bf16
done
run warmup-linear conversion
run warmup-abrupt conversion --lambda-steps 0
run warmup-sigmoid conversion --set quantization.lambda_schedule=sigmoid
run warmup-exponential conversion --set quantization.lambda_schedule=exponential
run warmup-distilled conversion --teacher "$runs/babyllama"

plot() { # plot PICTURE WHAT RUNS...
    local picture=docs/experiments/$1.png what=$2
    shift 2
    "$bitnet" plot "${@/#/$runs/}" --what "$what" -o "$picture"
}
mkdir -p docs/experiments
plot precision nats-per-byte,loss b158 full
plot rates nats-per-byte,loss lr-3e-4 b158 lr-3e-3 lr-1e-2
plot distillation nats-per-byte b158 distilled full
plot conversion nats-per-byte,lambda warmup-linear warmup-abrupt warmup-sigmoid warmup-exponential warmup-distilled
plot codes codes,flips b158
