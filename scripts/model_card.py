#!/usr/bin/env python3
"""Install a trained model as the embedded default and write its model card.

  scripts/model_card.py runs/default runs/default-full

The first run is `bitnet-train/recipes/default.toml`, the second its full-precision twin.  Copies the
packed model to bitnet-model/assets/default and writes README.md there: how it was trained, held-out loss
of both runs from their metrics, and twenty fixed prompts with the continuations of the release binary,
which must have been built with the new files (the script builds it).  Standard library only.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "bitnet-model" / "assets" / "default"
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]
PROMPTS = json.loads((ROOT / "tests" / "fixtures" / "default_prompts.json").read_text())
NEW_TOKENS = 120
SEED = 158


def best(run):
    """The evaluation with the least held-out loss, and the number of updates."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in records if "nats_per_byte" in r]
    return min(evaluations, key=lambda r: r["nats_per_byte"]), max(r["step"] for r in records)


def continuation(binary, prompt):
    """What `bitnet generate` adds to the prompt."""
    command = [binary, "generate", prompt, "--json", "--quiet", "--seed", str(SEED),
               "--max-new-tokens", str(NEW_TOKENS)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["text"]


def looping_five_gram(text):
    """A sequence of five words that comes back, if there is one."""
    words, seen = text.split(), set()
    for i in range(len(words) - 4):
        gram = tuple(words[i:i + 5])
        if gram in seen:
            return " ".join(gram)
        seen.add(gram)
    return None


def card(run, twin, samples):
    (ours, steps), (full, full_steps) = best(run), best(twin)
    config = json.loads((ASSETS / "config.json").read_text())
    ratio = ours["nats_per_byte"] / full["nats_per_byte"]
    size = sum((ASSETS / name).stat().st_size for name in FILES)
    lines = [
        "# The default model", "",
        "A BitNet b1.58 language model that tells very short stories in the manner of TinyStories. It exists",
        "so that the program does something real before anything is downloaded; it knows nothing else.", "",
        "| | |", "|---|---|",
        f"| architecture | BitNet b1.58: ternary projections, int8 activations, sub-norms, relu², "
        f"{config['num_attention_heads']}/{config['num_key_value_heads']} heads, tied embeddings |",
        f"| size | {config['num_hidden_layers']} layers, hidden {config['hidden_size']}, intermediate "
        f"{config['intermediate_size']}, vocabulary {config['vocab_size']} (byte-level BPE); {size:,} bytes in all |",
        "| training text | 2.4 MB of TinyStories (CDLA-Sharing-1.0; Eldan and Li, arXiv:2305.07759) |",
        f"| command | `bitnet train qat bitnet-train/recipes/default.toml`, seed {SEED}, {steps} updates |",
        f"| held-out loss | {ours['nats_per_byte']:.4f} nats per byte ({ours['nats_per_token']:.3f} per token), "
        f"best at update {ours['step']} |",
        f"| full-precision twin | {full['nats_per_byte']:.4f} nats per byte after the same data and {full_steps} "
        f"updates (`default-full.toml`): the ternary model is {100 * (ratio - 1):+.1f} % |",
        "| licence | the weights: MIT or Apache-2.0, as the program; the training text: CDLA-Sharing-1.0 |", "",
        "It was trained with quantization in the loop on two CPU cores; `packed/` of the run is what lies here. The",
        "chat template is 2B-4T's, so that `bitnet chat` works, but the model has never seen a conversation.", "",
        "## Twenty prompts", "",
        f"`bitnet generate PROMPT --seed {SEED} --max-new-tokens {NEW_TOKENS}`, first try each, nothing selected:", "",
    ]
    for number, (prompt, text) in enumerate(samples, 1):
        story = (prompt + text).strip().replace("\n", "\n   > ")
        lines += [f"{number}. **{prompt}**", f"   > {story}", ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of the ternary run")
    parser.add_argument("twin", type=Path, help="output folder of the full-precision run")
    options = parser.parse_args()
    for name in FILES:
        source, target = options.run / "packed" / name, ASSETS / name
        if not target.exists() or source.read_bytes() != target.read_bytes():
            shutil.copyfile(source, target)
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    binary = ROOT / "target" / "release" / "bitnet"
    samples = [(prompt, continuation(binary, prompt)) for prompt in PROMPTS]
    (ASSETS / "README.md").write_text(card(options.run, options.twin, samples))
    loops = [(prompt, gram) for prompt, text in samples if (gram := looping_five_gram(prompt + text))]
    for prompt, gram in loops:
        print(f"loops: {prompt!r}: {gram!r}", file=sys.stderr)
    return 1 if loops else 0


if __name__ == "__main__":
    sys.exit(main())
