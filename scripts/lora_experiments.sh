#!/usr/bin/env bash
# The runs behind docs/experiments/lora.md, one after the other; what is finished is not run again, what was cut short goes on.
#
#   scripts/lora_experiments.sh DATA [BITNET]
#
# DATA holds `rasbt_instruction-data.json` and `dolly_hhrlhf_train_small.jsonl` (instructions) and `gutenberg_oz.txt` (The
# Wonderful Wizard of Oz). The base is the model inside the program, and for what needs masters the b1.58 run of
# scripts/experiments.sh. Each run takes a few minutes on two cores; results are in runs/lora, pictures in docs/experiments.
set -euo pipefail
data=$(realpath "${1:?usage: $0 DATA [BITNET]}")
cd "$(dirname "$0")/.."
bitnet=${2:-target/release/bitnet}
runs=runs/lora
mkdir -p "$runs"

run() { # run NAME DATA OPTIONS...
    local name=$1 file=$data/$2
    shift 2
    [[ -e $runs/$name/done ]] && return
    echo "== $name"
    "$bitnet" train lora --data "$file" --resume --eval-every 40 -o "$runs/$name" "$@"
    touch "$runs/$name/done"
}

instructions=rasbt_instruction-data.json
ask=(--max-length 256 --prompt "Name three animals that live on a farm." --prompt "Rewrite the sentence: The cat chased the mouse.")
for lr in 2e-4 1e-3 3e-3; do
    run "lr-$lr" $instructions --lr $lr "${ask[@]}"
done
for rank in 4 128; do
    run "rank-$rank" $instructions --lr 1e-3 --rank $rank --alpha $((2 * rank)) "${ask[@]}"
done
run attention-only $instructions --lr 1e-3 --target-modules q_proj,k_proj,v_proj,o_proj "${ask[@]}"
run neftune $instructions --lr 1e-3 --neftune-alpha 5 "${ask[@]}"
run dolly dolly_hhrlhf_train_small.jsonl --lr 1e-3 --max-length 512 --prompt "What is a good way to make a friend?"

tale=gutenberg_oz.txt
tell=(--documents blank-line --max-length 256 --epochs 5 --lr 1e-3 --prompt "Dorothy")
run oz $tale "${tell[@]}"
masters=runs/experiments/b158/latent
run masters-adapter $tale -m "$masters" "${tell[@]}"
run masters-qat $tale -m "$masters" --mode qat "${tell[@]}"

plot() { # plot PICTURE RUNS...
    local picture=docs/experiments/$1.png
    shift
    "$bitnet" plot "${@/#/$runs/}" --what nats-per-byte,loss -o "$picture"
}
plot lora-rates lr-2e-4 lr-1e-3 lr-3e-3
plot lora-ranks rank-4 lr-1e-3 rank-128 attention-only neftune
plot lora-oz oz masters-adapter masters-qat

# What a merge destroys, measured on text held out from no run: the opening of the tale.
head -c 20000 "$data/$tale" | tail -c 16000 >"$runs/opening.txt"
for name in oz masters-adapter masters-qat; do
    base=$([[ $name == oz ]] && echo default || echo "$masters")
    "$bitnet" merge -m "$base" --adapter "$runs/$name/adapter" -o "$runs/$name/merged" --force --i-know \
        --text "$runs/opening.txt" | tee "$runs/$name/merge.txt" | tail -4
done
