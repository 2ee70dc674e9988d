#!/usr/bin/env bash
# Tries the web page of `bitnet serve` in a headless Chromium: streaming, Stop, keyboard, charts, keys, hostile replies, the
# Content-Security-Policy, accessibility in light and dark, and narrow screens.
#
#   scripts/page_check.sh [BITNET]             # starts BITNET serve (default target/release/bitnet) with the embedded model
#   scripts/page_check.sh --url URL            # or takes a server without keys that runs
#   scripts/page_check.sh ... --pictures DIR   # keeps pictures of what was seen
#   scripts/page_check.sh ... --only TEXT      # runs the checks whose names have TEXT
#
# Needs Node 20 or later with npm, and Chromium (CHROMIUM, default `chromium` of PATH); without them it exits with 77. The
# first run installs two packages from npm in a folder (BITNET_PAGE_CACHE, default ~/.cache/bitnet-page).
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${BITNET_PAGE_CACHE:-$HOME/.cache/bitnet-page}
packages=(playwright-core@1.65.1 axe-core@4.14.1) # drives the browser, knows the rules of accessibility

missing() { printf '%s: needs %s; not run\n' "${0##*/}" "$1" >&2 && exit 77; }

browser=$(command -v "${CHROMIUM:-chromium}") || missing "Chromium (apt-get install chromium, or its path in CHROMIUM)"
command -v npm >/dev/null || missing "Node 20 or later with npm (apt-get install nodejs npm)"
node -e 'process.exitCode = parseInt(process.versions.node) < 20 ? 1 : 0' || missing "Node 20 or later"

if [[ $(cat "$cache/.complete" 2>/dev/null) != "${packages[*]}" ]]; then
    mkdir -p "$cache"
    npm install --prefix "$cache" --no-audit --no-fund --ignore-scripts --save-exact "${packages[@]}" ||
        missing "${packages[*]} from npm, which cannot be had"
    printf '%s' "${packages[*]}" >"$cache/.complete"
fi

BITNET_PAGE_CACHE=$cache CHROMIUM=$browser exec node scripts/page_check.mjs "$@"
