#!/usr/bin/env python3
"""Compare what `bitnet` reads and writes of GGUF files with what llama.cpp's own Python package reads and writes.

    scripts/gguf_check.py BITNET [--tokenizer FOLDER]

Files are written by the PyPI package `gguf`, ternary and few-bit blocks by its quantizers (I2_S, which it does not know, by
the definition), from the model inside the program and from a Llama of tests/fixtures.  The same weights as `gguf.quants`
dequantizes them go into a folder in the Hub's layout, and the logits of both must have the same bits.  Codes are compared
through `bitnet convert`, token ids through `bitnet tokenize`.  What `bitnet convert` writes is read by the package and compared
with the model it was made of, vocabulary included.  FOLDER is a Hub folder with a tokenizer.json of Llama 3's kind,
such as that of microsoft/bitnet-b1.58-2B-4T, whose vocabulary is then written and read as well.

Needs Python 3.11 and, the first time, PyPI: packages go into a virtual environment outside the repository, $GGUF_VENV or
~/.cache/bitnet-gguf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gguf==0.19.0", "numpy==2.4.6")

try:
    import gguf
    import numpy as np
except ImportError:
    environment.enter("GGUF_VENV", "bitnet-gguf", PACKAGES)

from checks.safetensors import read_safetensors, write_safetensors

Type = gguf.GGMLQuantizationType
I2_S = 36
TOKENS = [0, 17, 250, 3, 99, 4, 5, 200, 31]
TEXTS = [
    "Once upon a time, there was a little girl.",
    "  two spaces\n\nand <|eot_id|> tokens",
    "Zürich 東京 🙂 1234567 don't",
    "\t\r\n trailing  ",
]
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def unpack(packed):
    """The Hub's packing as codes minus 1."""
    return np.concatenate([(packed >> shift & 3) for shift in (0, 2, 4, 6)]).astype(np.float32) - 1


def i2_s(weights, scale):
    codes = (weights + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    return np.concatenate([packed.reshape(-1), np.array([scale], "<f4").view(np.uint8), np.zeros(28, np.uint8)])


def permute(weights, heads):
    """llama.cpp's order of the rows of queries and keys."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def tensor_name(hub):
    hub = hub.removesuffix(".weight")
    if hub in OUTER:
        return f"{OUTER[hub]}.weight"
    _, _, layer, part = hub.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def add_metadata(writer, arch, config):
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    for key, value in {
        "vocab_size": config["vocab_size"], "context_length": config["max_position_embeddings"],
        "embedding_length": hidden, "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "rope.dimension_count": config.get("head_dim") or hidden // heads,
        "attention.head_count": heads, "attention.head_count_kv": config["num_key_value_heads"],
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", config["rope_theta"])


def add_vocabulary(writer, folder, pre):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {id: token for token, id in tokenizer["model"]["vocab"].items()} | added
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id[id] for id in range(len(by_id))])
    writer.add_token_types([3 if id in added else 1 for id in range(len(by_id))])
    writer.add_token_merges(merges)
    ids = {token: id for id, token in by_id.items()}
    writer.add_bos_token_id(ids[names["bos_token"]])
    writer.add_eos_token_id(ids[names["eos_token"]])
    writer.add_add_bos_token(True)


def write_model(path, arch, config, tensors, ternary, embedding=None, folder=None, pre=None):
    """Writes a GGUF file; returns the tensors in the Hub's layout with the values it holds."""
    writer, values = gguf.GGUFWriter(path, arch), {}
    add_metadata(writer, arch, config)
    if folder:
        add_vocabulary(writer, folder, pre)
    for name, tensor in tensors.items():
        ours = tensor_name(name) if not name.endswith("_scale") else None
        if ours is None:
            continue
        if tensor.dtype == np.uint8:
            scale = np.float32(tensors[f"{name}_scale"][0])
            if "linear_class" not in config["quantization_config"]:
                scale = np.float32(1) / scale  # divides
            weights = unpack(tensor)
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
            part = ours.split(".")[2]
            if arch == "llama" and part in heads:
                weights = permute(weights, heads[part])
            if ternary == I2_S:
                data = i2_s(weights, scale)
                writer.add_tensor_info(ours, weights.shape, np.dtype(np.float32), data.nbytes, raw_dtype=I2_S)
                writer.tensors[-1][ours].tensor = data
            else:
                scale = np.float32(np.float16(scale))
                data = gguf.quants.quantize(weights * scale, ternary)
                assert np.array_equal(gguf.quants.dequantize(data, ternary), weights * scale)
                writer.add_tensor(ours, data, raw_dtype=ternary)
            values[name], values[f"{name}_scale"] = tensor, np.array([scale], np.float32)
        elif ours == "token_embd.weight" and embedding:
            data, values[name] = embedding(tensor)
            writer.add_tensor(ours, data[0], raw_dtype=data[1])
        else:
            writer.add_tensor(ours, tensor.astype(np.float32))
            values[name] = tensor.astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def quantized(type):
    """An embedding in this type, by the package's quantizer, or of random blocks where it has none."""
    def embedding(tensor):
        try:
            data = gguf.quants.quantize(tensor.astype(np.float32), type)
        except NotImplementedError:
            weights, bytes = gguf.GGML_QUANT_SIZES[type]
            random = np.random.default_rng(0)
            data = random.integers(0, 256, (tensor.shape[0], tensor.shape[1] // weights, bytes), np.uint8)
            for at in {Type.Q4_K: (0, 2), Type.Q6_K: (208,)}[type]:
                scales = random.uniform(-0.01, 0.01, data.shape[:2]).astype(np.float16)
                data[..., at:at + 2] = scales[..., None].view(np.uint8)
            data = data.reshape(tensor.shape[0], -1)
        return (data, type), gguf.quants.dequantize(data, type).astype(np.float32)
    return embedding


class Program:
    def __init__(self, path):
        self.path = path

    def run(self, *arguments):
        command = [self.path, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: failed with status {done.returncode}")
        return done.stdout

    def logits(self, model, scratch):
        file = scratch / "logits.safetensors"
        tokens = ",".join(map(str, TOKENS))
        self.run("logits", "-m", model, "--tokens", tokens, "--output", file, "--quiet")
        return read_safetensors(file)["logits"]

    def ids(self, model, text):
        return json.loads(self.run("tokenize", "-m", model, "--json", "--", text))["tokens"]


def write_hub(folder, config, values):
    folder.mkdir()
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    write_safetensors(folder / "model.safetensors", values)


def check_codes(program, file, scratch):
    """Every ternary weight, as converted, against the package's reader and dequantizer."""
    output = scratch / "converted"
    program.run("convert", file, output, "--to", "packed", "--force", "--quiet")
    converted = read_safetensors(output / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    count = 0
    for name, packed in converted.items():
        if packed.dtype == np.uint8:
            tensor = stored[tensor_name(name)]
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(np.sign(weights), unpack(packed)), name
            count += weights.size
    return count


def check_written(program, folder, scratch):
    """The file that `bitnet convert` makes of the model in `folder`, as the package reads it."""
    tensors = read_safetensors(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    for form, type in (("tq1_0", Type.TQ1_0), ("tq2_0", Type.TQ2_0)):
        file = scratch / f"written_{form}.gguf"
        program.run("convert", folder, file, "--to", form, "--quiet")
        reader = gguf.GGUFReader(file)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        expected = [name for name in tensors if not name.endswith("_scale")]
        assert sorted(map(tensor_name, expected)) == sorted(stored)
        for name in expected:
            tensor = stored[tensor_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensors[name].dtype == np.uint8:
                assert tensor.tensor_type == type
                weights = unpack(tensors[name]) * np.float32(tensors[f"{name}_scale"][0])
                assert np.array_equal(gguf.quants.quantize(weights, type), tensor.data), name
            else:
                weights = tensors[name].astype(np.float32)
            assert np.array_equal(values.reshape(weights.shape), weights), name
        field = lambda key: reader.fields[key].contents()
        tokens = {id: token for token, id in tokenizer["model"]["vocab"].items()}
        tokens |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
        assert field("tokenizer.ggml.tokens") == [tokens[id] for id in range(len(tokens))]
        assert [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")] == [
            tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in tokenizer["model"]["merges"]]
        arch = field("general.architecture")
        assert arch == "bitnet-b1.58" and field("tokenizer.ggml.add_bos_token") is True
        assert field(f"{arch}.embedding_length") == config["hidden_size"]
        assert field(f"{arch}.attention.layer_norm_rms_epsilon") == np.float32(config["rms_norm_eps"])
        print(f"written {form}: {len(stored)} tensors equal, blocks byte for byte")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet", help="the program")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    program = Program(str(Path(args.bitnet).resolve()))
    default = ROOT / "bitnet-model" / "assets" / "default"
    llama = ROOT / "tests" / "fixtures" / "llama_packed_tied_sharded"
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        file = scratch / "model.gguf"
        config = json.loads((default / "config.json").read_text())
        tensors = read_safetensors(default / "model.safetensors")

        def compare(what, arch, config, tensors, ternary, embedding=None):
            values = write_model(file, arch, config, tensors, ternary, embedding, default, "gpt-2")
            hub = scratch / what.replace(" ", "_")
            write_hub(hub, config, values)
            found, expected = program.logits(file, scratch), program.logits(hub, scratch)
            assert np.isfinite(expected).all() and np.array_equal(found, expected), what
            print(f"{what}: {expected.size} logits equal, bit for bit")

        for arch, ternary, name in [
            ("bitnet-b1.58", I2_S, "I2_S"), ("bitnet-25", Type.TQ1_0, "TQ1_0"), ("bitnet-b1.58", Type.TQ2_0, "TQ2_0"),
        ]:
            compare(f"{arch} {name}", arch, config, tensors, ternary)
            if ternary != I2_S:  # which the package cannot read
                print(f"  {check_codes(program, file, scratch)} codes equal")
            for text in TEXTS:
                assert program.ids(file, text) == program.ids("default", text), text
        for type in (Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.F16, Type.BF16):
            compare(f"embedding {type.name}", "bitnet-b1.58", config, tensors, Type.TQ2_0, quantized(type))
        shards = {}
        for shard in sorted(llama.glob("model-*.safetensors")):
            shards |= read_safetensors(shard)
        llama_config = json.loads((llama / "config.json").read_text())
        compare("llama I2_S", "llama", llama_config, shards, I2_S)

        check_written(program, default, scratch)
        if args.tokenizer:
            # The vocabulary is larger than this model's embedding: its ids are compared, nothing is run.
            size = len(json.loads((args.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 256
            wide = dict(tensors)
            wide["model.embed_tokens.weight"] = np.zeros((size, config["hidden_size"]), np.float32)
            hub = scratch / "wide"
            for pre in ("llama-bpe", None):
                values = write_model(
                    file, "bitnet-b1.58", config | {"vocab_size": size}, wide, Type.TQ2_0, None, args.tokenizer, pre)
                if not hub.exists():
                    write_hub(hub, config | {"vocab_size": size}, values)
                    for name in ("tokenizer.json", "tokenizer_config.json"):
                        (hub / name).write_bytes((args.tokenizer / name).read_bytes())
                texts = TEXTS + [(ROOT / "README.md").read_text(), Path(__file__).read_text()]
                for text in texts:
                    assert program.ids(file, text) == program.ids(hub, text), (pre, text[:80])
                print(f"vocabulary of {size}, pre {pre}: the ids of {len(texts)} texts equal")


if __name__ == "__main__":
    main()
