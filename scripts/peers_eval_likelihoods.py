#!/usr/bin/env python3
"""Compare log-likelihoods of `bitnet eval` with those of lm-evaluation-harness on transformers, request by request.

    scripts/peers_eval_likelihoods.py --data DIR [--tasks arc_easy,winogrande] [--limit 200] [--model default] [--bitnet PATH]

The harness' model is transformers' BitNet with online quantization, in f32, from the bf16 masters that `bitnet convert --to latent`
writes; `bitnet eval` runs with `--kv-cache f32`.

Activations are rounded to 8 bits.  Before that, the two programs differ in the last bits of an f32, since they add in other
orders; where these bits decide, a code flips, and that moves logits by 10^-3 to 10^-1, there and at all later positions.  So
the codes of all activations are compared, by fingerprints that `bitnet logits` logs:

* requests without a flip must have log-likelihoods within 1e-3;
* positions before the first flip of a request must have logits within 1e-3;
* of all questions, flips or not, 99 % must have the same choice.

Needs what scripts/peers_eval_speed.py needs.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import peers_eval_speed as speed  # first: it keeps the hub away
import peers_eval
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers.integrations import bitnet

# Of a layer's seven projections those whose input is another than that of the one before: q, k and v have the same, as have gate and up.
PRODUCTS, INPUTS = 7, (0, 3, 4, 6)
CHOICES = 0.99


class Codes:
    """In the place of `ActQuant`: notes the fingerprints of what it rounds."""

    products = None  # of every product, those of its rows

    @classmethod
    def apply(cls, x):
        a = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        codes = (x * a).round().clamp(-128, 127)
        if cls.products is not None:
            rows = codes.to(torch.int8).flatten(0, -2).numpy()
            cls.products.append([hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows])
        return codes / a


def theirs_alone(lm, tokens):
    """Logits and fingerprints of one text."""
    Codes.products = []
    with torch.no_grad():
        logits = lm.model(torch.tensor([tokens])).logits[0].float()
    products, Codes.products = Codes.products, None
    return logits, [rows for i, rows in enumerate(products) if i % PRODUCTS in INPUTS]


def ours_alone(args, tokens, products, folder):
    """The same of ours, which runs long texts in parts: of each, all products."""
    output = folder / "logits.safetensors"
    output.unlink(missing_ok=True)
    command = [args.bitnet, "logits", "-q", "-m", args.model, "--tokens", ",".join(map(str, tokens)), "-o", str(output),
               "--log", "bitnet_model::activations=trace", "--log-format", "json"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr}")
    rows = [json.loads(line)["rows"].split() for line in result.stderr.splitlines()]
    return load_file(output)["logits"], [sum(rows[i::products], []) for i in range(products)]


class Found:
    """What was compared of a task."""

    def __init__(self):
        self.all, self.without_flip, self.positions, self.jumps = [], [], [], []

    def request(self, args, lm, request, apart, folder):
        """A request whose log-likelihoods are `apart`."""
        self.all.append(apart)
        before, after = lm._encode_pair(*request)
        tokens = (before + after)[:-1]
        expected, their_codes = theirs_alone(lm, tokens)
        logits, our_codes = ours_alone(args, tokens, len(their_codes), folder)
        assert all(len(rows) == len(tokens) for rows in their_codes + our_codes)
        equal = [all(theirs[i] == ours[i] for theirs, ours in zip(their_codes, our_codes)) for i in range(len(tokens))]
        first = equal.index(False) if False in equal else len(tokens)
        gaps = (logits - expected).abs().amax(-1).tolist()
        self.positions += gaps[:first]
        self.jumps += gaps[first:first + 1]
        if first == len(tokens):
            self.without_flip.append(apart)

    def agree(self):
        return all(apart <= peers_eval.LIKELIHOOD_LIMIT for apart in self.without_flip + self.positions)

    def __str__(self):
        def line(name, apart):
            within = sum(value <= peers_eval.LIKELIHOOD_LIMIT for value in apart)
            rest = f", median {statistics.median(apart):.1e}, largest {max(apart):.1e}" if apart else ""
            return f"  {name}: {within} of {len(apart)} within {peers_eval.LIKELIHOOD_LIMIT}{rest}"

        return "\n".join([line("log-likelihoods, all", self.all), line("log-likelihoods, no flip", self.without_flip),
                          line("logits before a flip", self.positions), line("logits at the first flip", self.jumps)])


def compare(args, task, lm, samples, folder):
    """Prints how far both are apart; whether they agree, and the number of requests without a flip."""
    _, ours = speed.run_ours(args, folder / "ours", task, folder)
    found, same = Found(), 0
    for sample in samples:
        mine, theirs = ours[sample["doc_id"]], [response[0] for response in sample["resps"]]
        same += speed.choice(mine) == speed.choice(theirs)
        for request, response, expected in zip(sample["arguments"], mine, theirs, strict=True):
            found.request(args, lm, request, abs(response[0] - float(expected[0])), folder)
    print(f"{task}: {same} of {len(samples)} choices equal\n{found}", flush=True)
    return found.agree() and same >= CHOICES * len(samples), len(found.without_flip)


def main():
    args = speed.parser_of(__doc__, "arc_easy,arc_challenge,winogrande,piqa,lambada_openai", 200).parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    bitnet.ActQuant = Codes
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        found, _, configs = peers_eval.prepare(folder, args.data, args.limit)
        masters = folder / "masters"
        subprocess.run([args.bitnet, "convert", "-q", args.model, str(masters), "--to", "latent"], check=True, capture_output=True)
        lm = HFLM(pretrained=str(masters), dtype="float32", device="cpu", batch_size=1)
        manager = TaskManager(include_path=str(configs), include_defaults=False)
        agree, safe = True, 0
        for task in args.tasks.split(","):
            if task not in found:
                sys.exit(f"there is no data of {task}")
            result = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
            fine, count = compare(args, task, lm, result["samples"][task], folder)
            agree, safe = agree and fine, safe + count
    print(f"{safe} requests without a flip (torch {torch.__version__}, transformers {transformers.__version__})")
    if not agree:
        sys.exit("no agreement")
    if not safe:
        sys.exit("a code flips in every request: nothing was shown; ask more")


if __name__ == "__main__":
    main()
