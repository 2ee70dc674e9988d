#!/usr/bin/env python3
"""Compare our logits with those of Hugging Face transformers, for one checkpoint and one prompt.

    bitnet logits -m DIR --tokens 1,2,3 -o logits.safetensors
    scripts/peers_transformers.py DIR --tokens 1,2,3 logits.safetensors

DIR is any checkpoint that transformers reads: packed or latent BitNet, packed Llama.  The reference
runs in f32 on the CPU, with eager attention and without torch.compile.

Two correct implementations agree to about 1e-6 until a last-bit difference flips one int8
activation code; that row and the later ones then move by up to a tenth of the logits' standard
deviation.  So the verdict is on the relative RMS over all rows; the first row that is off by more
than 1e-5 is printed for whoever looks for the flip.

Needs torch, transformers and accelerate, for example

    python3 -m venv ~/.venvs/peers
    ~/.venvs/peers/bin/pip install torch transformers==5.23.0 accelerate safetensors
"""

import argparse
import os
import sys
from pathlib import Path

RELATIVE_RMS_LIMIT = 0.03
SAME = 1e-5


def token_ids(text):
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a comma-separated list of token ids") from None
    if min(ids) < 0:
        raise argparse.ArgumentTypeError("token ids are not negative")
    return ids


def parse_args():
    parser = argparse.ArgumentParser(usage="%(prog)s [flags] model logits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("logits", type=Path, help="output of `bitnet logits`: tensor `logits`, (tokens, vocab)")
    parser.add_argument("--tokens", type=token_ids, required=True, metavar="1,2,3", help="the prompt")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model}: no config.json in this folder")
    if not args.logits.is_file():
        parser.error(f"{args.logits}: no such file")
    return args


def reference_logits(model_dir, tokens):
    """f32 logits of transformers, (tokens, vocab)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    if max(tokens) >= model.config.vocab_size:
        sys.exit(f"token {max(tokens)} is not in the vocabulary of {model.config.vocab_size}")
    with torch.no_grad():
        # For a quantized checkpoint `dtype=` leaves norms and embeddings in bf16, and `.float()` refuses.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def main():
    args = parse_args()
    # Read when torch and transformers are imported.
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        from safetensors.torch import load_file
        import transformers
    except ImportError as error:
        sys.exit(f"{error}: see --help for what to install")

    tensors = load_file(args.logits)
    if "logits" not in tensors:
        sys.exit(f"{args.logits}: no tensor `logits`, only {', '.join(sorted(tensors))}")
    ours = tensors["logits"].float()
    theirs = reference_logits(args.model, args.tokens)
    if ours.shape != theirs.shape:
        sys.exit(f"{args.logits}: shape {tuple(ours.shape)}, transformers gives {tuple(theirs.shape)}")

    rows = (ours - theirs).abs().amax(1)
    relative_rms = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    differing = (~(rows <= SAME)).nonzero().flatten().tolist()  # NaN differs
    agree = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    print(f"transformers {transformers.__version__}, {len(rows)} rows of {ours.shape[1]} logits")
    print(f"max abs difference   {rows.max().item():.3e}")
    print(f"relative RMS         {relative_rms:.3e} (limit {RELATIVE_RMS_LIMIT})")
    print(f"first differing row  {differing[0] if differing else 'none'} (by more than {SAME})")
    print(f"same top-1           {agree:.1%} of rows")
    ok = relative_rms < RELATIVE_RMS_LIMIT
    print("agree" if ok else "DISAGREE")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
