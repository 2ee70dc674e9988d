#!/usr/bin/env python3
"""Measure the memory that `bitnet convert` takes in every direction, on a model of 2B-4T's matrices.

    scripts/convert_memory.py BITNET [--layers N] [--folder DIR]

A packed checkpoint of N layers (30 are 2B-4T) is made with scripts/synthetic_checkpoint.py and goes to masters, to GGUF with its
own embedding and with ones of few bits, and from each of these back to packed codes, and to ONNX.  Printed is the peak of RssAnon, what
the process has beside mapped files, read from /proc ten times a second, and of VmHWM; more than 1 GB of the first fails.

The matrices are read, made and compared one by one, so that the peak hardly depends on N.  Needs 2 GB of disk, 8 GB for 30
layers.  Standard library only; Linux.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 10**9
SYNTHETIC = Path(__file__).resolve().parent / "synthetic_checkpoint.py"


def measured(command):
    """Peaks of RssAnon and VmHWM of a command in bytes, and its seconds."""
    began, peaks = time.monotonic(), {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for field in peaks:
            if found := re.search(rf"{field}:\s+(\d+) kB", status):
                peaks[field] = max(peaks[field], 1024 * int(found[1]))
        time.sleep(0.1)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {said}")
    return peaks["RssAnon"], peaks["VmHWM"], time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet", type=Path)
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="default 2; 30 are 2B-4T")
    parser.add_argument("--folder", type=Path, help="where to write; default the system's for temporary files")
    args = parser.parse_args()
    too_much = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        packed = folder / "packed"
        subprocess.run([sys.executable, SYNTHETIC, packed, "--num-hidden-layers", str(args.layers)], check=True)
        steps = [("latent", packed, "latent", []), ("packed", "latent", "back", [])]
        for embedding in (None, "q8_0", "q6_k"):
            types = ["--token-embedding-type", embedding] if embedding else []
            steps += [("tq2_0", packed, f"{embedding}.gguf", types), ("packed", f"{embedding}.gguf", "back", [])]
        steps += [("f16", packed, "f16.gguf", []), ("packed", "f16.gguf", "back", [])]
        steps += [("onnx", packed, "model.onnx", ["--onnx-weights", weights]) for weights in ("int2", "int8")]
        for form, source, output, options in steps:
            command = [args.bitnet, "convert", folder / source, folder / output, "--to", form, "--force", *options]
            anonymous, peak, seconds = measured(command)
            title = f"{Path(source).name} -> {form} {' '.join(options)}"
            print(f"{title:45} RssAnon {anonymous / 1e6:6.0f} MB  VmHWM {peak / 1e6:6.0f} MB  {seconds:5.1f} s", flush=True)
            if anonymous > LIMIT:
                too_much.append(title)
    if too_much:
        sys.exit(f"more than 1 GB: {', '.join(too_much)}")


if __name__ == "__main__":
    main()
