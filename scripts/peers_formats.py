#!/usr/bin/env python3
"""Have Hugging Face transformers load every form of safetensors that `bitnet convert` writes, and compare its logits.

    scripts/peers_formats.py BITNET [MODEL...]

MODELs are folders in the Hub's layout; without any, those of tests/fixtures.  Each is written packed, packed in shards, latent, and
latent in shards, and packed again from the latter.  transformers computes the logits of each (f32, eager attention), which must
be those that it computes of the original: the same bits where codes, scales and floats are the same, a relative RMS below 0.03
where scales were rounded to bf16.  `bitnet logits` of each is held to the same bound against transformers.

Masters made of a packed Llama have a plain configuration, under which transformers runs them in full precision: those are
loaded, and compared after they are packed again.

Needs torch, transformers, accelerate and safetensors, as scripts/peers_transformers.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from peers_transformers import RELATIVE_RMS_LIMIT, reference_logits

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [1, 17, 250, 3, 99, 4, 5, 200, 31, 77]


def run(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: failed with status {done.returncode}")


def relative_rms(found, expected):
    return ((found - expected).double().norm() / expected.double().norm()).item()


def describe(config):
    quantization = config.get("quantization_config")
    if quantization is None:
        return "plain"
    return f"{quantization.get('linear_class', 'bitlinear')} {quantization.get('quantization_mode', 'offline')}"


def check(program, model, scratch):
    from safetensors.torch import load_file

    tokens = [token % json.loads((model / "config.json").read_text())["vocab_size"] for token in TOKENS]
    config = json.loads((model / "config.json").read_text())
    is_reference = config["architectures"][0] in ("BitNetForCausalLM", "LlamaForCausalLM")
    expected = reference_logits(model, tokens) if is_reference else None
    folders = {name: scratch / model.name / name for name in ("packed", "shards", "latent", "latent_shards", "again")}
    (scratch / model.name).mkdir()
    is_llama = config["model_type"] == "llama" and "weight_bits" not in config
    masters = ["--ternarize"] if is_llama and not config.get("quantization_config", {}).get("use_rms_norm") else []
    first = masters if "quantization_config" not in config and "weight_bits" not in config else []
    steps = {"packed": (model, "packed", [], first), "shards": (model, "packed", ["--max-shard-size", "20KB"], first),
             "latent": (model, "latent", [], first), "latent_shards": (model, "latent", ["--max-shard-size", "40KB"], first),
             "again": (folders["latent_shards"], "packed", [], masters)}
    for name, (source, form, shards, options) in steps.items():
        folder = folders[name]
        run(program, "convert", source, folder, "--to", form, "--quiet", *shards, *options)
        written = json.loads((folder / "config.json").read_text())
        kind = describe(written)
        file = scratch / "logits.safetensors"
        run(program, "logits", "-m", folder, "--tokens", ",".join(map(str, tokens)), "--output", file, "--quiet",
            *(["--ternarize"] if kind == "plain" and "weight_bits" not in written else []))
        ours = load_file(file)["logits"]
        if written["architectures"][0] == "BitnetForCausalLM":
            print(f"{model.name} {name}: 1bitLLM's own class, which transformers has not")
            continue
        theirs = reference_logits(folder, tokens)
        if expected is None:  # 1bitLLM's, whose class transformers has not: that of its packed form
            expected = theirs
        if kind == "plain":
            print(f"{model.name} {name}: {kind}, loaded")
            continue
        to_ours, to_original = relative_rms(ours, theirs), relative_rms(theirs, expected)
        files = len(list(folder.glob("*.safetensors")))
        print(f"{model.name} {name}: {kind}, {files} files, relative RMS {to_original:.1e} to the original's, "
              f"{to_ours:.1e} to bitnet", flush=True)
        assert max(to_ours, to_original) < RELATIVE_RMS_LIMIT
        if describe(config).endswith("offline") and name in ("packed", "shards", "again"):
            assert to_original == 0, "the same codes and scales have other logits"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet", type=Path, help="the program")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    args = parser.parse_args()
    fixtures = sorted(path.parent for path in (ROOT / "tests" / "fixtures").glob("*/expected.safetensors"))
    fixtures = [path for path in fixtures if not path.name.startswith(("grad_", "lora_"))]
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models or fixtures:
            check(args.bitnet.resolve(), model, Path(scratch))


if __name__ == "__main__":
    main()
