#!/usr/bin/env python3
"""The synthetic 2B-4T model in every form the peers read, all from one packed checkpoint.

    models.py KIND FOLDER

KIND    what is written under FOLDER
packed  `2b-4t-packed/`, by scripts/synthetic_checkpoint.py: codes and bf16, 1.2 GB
latent  `2b-4t-latent/`: the same weights as code times scale in bf16, 4.8 GB, for online quantization
tq2_0   `2b-4t-tq2_0.gguf`: 2.06 bits a ternary weight, embedding q6_K, 0.8 GB
tq1_0   `2b-4t-tq1_0.gguf`: 1.69 bits a ternary weight, embedding q6_K, 0.7 GB

Every kind but `packed` needs numpy, the GGUF ones also the `gguf` package.  A file that is there
already is kept; a new one is written under another name and renamed when complete.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

KINDS = ("packed", "latent", "tq2_0", "tq1_0")
PREFIX = "2b-4t"
ROW_BYTES = 32 << 20  # of f32, converted at once

# safetensors name of a layer's tensor -> its GGUF name, as the architecture `bitnet` is read.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
}


def model_path(folder, kind):
    """Where a kind lies: a folder for the checkpoints, a file for GGUF."""
    return folder / (f"{PREFIX}-{kind}.gguf" if kind.startswith("tq") else f"{PREFIX}-{kind}")


class Safetensors:
    """The tensors of one file as mapped arrays: u8, or u16 for bf16."""

    def __init__(self, path):
        import numpy as np

        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(length))
        self.header.pop("__metadata__", None)
        self.data = np.memmap(path, mode="r", offset=8 + length)

    def __getitem__(self, name):
        entry = self.header[name]
        start, end = entry["data_offsets"]
        dtype = {"U8": "u1", "BF16": "<u2"}[entry["dtype"]]
        return self.data[start:end].view(dtype).reshape(entry["shape"])


def to_f32(bf16):
    """bf16 bits as f32."""
    return (bf16.astype("u4") << 16).view("f4")


def codes(packed):
    """Codes 0, 1, 2 of (rows / 4, cols) packed bytes, (rows, cols): bits 2i hold the i-th quarter of the rows."""
    import numpy as np

    return np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)])


@contextmanager
def complete(path):
    """A name beside `path` to write to, renamed to it when the block ends well."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        unfinished.rename(path)


def write_packed(folder):
    script = Path(__file__).resolve().parent.parent / "synthetic_checkpoint.py"
    subprocess.run([sys.executable, script, model_path(folder, "packed")], check=True)


def write_latent(folder):
    """code · weight_scale in bf16: absolute-mean quantization finds the codes again."""
    import numpy as np

    packed = model_path(folder, "packed")
    source = Safetensors(packed / "model.safetensors")
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, entry in source.header.items():
        if name.endswith(".weight_scale"):
            continue
        rows, *rest = entry["shape"]
        shape = [4 * rows if entry["dtype"] == "U8" else rows, *rest]
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quantization_mode"] = "online"

    with complete(model_path(folder, "latent")) as made:
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.copyfile(packed / "generation_config.json", made / "generation_config.json")
        with open(made / "model.safetensors", "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in list(header)[1:]:
                tensor = source[name]
                if tensor.dtype == np.uint8:
                    scale = source[f"{name}_scale"][0]
                    tensor = np.array([scale | 0x8000, 0, scale], "<u2")[codes(tensor)]
                tensor.tofile(file)


def q6_k(rows):
    """(n, 256·m) f32 as q6_K blocks of 210 bytes: x = d · scale[i / 16] · (q[i] − 32), q of 6 bits."""
    import numpy as np

    blocks = rows.reshape(-1, 16, 16)
    wanted = np.abs(blocks).max(2) / 31  # steps of the groups of sixteen: |q − 32| ≤ 31
    d = (wanted.max(1) / 127).astype("<f2")
    scales = np.rint(wanted / np.maximum(d.astype("f4"), 1e-8)[:, None]).clip(1, 127)
    step = np.maximum(d.astype("f4")[:, None] * scales, 1e-8)
    q = (np.rint(blocks / step[:, :, None]).clip(-32, 31) + 32).astype("u1")
    # Low nibbles: value 64·nibble + i of a half lies in byte i; high pairs: value 32·k + i in byte i, bits 2k.
    low = (q & 15).reshape(-1, 2, 2, 64)
    high = (q >> 4).reshape(-1, 2, 4, 32)
    out = np.concatenate([
        (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128),
        (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64),
        scales.astype("i1").view("u1"),
        d[:, None].view("u1"),
    ], axis=1)
    return out.reshape(len(rows), -1)


def gguf_tensors(source, layers, qtype):
    """Every tensor as (name, shape, type, the function that gives its rows in pieces)."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    def floats(name):
        return lambda: iter([to_f32(source[name])])

    def embedding(name):
        table = source[name]
        step = ROW_BYTES // (4 * table.shape[1])
        return lambda: (q6_k(to_f32(table[i:i + step])) for i in range(0, len(table), step))

    def ternary(name):
        scale = to_f32(source[f"{name}_scale"])[0]
        return lambda: iter([quants.quantize((codes(source[name]).astype("f4") - 1) * scale, qtype)])

    def shape(name):
        entry = source.header[name]
        rows, *rest = entry["shape"]
        return (4 * rows if entry["dtype"] == "U8" else rows, *rest)

    f32, q6 = GGMLQuantizationType.F32, GGMLQuantizationType.Q6_K
    yield "token_embd.weight", shape("model.embed_tokens.weight"), q6, embedding("model.embed_tokens.weight")
    yield "output_norm.weight", shape("model.norm.weight"), f32, floats("model.norm.weight")
    for layer in range(layers):
        for ours, theirs in GGUF_NAMES.items():
            name = f"model.layers.{layer}.{ours}.weight"
            packed = source[name].dtype == np.uint8
            yield (f"blk.{layer}.{theirs}.weight", shape(name), *((qtype, ternary(name)) if packed
                                                                  else (f32, floats(name))))


def write_gguf(folder, kind):
    import gguf
    import numpy as np

    packed = model_path(folder, "packed")
    config = json.loads((packed / "config.json").read_text())
    source = Safetensors(packed / "model.safetensors")
    tensors = list(gguf_tensors(source, config["num_hidden_layers"], gguf.GGMLQuantizationType[kind.upper()]))
    with complete(model_path(folder, kind)) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.BITNET])
        writer.add_name("synthetic 2B-4T")
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_tokenizer_model("no_vocab")
        for name, shape, qtype, _ in tensors:
            block, size = gguf.GGML_QUANT_SIZES[qtype]
            encoded = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, encoded, np.dtype("u1"), math.prod(encoded), qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for *_, pieces in tensors:
            writer.write_tensor_data(np.concatenate(list(pieces())))
        writer.close()


def ensure(folder, kind):
    """Writes a kind, and what it is made from, unless it is there."""
    if model_path(folder, kind).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "packed":
        write_packed(folder)
        return
    ensure(folder, "packed")
    if kind == "latent":
        write_latent(folder)
    else:
        write_gguf(folder, kind)


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(__doc__)
    try:
        ensure(Path(sys.argv[2]), sys.argv[1])
    except OSError as error:
        sys.exit(f"{model_path(Path(sys.argv[2]), sys.argv[1])}: {os.strerror(error.errno or 0)}")


if __name__ == "__main__":
    main()
