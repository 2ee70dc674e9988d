#!/usr/bin/env bash
# Answers a file of requests with GNU parallel, a shard a job, on the machines that ssh reaches or on this one:
#
#   PARALLEL="--jobs 1 --sshlogin node1,node2 --workdir ." scripts/scale_out/parallel.sh 8 requests.jsonl answers -m MODEL
#
# Needs GNU parallel here, and on every machine `bitnet`, or the program that $BITNET names, and a folder they share. --jobs 1 is one
# job a machine, as one takes all cores. A job that fails is tried again and goes on where it was.
set -euo pipefail
shards=$1 requests=$2 answers=$3
last=$((shards - 1))

parallel --will-cite --retries 3 --joblog "$answers.log" --quote \
    "${BITNET:-bitnet}" batch -i "$requests" -o "$answers-{}.jsonl" --shard "{}/$shards" "${@:4}" \
    ::: $(seq 0 "$last")
