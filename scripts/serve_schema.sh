#!/usr/bin/env bash
# Checks with Schemathesis that `bitnet serve` is as its /openapi.json says, whatever it is asked: no status of the 5xx, no status,
# type, header or field that is not described, nothing answered that the description forbids.
#
#   scripts/serve_schema.sh [BITNET] [--seconds N] [--seed N] [--schema FILE]
#
# BITNET is target/release/bitnet by default; it asks for 120 s, by a seed of its own unless one is given, which its report
# shows; and by the description in FILE instead of the server's own. What the description allows may still be refused:
# it cannot say how large a vocabulary is, or that `stream_options` needs `stream`.
#
# Needs Python 3.10 and, the first time, PyPI: Schemathesis goes into $CLIENTS_CACHE or ~/.cache/bitnet-clients.
set -euo pipefail
cd "$(dirname "$0")/.."

bitnet=target/release/bitnet seconds=120 seed=() schema=
while (($#)); do
    case $1 in
    --seconds) seconds=$2 && shift 2 ;;
    --seed) seed=(--seed "$2") && shift 2 ;;
    --schema) schema=$(realpath -e "$2") && shift 2 ;;
    *) bitnet=$1 && shift ;;
    esac
done
bitnet=$(realpath -e "$bitnet")

package=schemathesis==4.32.5
venv=${CLIENTS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-clients}/schemathesis
if [[ $(cat "$venv/packages" 2>/dev/null) != "$package" ]]; then
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$package"
    echo "$package" >"$venv/packages"
fi

scratch=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null; rm -rf "$scratch"' EXIT
# A key that may load adapters, though there are none to load; the Hub is not asked.
key=a-key-of-this-check
BITNET_API_KEYS=admin:$key HF_HUB_OFFLINE=1 \
    "$bitnet" serve --quiet --port 0 --max-batch 8 --max-queue 256 --max-new-tokens 16 >"$scratch/said" &
server=$!
for _ in {1..600}; do
    base=$(sed -n 's/^listening on //p' "$scratch/said")
    [[ -n $base ]] && curl --silent --fail --output "$scratch/ready" "$base/ready" && break
    kill -0 "$server" || { echo "the server ended" >&2 && exit 1; }
    sleep 0.1
done

cd "$scratch" # Schemathesis writes where it runs
ask() { # ask PHASES OPTION...
    "$venv/bin/python" "$venv/bin/st" run "${schema:-$base/openapi.json}" --url "$base" --header "Authorization: Bearer $key" \
        --phases "$1" --checks all "${@:2}" "${seed[@]}" --request-timeout 60 --generation-database none \
        --continue-on-failure --warnings off --output-sanitize false --no-color
}
printf '== each field, right and wrong\n'
ask coverage --exclude-checks positive_data_acceptance
# Numbers are f32 to the server: one that is beyond a bound by less is at the bound, which chance finds now and then.
printf '\n== whatever comes to mind\n'
ask fuzzing,stateful --exclude-checks positive_data_acceptance,negative_data_rejection --max-time "$seconds"

kill "$server"
status=0
wait "$server" || status=$?
server=
((status == 0)) || { echo "the server ended with status $status" >&2 && exit 1; }
