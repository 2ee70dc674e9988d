#!/usr/bin/env python3
"""Count the kernels that one token of decoding launches, and compare with the table in docs/cuda.md, or write it.

    scripts/cuda_launches.py [--write]

Runs a tiny model of 2B-4T's architecture on the stand-in for the driver (scripts/cuda_interpret.sh), which traces what is
really launched. Every layer launches the same kernels whatever its widths, so what is between two attentions is a layer, and
2B-4T has 30 of them. Standard library only.
"""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- table of scripts/cuda_launches.py -->\n", "<!-- end of its table -->\n"
LAYERS = 30  # of 2B-4T
LAST = "attention_merge"  # once a layer


def traced():
    """The kernels of a token in order, and the number of layers."""
    done = subprocess.run([ROOT / "scripts/cuda_interpret.sh", "--prepare"], stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.split()
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    environment = {**os.environ, **variables, "BITNET_CUDA_TRACE": "1"}
    for program in (line for line in lines if "=" not in line):
        command = [program, "--exact", "a_token_is_launched", "--nocapture"]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        if found := re.search(r"begin: a token of (\d+) layers\n(.*?)\nend\n", run.stdout, re.DOTALL):
            return [line.split()[0] for line in found[2].splitlines()], int(found[1])
    sys.exit("no token was traced")


def table(kernels, layers):
    ends = [i for i, kernel in enumerate(kernels) if kernel == LAST]
    if len(ends) != layers or layers < 2:
        sys.exit(f"{len(ends)} attentions for {layers} layers")
    layer = kernels[ends[0] + 1 : ends[1] + 1]
    if len({tuple(kernels[a + 1 : b + 1]) for a, b in zip(ends, ends[1:])}) != 1:
        sys.exit("layers differ")
    per_layer, all_of_it = collections.Counter(layer), collections.Counter(kernels)
    outside = all_of_it - collections.Counter({kernel: layers * count for kernel, count in per_layer.items()})
    lines = ["| kernel | a layer | beside the layers |", "| --- | --- | --- |"]
    for kernel in sorted(all_of_it):
        lines.append(f"| `{kernel}` | {per_layer[kernel]} | {outside[kernel]} |")
    sums = sum(per_layer.values()), sum(outside.values())
    lines.append(f"| all | {sums[0]} | {sums[1]} |")
    total = f"\nA token of 2B-4T: {LAYERS} · {sums[0]} + {sums[1]} = {LAYERS * sums[0] + sums[1]} launches.\n"
    return "\n".join(lines) + "\n" + total


def main():
    found = table(*traced())
    before, rest = DOCUMENT.read_text().split(BEGIN)
    old, after = rest.split(END)
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(before + BEGIN + found + END + after)
    elif old != found:
        print(f"docs/cuda.md says otherwise; launched is:\n{found}")
        return 1
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
