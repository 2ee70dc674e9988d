#!/usr/bin/env python3
"""A llama2.c model as a folder of the Hub: config.json, model.safetensors, tokenizer.json and their company.

    scripts/llama2c_to_hf.py model.bin tokenizer.model OUT
    scripts/llama2c_to_hf.py stories260K.bin tok512.bin OUT

MODEL is a `.bin` of llama2.c (the legacy format, or version 1 of `export.py`, both f32), or a training checkpoint `.pt`.
TOKENIZER is sentencepiece's `.model` or llama2.c's `.bin`. Plain Python is enough; only a `.pt` needs torch.

llama2.c rotates neighbouring pairs of a head's values, transformers the two halves of a head: rows of the query and key
projections are reordered accordingly, which changes no logit.
"""

import argparse
import array
import json
import struct
import sys
from pathlib import Path

NORM_EPS = 1e-5  # llama2.c's model.py and run.c
ROPE_THETA = 10_000.0
SPACE = "▁"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


def fail(path, reason):
    sys.exit(f"{path}: {reason}")


def shapes(p):
    """Names, in llama2.c's order, and shapes of the tensors of a layer."""
    dim, hidden = p["dim"], p["hidden_dim"]
    kv = dim // p["n_heads"] * p["n_kv_heads"]
    return {
        "attention_norm": (dim,),
        "wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim),
        "ffn_norm": (dim,),
        "w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim),
    }


class Reader:
    """Takes f32 arrays one after another from a file's bytes."""

    def __init__(self, path, data, offset):
        self.path, self.data, self.offset = path, data, offset

    def skip(self, count):
        self.offset += 4 * count

    def take(self, shape):
        count = 1
        for size in shape:
            count *= size
        end = self.offset + 4 * count
        if end > len(self.data):
            fail(self.path, f"ends after {len(self.data)} bytes, where its header promises {end} and more")
        values = array.array("f", self.data[self.offset:end])
        if sys.byteorder == "big":
            values.byteswap()
        self.offset = end
        return values


def read_bin(path):
    """Parameters and tensors, by llama2.c's names, of a `.bin`."""
    data = path.read_bytes()
    if len(data) < 28:
        fail(path, "is too short for a header")
    if struct.unpack_from("<I", data)[0] == 0x616B3432:  # "ak42"
        version, *numbers, shared = struct.unpack_from("<i7iB", data, 4)
        if version != 1:
            fail(path, f"is of version {version}; export it with --version 0 or 1, in f32")
        offset, is_legacy = 256, False
    else:
        numbers = struct.unpack_from("<7i", data)
        shared, offset, is_legacy = numbers[5] > 0, 28, True
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    p = dict(zip(names, (abs(n) for n in numbers)))
    if not all(0 < n < 1 << 24 for n in p.values()) or p["dim"] % p["n_heads"]:
        fail(path, f"is no f32 model of llama2.c: its header says {p}")
    reader, layers, of_layer = Reader(path, data, offset), range(p["n_layers"]), shapes(p)
    tensors = {}

    def take_layers(name):
        for layer in layers:
            tensors[f"layers.{layer}.{name}"] = reader.take(of_layer[name])

    vocab = (p["vocab_size"], p["dim"])
    if is_legacy:
        tensors["tok_embeddings"] = reader.take(vocab)
        for name in of_layer:
            take_layers(name)
        tensors["norm"] = reader.take((p["dim"],))
        reader.skip(p["max_seq_len"] * p["dim"] // p["n_heads"])  # cosines and sines
    else:
        take_layers("attention_norm")
        take_layers("ffn_norm")
        tensors["norm"] = reader.take((p["dim"],))
        tensors["tok_embeddings"] = reader.take(vocab)
        for name in of_layer:
            if not name.endswith("norm"):
                take_layers(name)
    if not shared:
        tensors["output"] = reader.take(vocab)
    if reader.offset != len(data):
        fail(path, f"has {len(data)} bytes, where its header makes {reader.offset}")
    return p, tensors


def read_pt(path):
    """The same of a training checkpoint."""
    try:
        import torch
    except ImportError:
        fail(path, "reading a .pt needs torch; export a .bin with llama2.c's export.py, or install torch")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = checkpoint["model_args"]
    state = {k.removeprefix("_orig_mod."): v.float().contiguous() for k, v in checkpoint["model"].items()}
    p = {key: args[key] for key in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")}
    p["n_kv_heads"] = args.get("n_kv_heads") or p["n_heads"]
    p["hidden_dim"] = state["layers.0.feed_forward.w1.weight"].shape[0]
    tensors = {}
    for name, value in state.items():
        for part in (".weight", "attention.w", "feed_forward.w"):
            name = name.replace(part, "w" if part.endswith("w") else "")
        tensors[name] = array.array("f", value.numpy().tobytes())
    if tensors.get("output") == tensors["tok_embeddings"]:
        del tensors["output"]
    return p, tensors


def halves(values, rows, cols, heads):
    """Rows of each head: neighbours (0, 1), (2, 3) … become (0, n/2), (1, n/2 + 1) …"""
    size, out = rows // heads, array.array("f")
    for head in range(heads):
        for row in [*range(0, size, 2), *range(1, size, 2)]:
            start = (head * size + row) * cols
            out.extend(values[start:start + cols])
    return out


def hub_tensors(p, tensors):
    """Name → (shape, values) as transformers has them."""
    dim, of_layer = p["dim"], shapes(p)
    names = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
    }
    out = {
        "model.embed_tokens.weight": ((p["vocab_size"], dim), tensors["tok_embeddings"]),
        "model.norm.weight": ((dim,), tensors["norm"]),
    }
    if "output" in tensors:
        out["lm_head.weight"] = ((p["vocab_size"], dim), tensors["output"])
    for layer in range(p["n_layers"]):
        for name, shape in of_layer.items():
            values = tensors[f"layers.{layer}.{name}"]
            if name in ("wq", "wk"):
                values = halves(values, *shape, p["n_heads"] if name == "wq" else p["n_kv_heads"])
            out[f"model.layers.{layer}.{names[name]}.weight"] = (shape, values)
    return out


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, values) in sorted(tensors.items()):
        size = 4 * len(values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, (_, values) in sorted(tensors.items()):
            if sys.byteorder == "big":
                values.byteswap()
            file.write(values.tobytes())


def protobuf(data):
    """(field, value) of a protobuf message: integers, 4-byte and length-delimited values."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[key & 7]
        size = varint() if size is None else size
        yield key >> 3, data[at:at + size]
        at += size


def read_sentencepiece(path):
    """Pieces with scores, and whether extra whitespace is removed, of sentencepiece's `.model`."""
    pieces, removes_whitespace = [], True
    try:
        for field, value in protobuf(path.read_bytes()):
            if field == 1:
                piece = dict(protobuf(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]))
            elif field == 3:
                removes_whitespace = bool(dict(protobuf(value)).get(4, 1))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        fail(path, f"is no model of sentencepiece: {error}")
    return pieces, removes_whitespace


def read_tokenizer_bin(path):
    """The same of llama2.c's `tokenizer.bin`."""
    data, at, pieces = path.read_bytes(), 4, []
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            at += 8
            pieces.append((data[at:at + size].decode(), score))
            at += size
    except (UnicodeDecodeError, struct.error) as error:
        fail(path, f"is no tokenizer of llama2.c: {error}")
    # Spaces are plain there and specials are spelt with line breaks.
    specials = [UNK, BOS, EOS]
    return [(specials[i], s) if i < 3 else (piece.replace(" ", SPACE), s) for i, (piece, s) in enumerate(pieces)], True


def tokenizer_json(pieces, removes_whitespace):
    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    scores = dict(pieces)
    merges = []
    for piece, score in pieces[3:]:
        if piece.startswith("<0x"):
            continue
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += [(score, vocab[left], vocab[right], [left, right]) for left, right in pairs]
    # Sentencepiece merges the pair that makes the piece of the highest score.
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    has_bytes = "<0x00>" in scores
    clean = [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    normalizers = (clean if removes_whitespace else []) + [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}] if has_bytes else []
    decoders += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate((UNK, BOS, EOS))],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, sequence],
            "pair": [bos, sequence, {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": UNK, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": has_bytes, "ignore_merges": False,
            "vocab": vocab, "merges": [pair for *_, pair in merges],
        },
    }


def config_json(p, is_tied):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": p["vocab_size"], "hidden_size": p["dim"], "intermediate_size": p["hidden_dim"],
        "num_hidden_layers": p["n_layers"], "num_attention_heads": p["n_heads"],
        "num_key_value_heads": p["n_kv_heads"], "head_dim": p["dim"] // p["n_heads"],
        "hidden_act": "silu", "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "max_position_embeddings": p["max_seq_len"], "tie_word_embeddings": is_tied,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for path in (args.model, args.tokenizer):
        if not path.is_file():
            fail(path, "no such file")
    p, tensors = (read_pt if args.model.suffix == ".pt" else read_bin)(args.model)
    read = read_sentencepiece if args.tokenizer.suffix == ".model" else read_tokenizer_bin
    pieces, removes_whitespace = read(args.tokenizer)
    if len(pieces) != p["vocab_size"]:
        fail(args.tokenizer, f"has {len(pieces)} pieces, but the model has a vocabulary of {p['vocab_size']}")
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name, value):
        (args.out / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    write_safetensors(args.out / "model.safetensors", hub_tensors(p, tensors))
    write("tokenizer.json", tokenizer_json(pieces, removes_whitespace))
    write("tokenizer_config.json", {
        "bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": p["max_seq_len"],
    })
    write("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 1.0, "top_p": 0.9})
    write("config.json", config_json(p, "output" not in tensors))
    print(f"{args.out}: {sum(len(v) for v in tensors.values())} parameters, {p}")


if __name__ == "__main__":
    main()
