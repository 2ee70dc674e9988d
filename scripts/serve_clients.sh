#!/usr/bin/env bash
# Checks that clients of OpenAI's API that people use, unmodified, get from `bitnet serve` what `bitnet generate`, `bitnet chat`
# and `bitnet logits` say.
#
#   scripts/serve_clients.sh [BITNET]             all of them; BITNET is target/release/bitnet by default
#   scripts/serve_clients.sh [BITNET] --light     OpenAI's client for Python only, some seconds
#   scripts/serve_clients.sh --install [--light]  makes the environments and checks nothing
#
# Needs Python 3.10 and, the first time, PyPI and npm: packages go into $CLIENTS_CACHE or ~/.cache/bitnet-clients. Without Node 20
# its client is passed over, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."

bitnet=target/release/bitnet light= install=
for argument; do
    case $argument in --light) light=yes ;; --install) install=yes ;; *) bitnet=$argument ;; esac
done
cache=${CLIENTS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-clients}
export PYTHONDONTWRITEBYTECODE=1 # this checks a tree, and leaves nothing in it
# What the clients would else tell or ask others than our server.
export DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 LITELLM_LOCAL_MODEL_COST_MAP=True LANGCHAIN_TRACING_V2=false
unset "${!OPENAI_@}"
export NO_PROXY=127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}
# They are not to talk about themselves.
export TQDM_DISABLE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error LMEVAL_LOG_LEVEL=ERROR

environment() { # environment NAME PACKAGE...: the packages from PyPI in $cache/NAME, their versions pinned
    local venv=$cache/$1
    [[ $(cat "$venv/packages" 2>/dev/null) != "${*:2}" ]] || return 0
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
    echo "${*:2}" >"$venv/packages"
}

node_package() { # node_package PACKAGE: from npm in $cache/node
    [[ $(cat "$cache/node/packages" 2>/dev/null) != "$1" ]] || return 0
    mkdir -p "$cache/node"
    npm install --prefix "$cache/node" --silent --no-audit --no-fund --ignore-scripts --save-exact "$1"
    echo "$1" >"$cache/node/packages"
}

has_node() { command -v npm >/dev/null && node -e 'process.exitCode = parseInt(process.versions.node) < 20 ? 1 : 0'; }

environment openai openai==3.57.0
if [[ -z $light ]]; then
    environment libraries litellm==1.110.2 langchain-openai==1.7.4 llm==0.36
    environment lm_eval "lm_eval[api]==0.4.13" transformers==5.24.0
    ! has_node || node_package openai@6.49.0 # the last that runs on Node 20
fi
[[ -z $install ]] || exit 0

bitnet=$(realpath -e "$bitnet")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HOME=$scratch/huggingface LLM_USER_PATH=$scratch/llm

client() { # client ENVIRONMENT SCRIPT ARGUMENT...
    printf '\n== %s\n' "$2"
    "$cache/$1/bin/python" "scripts/clients/$2.py" "$bitnet" "${@:3}" || { echo "   FAILED: $2" >&2 && exit 1; }
}

client openai openai_python
client openai openai_adapters "$scratch/adapter"
if [[ -z $light ]]; then
    printf '\n== openai_node\n'
    if has_node; then
        node scripts/clients/openai_node.mjs "$bitnet" "$cache/node" || { echo "   FAILED: openai_node" >&2 && exit 1; }
    else
        echo "   *** SKIPPED: Node 20 with npm is not installed, so OpenAI's client for it was NOT checked ***"
    fi
    client libraries litellm_client
    client libraries langchain_client
    client libraries llm_client
    client lm_eval lm_eval_client "$scratch/lm_eval"
fi
printf '\nclients get what they are to get, %d s\n' "$SECONDS"
