#!/usr/bin/env python3
"""Time `bitnet eval` and lm-evaluation-harness with transformers on the same questions and the same model, and compare what both found.

    scripts/peers_eval_speed.py --data DIR [--tasks arc_easy,piqa,lambada_openai] [--limit 100] [--model default] [--threads 2]

The harness' model is transformers' BitNet with online quantization, from the bf16 masters that `bitnet convert --to latent` writes, in f32 on
the CPU. Both run in batches of 16 questions or requests and as many threads. Timed is the asking: not the loading of the model, nor of data. Each is
run --repeat times, one after the other in turn, and the fastest of each counts.

Printed are seconds and their ratio, task by task; how far log-likelihoods are apart; and on how many questions both choose the same. With
keys and values in f32 (--kv-cache f32) log-likelihoods agree to about 1e-4 where no 8-bit activation code flips.

Needs lm_eval, torch, transformers and accelerate, for example

    ~/.cache/bitnet-eval/venv/bin/pip install 'lm_eval[math]==0.4.13' torch transformers==5.23.0 accelerate tokenizers
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import peers_eval
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

BATCH = 16


def parser_of(description, tasks, limit):
    """What every comparison with the harness' own model takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="folders of data files")
    parser.add_argument("--bitnet", default=str(peers_eval.ROOT / "target/release/bitnet"))
    parser.add_argument("--model", default="default", help="`default`, or a folder")
    parser.add_argument("--tasks", default=tasks)
    parser.add_argument("--limit", type=int, default=limit)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def parse_args():
    parser = parser_of(__doc__, "arc_easy,piqa,lambada_openai", 100)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def run_ours(args, data, task, folder):
    """The report, and the responses by question."""
    kept = folder / "kept.jsonl"
    kept.unlink(missing_ok=True)
    command = [args.bitnet, "eval", "-q", "-m", args.model, "--data", str(data), "--tasks", task, "--bootstrap", "0", "--json",
               "--kv-cache", "f32", "--batch", str(BATCH), "--threads", str(args.threads), "-o", str(kept)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr}")
    lines = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    return json.loads(result.stdout), {line["item"]: line["responses"] for line in lines}


def run_theirs(model, configs, task):
    """Seconds, and the responses by question."""
    manager = TaskManager(include_path=str(configs), include_defaults=False)
    start = time.perf_counter()
    found = simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - start
    return seconds, {sample["doc_id"]: [response[0] for response in sample["resps"]] for sample in found["samples"][task]}


def choice(responses):
    """Of several choices the likeliest; of one, whether it is what a greedy model says."""
    if len(responses) > 1:
        return max(range(len(responses)), key=lambda i: float(responses[i][0]))
    return str(responses[0][1]) == "True"


def compare(task, ours, theirs):
    """Prints how far both are apart."""
    pairs = [(a, b) for item in ours for a, b in zip(ours[item], theirs[item], strict=True)]
    if isinstance(pairs[0][0], str):
        same = sum(a == b for a, b in pairs)
        print(f"  {same} of {len(pairs)} texts equal")
        return
    apart = sorted(abs(a[0] - float(b[0])) for a, b in pairs)
    close = sum(gap <= peers_eval.LIKELIHOOD_LIMIT for gap in apart)
    print(f"  log-likelihoods: {close} of {len(apart)} within {peers_eval.LIKELIHOOD_LIMIT}, median {statistics.median(apart):.1e}, largest {apart[-1]:.1e}")
    same = sum(choice(ours[item]) == choice(theirs[item]) for item in ours)
    print(f"  {same} of {len(ours)} choices equal")


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        found, data, configs = peers_eval.prepare(folder, args.data, args.limit)
        masters = folder / "masters"
        subprocess.run([args.bitnet, "convert", "-q", args.model, str(masters), "--to", "latent"], check=True, capture_output=True)
        model = HFLM(pretrained=str(masters), dtype="float32", device="cpu", batch_size=BATCH)
        totals = [0, 0]
        for task in args.tasks.split(","):
            if task not in found:
                sys.exit(f"there is no data of {task}")
            times = []
            for _ in range(args.repeat):
                report, ours = run_ours(args, data, task, folder)
                seconds, theirs = run_theirs(model, configs, task)
                times.append((report["seconds"], seconds))
            best = [min(column) for column in zip(*times)]
            totals = [total + seconds for total, seconds in zip(totals, best)]
            print(f"{task}, {len(ours)} questions: bitnet {best[0]:.2f} s, harness {best[1]:.2f} s: {best[1] / best[0]:.1f} times as fast")
            compare(task, ours, theirs)
        print(f"all: bitnet {totals[0]:.2f} s, harness {totals[1]:.2f} s: {totals[1] / totals[0]:.1f} times as fast "
              f"({args.threads} threads; torch {torch.__version__}, transformers {transformers.__version__})")


if __name__ == "__main__":
    main()
