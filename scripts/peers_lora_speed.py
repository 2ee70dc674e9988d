#!/usr/bin/env python3
"""Speed and memory of a LoRA step on the geometry of 2B-4T: transformers and PEFT beside this project, in turns.

    scripts/synthetic_checkpoint.py /tmp/2b-4t            (random codes, 1.2 GB)
    cargo build --release -p bitnet-train --example lora_step
    scripts/peers_lora_speed.py /tmp/2b-4t [--tokens 256] [--rounds 2]

Rank 16 on all seven projections, one sequence, blocks computed again in the backward pass, AdamW on the pairs, gradients
clipped.  PEFT gets what its users can get at best: the packed checkpoint, which transformers unpacks to bf16 while loading, in
a loop of one's own (its trainer refuses such a base).  The figure of a run is the median of its steps after the first, the
table has the median of the rounds; machines change their speed from minute to minute, so what lasts is the ratio.

Needs 8 GB of memory, and torch, transformers, peft and accelerate as scripts/peers_peft.py does.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANK, STEPS = 16, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peak_gib():
    """The most resident memory so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def worker(args):
    """Trains in this process; prints seconds of every step and the peak of memory as JSON."""
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16, local_files_only=True)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    ids = torch.arange(args.tokens)[None] * 7919 % 128_000
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak": peak_gib()}))


def run_peft(args):
    command = [sys.executable, __file__, args.checkpoint, "--worker"]
    command += ["--threads", str(args.threads), "--tokens", str(args.tokens)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_ours(args):
    command = [args.example, str(args.tokens), str(RANK), str(STEPS)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    seconds = [float(value) for value in re.findall(r"([\d.]+) s,", output)]
    return {"seconds": seconds, "peak": float(re.findall(r"peak ([\d.]+) GiB", output)[-1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a packed checkpoint of this geometry")
    parser.add_argument("--example", default=ROOT / "target/release/examples/lora_step", help="the built example")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the sequence [default: 256]")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each [default: 2]")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run [default: 2]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    runs = {"transformers + PEFT": [], "bitnet": []}
    for number in range(args.rounds):
        for name, run in (("transformers + PEFT", run_peft), ("bitnet", run_ours)):
            print(f"round {number + 1}: {name}", file=sys.stderr)
            runs[name].append(run(args))
    print("| | tokens/s, median | all steps after the first, s | peak memory |\n|---|---:|---:|---:|")
    speeds = {}
    for name, found in runs.items():
        medians = [statistics.median(run["seconds"][1:]) for run in found]
        speeds[name] = args.tokens / statistics.median(medians)
        seconds = ", ".join(f"{second:.1f}" for run in found for second in run["seconds"][1:])
        print(f"| {name} | {speeds[name]:.1f} | {seconds} | {max(run['peak'] for run in found):.2f} GiB |")
    theirs, ours = speeds.values()
    print(f"bitnet is {ours / theirs:.2f} times as fast", file=sys.stderr)


if __name__ == "__main__":
    main()
