#!/usr/bin/env python3
"""Fail where a kernel has lost its speed: ratios of what `bitnet bench` measures in one sitting, never times.

    scripts/ratio_gate.py [BITNET]     # default: target/release/bitnet

* kernel / portable kernel, for one token on weights in the cache and for a prompt: every kernel of this processor, in
  turn and in several rounds;
* bytes of ternary weights that the fastest kernel multiplies a second / bytes that can be read a second.

One thread, and the best sample of all.  Samples take milliseconds: on a busy machine some run undisturbed, and the
bounds are half of what an idle one reaches.  Standard library only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 2
BASE = "scalar"
# Half of what was measured on a Zen 4: ratio for one token in the cache, ratio for a prompt.
LEAST = {"avx512vnni": (4.5, 7), "avx2": (2.8, 4)}
LEAST_ELSE = (1.5, 1.5)  # of kernels that were not measured there
LEAST_STREAM = 0.4  # as a part of the bandwidth
WEIGHTS_A_BYTE = 4


def bench(binary, *flags):
    """The report of a run on one thread."""
    command = [binary, "bench", "--quiet", "--json", "--threads", "1", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "BITNET_KERNEL"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"   {' '.join(map(str, command))}: exit {done.returncode}")
    return json.loads(done.stdout)


def speeds(binary, kernel):
    """One token on cached weights, a prompt, weights from memory, and bytes read: the best samples."""
    report = bench(binary, "--kernel", kernel, "--n-prompt", "64", "--n-gen", "0", "--repetitions", "10")
    limits = report["limits"][0]
    prompt = max(report["results"][0]["samples"])
    return limits["cached_ternary"], prompt, limits["streamed_ternary"], limits["read_large_pages"]


def main():
    binary = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target/release/bitnet"
    kernels = bench(binary, "--n-prompt", "0", "--n-gen", "1", "--repetitions", "1")["machine"]["kernels"]
    if kernels == [BASE]:
        print(f"   skipped: this processor has no kernel but `{BASE}`")
        return
    best = {}
    for _ in range(ROUNDS):
        for kernel in kernels:
            measured = speeds(binary, kernel)
            best[kernel] = tuple(map(max, measured, best.get(kernel, measured)))
    failed = False

    def check(what, value, least):
        nonlocal failed
        failed |= value < least
        print(f"   {'ok  ' if value >= least else 'SLOW'}  {what}: {value:.2f}, at least {least}")

    for kernel in kernels:
        if kernel == BASE:
            continue
        for index, what in enumerate(("one token in the cache", "a prompt")):
            ratio = best[kernel][index] / best[BASE][index]
            check(f"{kernel} / {BASE}, {what}", ratio, LEAST.get(kernel, LEAST_ELSE)[index])
    *_, streamed, read = best[kernels[0]]
    check(f"{kernels[0]}, one token from memory / read bandwidth", streamed / WEIGHTS_A_BYTE / read, LEAST_STREAM)
    sys.exit(failed)


if __name__ == "__main__":
    main()
