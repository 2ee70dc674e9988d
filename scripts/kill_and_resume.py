#!/usr/bin/env python3
"""Kills a training run at random moments, resumes it, and compares the end with that of an uninterrupted run.

    cargo build --release
    python3 scripts/kill_and_resume.py target/release/bitnet --kills 200

A small model is trained on text that this script makes up. The process gets SIGKILL after a random time, whatever it is
doing, and is started again with --resume until the run is finished; then another run begins, until so many processes
have been killed. Every finished run must have the bytes of the uninterrupted one in its last checkpoint (weights,
moments, codes, state), its best weights and its models; the same metrics but for timings and memory; and an event file
for TensorBoard with the same steps. Some runs are interrupted with SIGINT as well, which must save and end with 130.

Needs Python 3.9 and nothing else.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

STEPS = 60
RECIPE = f"""
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
vocab_size = 300
max_position_embeddings = 64

[data]
sequence_length = 32
train = [{{ path = "train.txt", documents = "line" }}]
validation = [{{ path = "validation.txt", documents = "line" }}]

[train]
batch_size = 4
gradient_accumulation = 2
steps = {STEPS}
eval_every = 7
codes_every = 4
save_every = 3

[optimizer]
peak_lr = 2e-3
warmup_steps = 5

[output]
dir = "run"
tensorboard = true
"""

TIMED = {"tokens_per_second", "memory", "seconds"}
EVENTS = "events.out.tfevents.0.bitnet"


def write_corpus(folder):
    animals, places = ["cat", "hen", "fox", "owl", "mouse"], ["garden", "wood", "house", "river"]
    rng = random.Random(1)
    lines = [
        f"The {rng.choice(animals)} number {rng.randrange(1000)} ran from the {rng.choice(places)} to the {rng.choice(places)}.\n"
        for _ in range(900)
    ]
    (folder / "train.txt").write_text("".join(lines[:800]))
    (folder / "validation.txt").write_text("".join(lines[800:]))
    (folder / "recipe.toml").write_text(RECIPE)


def start(bitnet, folder, run, resume=True):
    command = [bitnet, "train", "qat", "recipe.toml", "-q", "-o", run] + ["--resume"] * resume
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def event_steps(run):
    """The step of every event; frames and the field are described in bitnet-train/src/tensorboard.rs."""
    data, at, steps = (run / EVENTS).read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        step, shift, byte = 0, 0, at + 12 + 10
        while True:
            step |= (data[byte] & 0x7F) << shift
            shift += 7
            if data[byte] < 0x80:
                break
            byte += 1
        steps.append(step)
        at += 12 + length + 4
    return steps


def contents(run):
    last = run / f"step-{STEPS}"
    files = sorted(last.iterdir()) + [run / "best.safetensors"]
    files += sorted(file for model in ("packed", "latent") for file in (run / model).iterdir())
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def compare(reference, run):
    """What differs."""
    expected, found = contents(reference), contents(run)
    differences = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if metrics(reference) != metrics(run):
        differences.append("metrics.jsonl")
    if event_steps(reference) != event_steps(run):
        differences.append(EVENTS)
    half_written = [path.name for path in run.iterdir() if path.name.startswith(".")]
    return sorted(differences) + half_written


def interrupt(process, run, rng):
    """Sends SIGINT once the run makes updates. Whether it met the process alive, and what is wrong with how that ended."""
    seen = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > seen + 300:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    if process.poll() is not None:
        return False, None
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    if process.wait() == 0:
        return False, None  # it was past its last update
    last = (errors.strip().splitlines() or [""])[-1]
    if process.returncode != 130 or not last.startswith("interrupted; go on with: "):
        return True, f"SIGINT ended it with {process.returncode}: {errors.strip()}"
    saved = max(int(path.name[5:]) for path in run.glob("step-*"))
    written = max(record["step"] for record in metrics(run))
    return True, None if saved == written else f"SIGINT saved {saved} of {written} updates"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bitnet", type=pathlib.Path, help="the binary")
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; random by default")
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    rng, bitnet = random.Random(seed), args.bitnet.resolve()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    write_corpus(folder)
    began = time.monotonic()
    process = start(bitnet, folder, "reference", resume=False)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the uninterrupted run failed: {errors}")
    whole = time.monotonic() - began
    print(f"seed {seed}; an uninterrupted run of {STEPS} updates takes {whole:.2f} s", flush=True)

    reference, run = folder / "reference", folder / "run"
    kills = interrupts = finished = 0
    while kills < args.kills or run.exists():
        process = start(bitnet, folder, "run")
        if rng.random() < 0.05:
            met, problem = interrupt(process, run, rng)
            if problem:
                sys.exit(f"{problem}; the run is in {run}")
            interrupts += met
        elif kills < args.kills:
            time.sleep(rng.uniform(0, whole))
            if process.poll() is None:
                process.kill()
                kills += 1
        errors = process.stderr.read()
        if process.wait() not in (0, -signal.SIGKILL, 130):
            sys.exit(f"after {kills} kills: status {process.returncode}: {errors.strip()}; the run is in {run}")
        if process.returncode == 0:
            differences = compare(reference, run)
            if differences:
                sys.exit(f"after {kills} kills, differs from {reference}: {', '.join(differences)}; the run is in {run}")
            finished += 1
            shutil.rmtree(run)
            print(f"{kills} kills, {interrupts} interrupts, {finished} runs finished, all equal", flush=True)
    shutil.rmtree(folder)
    if not finished:
        sys.exit("no run was finished")
    print(f"{kills} kills and {interrupts} interrupts: {finished} runs ended with the bytes of the uninterrupted one, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
