"""EleutherAI's evaluation harness, unmodified, against `bitnet serve`: its log-likelihoods are those of `bitnet logits`, and its
texts those of `bitnet generate`.

    lm_eval_client.py BITNET SCRATCH       in the root of the repository; SCRATCH is a folder to write in
"""

import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.numpy import load_file
from served import Wrong, check, equal, generated, serving

MODEL = "bitnet-model/assets/default"
TASKS = "scripts/clients/lm_eval_tasks"
BOS, CONTEXT = 0, 512  # of the embedded model
HALF_ULP = 2.0**-24  # of 1 in f32: how far rounding to f32 moves a number, relative to it


class Library:
    """What the command line says of token ids."""

    def __init__(self, bitnet, scratch):
        self.bitnet, self.file = bitnet, scratch / "logits.safetensors"

    def tokens(self, text):
        """Ids of a text, nothing added."""
        if not text:
            return []
        command = [self.bitnet, "tokenize", "--no-special", "--json"]
        return json.loads(subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout)["tokens"]

    def score(self, context, ending):
        """ln p of the ids of an ending in f64, how far off the server's sum of it may be, and whether all are the likeliest."""
        ids = ",".join(map(str, context + ending))
        subprocess.run([self.bitnet, "logits", "--quiet", "--tokens", ids, "-o", self.file], check=True)
        rows = next(iter(load_file(self.file).values())).astype(numpy.float64)[len(context) - 1 : -1]
        off = rows - rows.max(axis=1, keepdims=True)
        logprobs = off[range(len(ending)), ending] - numpy.log(numpy.exp(off).sum(axis=1))
        # The server subtracts the largest logit in f32, which moves each difference by half an ulp: its own, and in the sum of
        # exponentials one between the smallest and the largest. The result is rounded to f32 and written in the fewest
        # digits that say which f32 it is: half an ulp each. The ulps of f64 are 2²⁹ times smaller, and the factor covers them.
        bound = HALF_ULP * (-2 * off.min(axis=1) - 2 * logprobs).sum() * (1 + 2**-20)
        return logprobs.sum(), bound, bool((rows.argmax(axis=1) == ending).all())

    def pair(self, context, ending):
        """As the harness has it: the ending's tokens are those of the whole behind those of the context, whose last spaces go
        to the ending."""
        kept = context.rstrip()
        context, ending = kept, context[len(kept) :] + ending
        head = self.tokens(context) or [BOS]
        whole = self.tokens(context + ending) if context else head + self.tokens(ending)
        return self.score(whole[: len(head)], whole[len(head) :])

    def rolling(self, text):
        """As the harness has it: windows as long as the context allows, each token scored once, the last window filled up
        with what is before it. A token before the first is in each, and a place of the context is left for the new token that
        every request of the harness asks for."""
        ids, most = self.tokens(text), CONTEXT - 2
        scores = []
        for begin in range(0, len(ids), most):
            ending = ids[begin : begin + most]
            before = ([BOS] + ids)[: begin + 1][-(most + 1 - len(ending)) :]
            scores.append(self.score(before, ending))
        return sum(score[0] for score in scores), sum(score[1] for score in scores)


def run(base, **arguments):
    """The harness's samples of each task, and its results."""
    place = {"model": "default", "base_url": f"{base}/v1/completions", "max_length": CONTEXT, "custom_prefix_token_id": BOS}
    tasks = ["bitnet_choice", "bitnet_likelihood", "bitnet_rolling", "bitnet_until"]
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    fields = {"model": "local-completions", "model_args": {**place, **arguments}, "tasks": tasks, "bootstrap_iters": 0}
    results = simple_evaluate(**fields, task_manager=manager, verbosity="ERROR")
    return results["samples"], results["results"]


def compare(library, samples):
    """Every answer with the library's; how many there were, and how much of its bound the worst of them used."""
    count, worst = 0, 0.0

    def near(found, score, bound, what):
        nonlocal count, worst
        check(abs(found - score) <= bound, f"{what}: ln p is {found}, but {score} ± {bound} by `bitnet logits`")
        count, worst = count + 1, max(worst, abs(found - score) / bound)

    for task in ("bitnet_choice", "bitnet_likelihood"):
        for sample in samples[task]:
            for (context, ending), [answer] in zip(sample["arguments"], sample["resps"], strict=True):
                score, bound, is_greedy = library.pair(context, ending)
                near(float(answer[0]), score, bound, f"{task} {context!r} {ending!r}")
                equal(f"{task} {context!r} {ending!r}: is greedy", answer[1], is_greedy)
    for sample in samples["bitnet_rolling"]:
        [(text,)], [[answer]] = sample["arguments"], sample["resps"]
        near(float(answer), *library.rolling(text), f"the text {text[:20]!r}…")
    for sample in samples["bitnet_until"]:
        [(context, _)], [[answer]] = sample["arguments"], sample["resps"]
        expected = generated(library.bitnet, library.tokens(context), 40, "--temperature", "0", "--stop", ".", "--stop", "!")
        equal(f"text after {context!r}", answer, expected["text"])
        count += 1
    return count, worst


def main():
    """Ids by the checkpoint's tokenizer, one request after the other; then by the server's, several at once."""
    bitnet, scratch = sys.argv[1], pathlib.Path(sys.argv[2])
    scratch.mkdir(parents=True, exist_ok=True)
    library = Library(bitnet, scratch)
    # `bitnet logits` keeps keys and values in f32.
    with serving(bitnet, "--kv-cache", "f32") as base:
        samples, results = run(base, tokenizer_backend="huggingface", tokenizer=MODEL)
        count, worst = compare(library, samples)
        other_samples, other = run(base, tokenizer_backend="remote", num_concurrent=4, batch_size=2)
        for task, rows in samples.items():
            for row, other_row in zip(rows, other_samples[task], strict=True):
                equal(f"{task}, the server's tokenizer", other_row["resps"], row["resps"])
    likely = results["bitnet_choice"]["acc,none"]
    equal("part of the likely endings", other["bitnet_choice"]["acc,none"], likely)
    check(likely > 0.5, f"the likely endings are the likeliest in {likely} of the cases only")
    check(math.isfinite(results["bitnet_rolling"]["bits_per_byte,none"]), "the texts have no probability")
    version = importlib.metadata.version("lm_eval")
    print(f"   lm_eval {version}: {count} answers of the library's own, at most {worst:.0%} of the bound of rounding apart")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
