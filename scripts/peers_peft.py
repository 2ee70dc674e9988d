#!/usr/bin/env python3
"""Exchange LoRA adapters with the real PEFT, in both directions, and compare what the models then compute.

    scripts/peers_peft.py [--bitnet target/release/bitnet] [--keep DIR]

The base is the model inside the program, once in packed codes and once as float masters, both loaded by transformers in f32.

* `ours`: adapters that `bitnet train lora` trained are loaded by PEFT over the base; its logits are compared with those of
  `bitnet logits --adapter`.  What PEFT saves of them again must have the same bits.
* `theirs`: adapters that PEFT made, with random A and B, are read by `bitnet logits --adapter`.
* `merge`: `bitnet merge` and PEFT's `merge_and_unload` write the same masters.  Both round the f32 sum once to bf16, and add
  up B·A in another order: some weights in a million come to lie on the other side of a tie.

Two correct implementations agree to about 1e-6 until a last-bit difference flips one int8 activation code; that row and the
later ones of its prompt then move by up to a tenth of the logits' standard deviation.  So there are many short prompts, of
which each begins with another token, and each comparison asks for a median row within 1e-4 and a relative RMS over all rows below 0.03, while the adapter itself moves
the logits by far more (`effect`).

Needs torch, transformers, peft and accelerate, for example

    python3 -m venv ~/.cache/bitnet-torch/venv
    ~/.cache/bitnet-torch/venv/bin/pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RMS_LIMIT, ROW_LIMIT, LEAST_EFFECT = 0.03, 1e-4, 0.1
MERGE_LIMIT = 1e-4  # part of the weights
TEXTS = [
    "Once upon a time", "The big dog ran to the park", "Lily had a red ball", "It was a sunny day", "Mom said no",
    "He was very sad", "They played with the cat all day", "Can I have a cookie?", "The bird flew away", "Tom found a key",
    "She liked to sing", "One day, a frog jumped",
]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What `bitnet train lora` is asked for, beside data and base.
TRAINED = {
    "all projections": [],
    "rank pattern, rsLoRA": ["--rslora", "--set", 'lora.rank_pattern={"o_proj"=4,"layers\\\\.1\\\\.mlp\\\\.down_proj"=16}'],
    "a subset, whole norms": ["--target-modules", "q_proj,v_proj", "--modules-to-save", "norm"],
    "whole embedding": ["--target-modules", "up_proj", "--modules-to-save", "embed_tokens"],
}
# Settings of PEFT's LoraConfig.
MADE = {
    "all projections": {"r": 8, "target_modules": ALL},
    "patterns, rsLoRA": {
        "r": 8, "target_modules": ALL, "use_rslora": True,
        "rank_pattern": {"o_proj": 4, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"down_proj": 5},
    },
    "a regular expression": {"r": 1, "target_modules": r".*\.(1|3)\.mlp\.(up|down)_proj"},
    "layers and exclusion": {
        "r": 4, "target_modules": ALL, "layers_to_transform": [0, 2, 5], "exclude_modules": ["k_proj"],
    },
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "whole norm": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


class Bitnet:
    """The program."""

    def __init__(self, path, folder):
        self.path, self.folder = path, folder

    def run(self, *arguments):
        result = subprocess.run([self.path, *map(str, arguments), "-q"], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"bitnet {' '.join(map(str, arguments))}: {result.stderr.strip()}")
        return result.stdout

    def logits(self, base, prompts, adapter):
        """The rows of all prompts."""
        import torch
        from safetensors.torch import load_file

        output, rows = self.folder / "logits.safetensors", []
        for tokens in prompts:
            ids = ",".join(map(str, tokens))
            self.run("logits", "-m", base, "--tokens", ids, "-o", output, "--adapter", adapter)
            rows.append(load_file(output)["logits"].float())
        return torch.cat(rows)


def load_base(folder):
    """The model in f32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def their_logits(model, prompts):
    """The rows of all prompts."""
    import torch

    with torch.no_grad():
        model.eval()
        return torch.cat([model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in prompts])


class Report:
    """Rows of a table, and whether all of them agree."""

    def __init__(self):
        self.agrees = True
        print(f"| {'what':52} | median row | relative RMS | effect | |\n|---|---:|---:|---:|---|")

    def row(self, what, cells, agrees):
        self.agrees &= agrees
        print(f"| {what:52} | {' | '.join(cells)} | {'agree' if agrees else 'DISAGREE'} |", flush=True)

    def logits(self, what, ours, theirs, base):
        def rms(a, b):
            return ((a - b).double().norm() / b.double().norm()).item()

        row, off, effect = (ours - theirs).abs().amax(1).median().item(), rms(ours, theirs), rms(theirs, base)
        agrees = row < ROW_LIMIT and off < RMS_LIMIT and effect > LEAST_EFFECT
        self.row(what, [f"{row:.1e}", f"{off:.1e}", f"{effect:.2f}"], agrees)

    def tensors(self, what, ours, theirs):
        """Tensors that must be there on both sides with the same bits."""
        import torch

        names = sorted(ours.keys() ^ theirs.keys())
        names += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
        self.row(f"{what}, {len(theirs)} tensors", ["", "", f"{len(names)} differ"], not names)
        for name in names[:3]:
            print(f"  {name}", file=sys.stderr)


def compare_ours(bitnet, report, form, base, prompts, data):
    from peft import PeftModel
    from safetensors.torch import load_file

    for number, (name, options) in enumerate(TRAINED.items()):
        run = bitnet.folder / f"{form}-trained-{number}"
        bitnet.run("train", "lora", "-m", base, "--data", data, "-o", run, "--steps", 12, "--lr", 5e-3, "--rank", 8,
                   "--max-length", 64, "--validation-split", 0.2, *options)
        adapter = run / "adapter"
        model = load_base(base)
        before = their_logits(model, prompts)
        model = PeftModel.from_pretrained(model, adapter)
        report.logits(f"ours on {form}: {name}", bitnet.logits(base, prompts, adapter), their_logits(model, prompts), before)
        again = bitnet.folder / f"{form}-again-{number}"
        model.save_pretrained(again)
        file = "adapter_model.safetensors"
        report.tensors(f"ours on {form}, saved by PEFT again", load_file(adapter / file), load_file(again / file))


def compare_theirs(bitnet, report, form, base, prompts):
    import torch
    from peft import LoraConfig, get_peft_model

    for number, (name, settings) in enumerate(MADE.items()):
        torch.manual_seed(number)
        model = load_base(base)
        before = their_logits(model, prompts)
        model = get_peft_model(model, LoraConfig(lora_alpha=16, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.05)
                elif "modules_to_save" in key:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
        adapter = bitnet.folder / f"{form}-made-{number}"
        model.save_pretrained(adapter)
        report.logits(f"theirs on {form}: {name}", bitnet.logits(base, prompts, adapter), their_logits(model, prompts), before)


def compare_merge(bitnet, report, base):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    adapter, merged = bitnet.folder / "masters-trained-0/adapter", bitnet.folder / "merged"
    bitnet.run("merge", "-m", base, "--adapter", adapter, "-o", merged, "--i-know")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}
    ours = {name: tensor for name, tensor in load_file(merged / "model.safetensors").items() if name in theirs}
    weights = sum(tensor.numel() for tensor in theirs.values())
    differ = sum((tensor != ours[name]).sum().item() for name, tensor in theirs.items())
    report.row("merge into masters", ["", "", f"{differ} of {weights} differ"], differ < MERGE_LIMIT * weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitnet", type=Path, default=ROOT / "target/release/bitnet", help="the program")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for what is made, which is kept")
    args = parser.parse_args()
    # Read when torch and transformers are imported.
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        import peft
        import transformers
    except ImportError as error:
        sys.exit(f"{error}: see --help for what to install")
    with tempfile.TemporaryDirectory() as scratch:
        if args.keep:
            args.keep.mkdir(parents=True)
        bitnet = Bitnet(args.bitnet.resolve(), args.keep or Path(scratch))
        print(f"transformers {transformers.__version__}, PEFT {peft.__version__}", file=sys.stderr)
        data = bitnet.folder / "data.jsonl"
        record = '{{"prompt": "What does number {0} say?", "completion": "Number {0} says {1}!"}}\n'
        data.write_text("".join(record.format(i, i * i) for i in range(24)))
        prompts = [[int(token) for token in bitnet.run("tokenize", "--no-special", text).split()] for text in TEXTS]
        report = Report()
        for form, to in (("codes", "packed"), ("masters", "latent")):
            base = bitnet.folder / form
            bitnet.run("convert", "default", base, "--to", to)
            compare_ours(bitnet, report, form, base, prompts, data)
            compare_theirs(bitnet, report, form, base, prompts)
        compare_merge(bitnet, report, bitnet.folder / "masters")
    sys.exit(not report.agrees)


if __name__ == "__main__":
    main()
