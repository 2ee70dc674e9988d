#!/usr/bin/env bash
# Answers a file of requests in a Slurm array, a shard a task; a task that is requeued goes on where it was.
#
#   sbatch scripts/scale_out/slurm.sh requests.jsonl answers -m microsoft/bitnet-b1.58-2B-4T
#
# Needs `bitnet`, or the program that $BITNET names, and both files on every node. Answers are answers-0.jsonl to answers-7.jsonl.
#SBATCH --job-name=bitnet-batch
#SBATCH --array=0-7
#SBATCH --cpus-per-task=16
#SBATCH --mem=4G
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# Written down and not $SLURM_ARRAY_TASK_COUNT, which is 1 when a single task is sent again (sbatch --array=3).
shards=8

exec "${BITNET:-bitnet}" batch -i "$1" -o "$2-$SLURM_ARRAY_TASK_ID.jsonl" --shard "$SLURM_ARRAY_TASK_ID/$shards" \
    --threads "${SLURM_CPUS_PER_TASK:-1}" "${@:3}"
