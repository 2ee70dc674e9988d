#!/usr/bin/env python3
"""Write a packed BitNet checkpoint with random weights, laid out as on the Hub.

Without flags it has exactly the geometry of microsoft/bitnet-b1.58-2B-4T: 1,178,562,980 bytes of
tensors with the same names, types and shapes.  What it generates is noise; it is for measuring
loading, memory and speed, and for trying a real tokenizer and chat template on real sizes.

Codes are uniform over {-1, 0, 1} and never the invalid fourth value.  Embeddings have a standard
deviation of 0.5 and gains and scales the magnitudes of the real model, so activations stay finite
in bf16.  The same seed and flags write the same bytes.  Standard library only, 50 MB of memory.
"""

import argparse
import json
import math
import random
import shutil
import struct
import sys
import tempfile
import time
from array import array
from pathlib import Path

CHUNK = 1 << 22  # values drawn at once

# A packed byte holds four codes of two bits; the 81 bytes without a 3 are the valid ones.
CODE_BYTES = [a | b << 2 | c << 4 | d << 6
              for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
CODES = bytes(CODE_BYTES[byte % 81] for byte in range(256))

# The high byte of a bf16 holds the sign and all exponent bits but the last: 0x3e is [1/8, 1/2),
# 0x3f is [1/2, 2).  With a uniform low byte their mean squares are 0.0911 and 1.458, so taking the
# second with p = 30/256 gives a variance of 0.0911 (1 - p) + 1.458 p = 0.25.
EMBEDDING_HIGH = bytes([0x3E] * 113 + [0xBE] * 113 + [0x3F] * 15 + [0xBF] * 15)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")

# Mean gain of each norm and mean absolute value of the latent weights.  For BitNet: as measured on
# the real checkpoint, where masters of order 1 are undone by small input gains.
MAGNITUDES = {
    "bitnet": {"input_layernorm": 0.018, "attn_sub_norm": 0.1, "post_attention_layernorm": 1.3,
               "ffn_sub_norm": 0.5, "norm": 0.1, "absmean": 1.5},
    "llama": {"input_layernorm": 1.0, "post_attention_layernorm": 1.0, "norm": 0.1, "absmean": 0.02},
}


def config_json(args):
    """config.json with the keys and, by default, the values of the real repository."""
    config = {
        "architectures": ["BitNetForCausalLM" if args.family == "bitnet" else "LlamaForCausalLM"],
        "bos_token_id": args.bos_token_id,
        "eos_token_id": args.eos_token_id,
        "hidden_act": "relu2" if args.family == "bitnet" else "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": args.intermediate_size,
        "max_position_embeddings": args.max_position_embeddings,
        "model_type": args.family,
        "rms_norm_eps": 1e-05,
        "num_attention_heads": args.num_attention_heads,
        "num_hidden_layers": args.num_hidden_layers,
        "num_key_value_heads": args.num_key_value_heads,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": not args.untied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }
    if args.family == "bitnet":
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                         "quantization_mode": "offline"}
    else:
        config["head_dim"] = args.head_dim
        config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    return config


def generation_config_json(args):
    """generation_config.json: the real one where the vocabulary is the real one."""
    return {
        "bos_token_id": args.bos_token_id,
        "eos_token_id": [args.eos_token_id, 128009] if args.vocab_size == 128256 else args.eos_token_id,
        "do_sample": True,
        "temperature": 0.6,
        "max_length": args.max_position_embeddings,
        "top_p": 0.9,
    }


def tensors(args):
    """Every tensor as (name, dtype, shape), in the order safetensors writes them."""
    hidden, intermediate = args.hidden_size, args.intermediate_size
    heads = args.num_attention_heads * args.head_dim
    kv_heads = args.num_key_value_heads * args.head_dim
    linears = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if args.family == "bitnet":
        norms |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": intermediate}

    floats, codes = {"model.embed_tokens.weight": [args.vocab_size, hidden], "model.norm.weight": [hidden]}, {}
    if args.untied:
        floats["lm_head.weight"] = [args.vocab_size, hidden]
    for layer in range(args.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (out_features, in_features) in linears.items():
            if out_features % 4:
                sys.exit(f"{name} would have {out_features} rows: packing needs a multiple of 4")
            codes[f"{prefix}.{name}.weight"] = [out_features // 4, in_features]
            floats[f"{prefix}.{name}.weight_scale"] = [1]
        for name, size in norms.items():
            floats[f"{prefix}.{name}.weight"] = [size]
    return ([(name, "BF16", floats[name]) for name in sorted(floats)]
            + [(name, "U8", codes[name]) for name in sorted(codes)])


def to_bf16(values):
    """Floats as little-endian bf16, truncated: the upper half of each f32."""
    single = array("f", values)
    if sys.byteorder == "big":
        single.byteswap()
    raw, out = single.tobytes(), bytearray(2 * len(single))
    out[0::2], out[1::2] = raw[2::4], raw[3::4]
    return bytes(out)


def content(name, count, rng, args):
    """The bytes of one tensor of `count` elements, in chunks."""
    magnitudes = MAGNITUDES[args.family]
    module, kind = name.rsplit(".", 1)
    module = module.rsplit(".", 1)[-1]
    if kind == "weight_scale":  # the two conventions are each other's inverse
        absmean = magnitudes["absmean"] * rng.uniform(0.75, 1.25)
        yield to_bf16([absmean if args.family == "bitnet" else 1 / absmean])
    elif module in magnitudes:
        gain = magnitudes[module]
        yield to_bf16([gain * rng.uniform(0.75, 1.25) for _ in range(count)])
    elif module in ("embed_tokens", "lm_head"):
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            chunk = bytearray(2 * size)
            chunk[0::2], chunk[1::2] = rng.randbytes(size), rng.randbytes(size).translate(EMBEDDING_HIGH)
            yield chunk
    else:
        for start in range(0, count, CHUNK):
            yield rng.randbytes(min(CHUNK, count - start)).translate(CODES)


def write_model(path, entries, args):
    """model.safetensors, one chunk in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in entries:
        start, end = end, end + math.prod(shape) * (2 if dtype == "BF16" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, _, shape in entries:
            rng = random.Random(f"{args.seed} {name}")  # strings seed alike in every process
            for chunk in content(name, math.prod(shape), rng, args):
                file.write(chunk)
    return end


def parse_args():
    parser = argparse.ArgumentParser(usage="%(prog)s [flags] out", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy the tokenizer files of this folder")
    parser.add_argument("--family", choices=sorted(MAGNITUDES), default="bitnet",
                        help="bitnet: sub-norms, relu2, scale multiplies; llama: as Falcon3-1.58bit, scale divides")
    sizes = parser.add_argument_group("geometry (defaults: 2B-4T)")
    for name, default in {"vocab-size": 128256, "hidden-size": 2560, "intermediate-size": 6912,
                          "num-hidden-layers": 30, "num-attention-heads": 20, "num-key-value-heads": 5,
                          "max-position-embeddings": 4096}.items():
        sizes.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    sizes.add_argument("--head-dim", type=int, metavar="N",
                       help="default hidden-size / num-attention-heads; another value needs --family llama")
    sizes.add_argument("--rope-theta", type=float, default=500000.0, metavar="X", help="default 500000")
    sizes.add_argument("--untied", action="store_true", help="write lm_head.weight")
    args = parser.parse_args()

    for name, value in vars(args).items():
        if isinstance(value, int) and name not in ("seed", "untied") and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.vocab_size < 4:
        parser.error("--vocab-size must be at least 4")
    if args.num_attention_heads % args.num_key_value_heads:
        parser.error("--num-attention-heads must be a multiple of --num-key-value-heads")
    if args.head_dim is None:
        if args.hidden_size % args.num_attention_heads:
            parser.error("--hidden-size must be a multiple of --num-attention-heads, or pass --head-dim")
        args.head_dim = args.hidden_size // args.num_attention_heads
    if args.head_dim % 2:
        parser.error(f"head_dim must be even for rotary embeddings, not {args.head_dim}")
    if args.family == "bitnet" and args.head_dim * args.num_attention_heads != args.hidden_size:
        parser.error("--family bitnet needs num-attention-heads * head-dim = hidden-size (attn_sub_norm)")
    llama3 = args.vocab_size == 128256
    args.bos_token_id, args.eos_token_id = (128000, 128001) if llama3 else (1, 2)
    if args.tokenizer and not (args.tokenizer / "tokenizer.json").is_file():
        parser.error(f"{args.tokenizer}: no tokenizer.json in this folder")
    if args.out.exists():
        parser.error(f"{args.out} exists already: remove it or choose another folder")
    return args


def main():
    args = parse_args()
    began = time.monotonic()
    entries = tensors(args)
    need = sum(math.prod(shape) * (2 if dtype == "BF16" else 1) for _, dtype, shape in entries)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(args.out.parent).free
        if need > free:
            sys.exit(f"{args.out.parent}: {need:,} bytes needed, {free:,} free")
        # Made beside the target and renamed when complete: a folder of that name is never half written.
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as scratch:
            made = Path(scratch) / args.out.name
            made.mkdir()
            (made / "config.json").write_text(json.dumps(config_json(args), indent=2) + "\n")
            (made / "generation_config.json").write_text(json.dumps(generation_config_json(args), indent=2) + "\n")
            for name in TOKENIZER_FILES if args.tokenizer else ():
                if (args.tokenizer / name).is_file():
                    shutil.copyfile(args.tokenizer / name, made / name)
            written = write_model(made / "model.safetensors", entries, args)
            made.rename(args.out)
    except OSError as error:
        sys.exit(f"{args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{args.out}: {len(entries)} tensors, {written:,} bytes, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
