#!/usr/bin/env python3
"""Answers a file of requests with `bitnet batch` on the machines of a Ray cluster, or on this one.

    scripts/scale_out/ray_batch.py requests.jsonl answers.jsonl --threads 16 -- bitnet batch -m microsoft/bitnet-b1.58-2B-4T

Needs ray[data], and the program behind `--` on every machine. Both files are on the machine where this runs. The same command
goes on where an earlier one ended.
"""

import argparse
import json
import os
import pathlib

import ray
from answer import answer


def answered(output):
    """The custom_ids that the file has answers to; a line that was cut short is taken off."""
    if not output.exists():
        return set()
    with output.open("rb+") as file:
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
    return {json.loads(line)["custom_id"] for line in whole[0].split(b"\n") if line}


def main():
    """Spreads the requests that have no answer, and writes each answer as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--block", type=int, default=256, help="requests of one task, which loads the model once")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of one task; Ray counts them as CPUs")
    parser.add_argument("command", nargs="+", help="bitnet batch and its options, behind --")
    args = parser.parse_args()

    done = answered(args.output)
    with args.input.open(encoding="utf-8", newline="\n") as file:
        lines = [line.rstrip("\n") for line in file if line.strip()]
    left = [line for line in lines if json.loads(line)["custom_id"] not in done]
    print(f"{len(lines)} requests, {len(lines) - len(left)} answered before")
    if not left:
        return

    def block(rows):
        return {"line": answer(rows["line"], args.command, args.threads)}

    # The folder of this file, for `answer` on every machine.
    ray.init(runtime_env={"working_dir": str(pathlib.Path(__file__).resolve().parent), "excludes": ["*.sh"]})
    requests = ray.data.from_items([{"line": line} for line in left], override_num_blocks=-(-len(left) // args.block))
    answers = requests.map_batches(block, batch_size=None, num_cpus=args.threads)
    with args.output.open("a", encoding="utf-8", newline="\n") as file:
        for row in answers.iter_rows():
            file.write(row["line"] + "\n")
            file.flush()


if __name__ == "__main__":
    main()
