"""Writes tests/fixtures/sampler.json.gz: distributions of transformers' logits processors for random logits.

Run with transformers and torch (CPU) installed: python scripts/sampler_fixture.py | gzip -9n > tests/fixtures/sampler.json.gz
Frequency and presence penalties and the logit bias are OpenAI's and have no processor; sampler.rs tests them by hand.
"""

import json

import torch
import transformers
from transformers.generation import logits_process as lp

CASES = [
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.99, "temperature": 1.7},
    {"min_p": 0.1},
    {"min_p": 0.3, "temperature": 2.0},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "temperature": 0.8},
    {"repetition_penalty": 1.1, "temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 6, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.2},
]


def main():
    torch.manual_seed(20)
    cases = []
    for n, params in enumerate(CASES * 2):
        vocab = 24 if n < len(CASES) else 57
        steps = 2 if n % 2 else 1000  # coarse steps make ties
        logits = (torch.randn(1, vocab) * 1.5 * steps).round() / steps
        history = torch.randint(vocab, (1, 9))
        processors = lp.LogitsProcessorList()
        for key, make in [  # the order of GenerationMixin._get_logits_processor
            ("repetition_penalty", lp.RepetitionPenaltyLogitsProcessor),
            ("temperature", lp.TemperatureLogitsWarper),
            ("top_k", lp.TopKLogitsWarper),
            ("top_p", lp.TopPLogitsWarper),
            ("min_p", lp.MinPLogitsWarper),
        ]:
            if key in params:
                processors.append(make(params[key]))
        # Among equal logits at top-p's border torch's sort keeps an arbitrary few: such a case decides nothing.
        scores = processors(history, logits.clone())
        probs = scores.softmax(-1)[0].double()
        if "top_p" in params:
            lowest = scores[0][scores[0].isfinite()].min()
            before = lp.LogitsProcessorList(p for p in processors if not isinstance(p, (lp.TopPLogitsWarper, lp.MinPLogitsWarper)))
            if ((before(history, logits.clone())[0] == lowest) & ~scores[0].isfinite()).any():
                continue
        cases.append(
            {
                "params": params,
                "logits": [round(v, 3) for v in logits[0].tolist()],
                "history": history[0].tolist(),
                "kept": {i: float(f"{p:.6g}") for i, p in enumerate(probs.tolist()) if p > 0},
            }
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "cases": cases}, separators=(",", ":")))


main()
