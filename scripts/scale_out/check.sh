#!/usr/bin/env bash
# Proves the ways of docs/scale-out.md to answer a file on many machines: each must give the answers of one `bitnet batch`.
#
#   scripts/scale_out/check.sh [BITNET]         default: target/release/bitnet
#
# Runs on this machine, with the embedded model. Needs Python 3; for the way of that name mpirun, GNU parallel, and in the Python that
# $SCALE_OUT_PYTHON names (default: python3) ray[data] and pyspark, the latter with Java 17. What is missing is passed over, and said.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
BITNET=$(realpath "${1:-$root/target/release/bitnet}")
export BITNET
python=${SCALE_OUT_PYTHON:-python3}
here=$root/scripts/scale_out
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

fail() { echo "   FAILED: $1" >&2 && exit 1; }

# Sampled as well as greedy, and one request that gets an error for an answer. Answers repeat U+2028, which ends a line for some
# readers.
odd=$'\xe2\x80\xa8'
for i in $(seq 23); do
    body="{\"prompt\": \"Once upon a time,$odd cat $i\", \"echo\": true, \"max_tokens\": 12, \"temperature\": $((i % 2)), \"seed\": $i}"
    echo "{\"custom_id\": \"r$i\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": $body}"
done >requests.jsonl
echo '{"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": "hot"}}' >>requests.jsonl
"$BITNET" batch -i requests.jsonl -o one.jsonl --threads 1 --quiet
grep -q "$odd" one.jsonl || fail "answers without U+2028 prove less"

same() { # same NAME FILE...: the answers in the files are those of one run
    python3 - one.jsonl "${@:2}" <<'PYTHON' || fail "$1"
import json, sys

def answers(paths):
    found = []
    for path in paths:
        for line in open(path, encoding="utf-8", newline="\n"):
            answer = json.loads(line)
            response = answer["response"]
            text = [choice["text"] for choice in response["body"].get("choices", [])]
            found.append((answer["custom_id"], response["status_code"], text))
    return sorted(found)

one, other = answers(sys.argv[1:2]), answers(sys.argv[2:])
assert len(one) == 24 and {status for _, status, _ in one} == {200, 400}, one
if one != other:
    sys.exit(f"   {[pair for pair in zip(one, other) if pair[0] != pair[1]][:2]}, {len(other)} answers")
PYTHON
    echo "   $1: the answers of one run"
}

echo "== Slurm array"
# No scheduler: the script is given what one gives it.
for task in $(seq 0 7); do
    SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1 bash "$here/slurm.sh" requests.jsonl slurm --quiet
done
same "eight tasks" slurm-*.jsonl

echo "== GNU parallel"
if command -v parallel >/dev/null; then
    PARALLEL="--jobs 2" "$here/parallel.sh" 3 requests.jsonl parallel --threads 1 --quiet
    same "three jobs" parallel-*.jsonl
else
    echo "   *** SKIPPED: GNU parallel is not installed ***"
fi

echo "== MPI"
if command -v mpirun >/dev/null; then
    mpirun --allow-run-as-root --oversubscribe --bind-to none -n 3 "$here/mpi.sh" requests.jsonl mpi --threads 1 --quiet
    same "three ranks" mpi-*.jsonl
    # A rank that was cut off in the middle of a line goes on.
    truncate --size=-20 mpi-1.jsonl
    mpirun --allow-run-as-root --oversubscribe --bind-to none -n 3 "$here/mpi.sh" requests.jsonl mpi --threads 1 --quiet
    same "three ranks, gone on" mpi-*.jsonl
else
    echo "   *** SKIPPED: mpirun is not installed ***"
fi

echo "== Ray Data"
if "$python" -c 'import ray.data' 2>/dev/null; then
    ray() { "$python" "$here/ray_batch.py" requests.jsonl ray.jsonl --block 5 --threads 1 -- "$BITNET" batch; }
    ray >ray.log 2>&1 || { tail -20 ray.log >&2 && fail "ray_batch.py"; }
    same "five blocks" ray.jsonl
    truncate --size=-2000 ray.jsonl
    ray >ray.log 2>&1 || { tail -20 ray.log >&2 && fail "ray_batch.py goes on"; }
    same "five blocks, gone on" ray.jsonl
else
    echo "   *** SKIPPED: ray[data] is not installed for $python ***"
fi

echo "== Spark"
if "$python" -c 'import pyspark' 2>/dev/null && command -v java >/dev/null; then
    PYSPARK_PYTHON=$(command -v "$python") "$python" "$here/spark_batch.py" "file://$scratch/requests.jsonl" "file://$scratch/spark" \
        --partitions 3 -- "$BITNET" batch >spark.log 2>&1 || { tail -20 spark.log >&2 && fail "spark_batch.py"; }
    same "three partitions" spark/part-*
else
    echo "   *** SKIPPED: pyspark is not installed for $python, or Java is missing ***"
fi
echo "   ok, $SECONDS s"
