#!/usr/bin/env bash
# Fails when a source file has more than 500 lines.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files -z --cached --others --exclude-standard -- '*.rs' '*.cu' '*.cuh' '*.cpp' '*.hpp' '*.py' '*.sh' |
    xargs -0 wc -l |
    awk '$2 != "total" && $1 > 500 { print $2 ": " $1 " lines, at most 500"; bad = 1 } END { exit bad }'
