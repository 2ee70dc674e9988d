#!/usr/bin/env python3
"""Run what `bitnet convert` writes with the llama.cpp inside PyPI's llama-cpp-python, and compare.

    scripts/peers_llama_cpp.py BITNET [--model DIR]...

Models with SiLU, which llama.cpp computes, are made with scripts/synthetic_checkpoint.py, once with rows of 256 and once
with longer ones; DIR is a trained one in the Hub's layout with a vocabulary.  Each is written as TQ2_0, TQ1_0 and F16, with
embeddings of every type, and with LoRA adapters beside it.

Bound.  Both engines round the input of a ternary matrix to multiples of absmax / 127: llama.cpp (Q8_K) of the absmax of
every 256 values, `bitnet` of that of the row.  scripts/peers/reference.py computes the model in float64 with either rounding;
D is the difference of the two.  The difference of the engines must be D, up to 1e-5 of the largest logit for the
arithmetic of f32 (2^-11 where llama.cpp rounds to 16 bits), and up to E where a last bit has decided which of two codes
a value became: E is thrice what noise of 1e-6 moves the two references, at most in four draws; which position a flip meets
is chance.  At least one position must be the references' up to the arithmetic, in one of four draws with the noise of f32:
without noise, a value may lie on the edge between two codes.  Rows of 256 are one block: there D is 0.

Where the likeliest tokens differ, the two best must be nearer to each other than 2 (D + E) at that position.

Blocks of Q8_0 and Q6_K are compared byte for byte with ggml's own quantizers.  What llama.cpp does not run (relu², I2_S, a
BitNet with a head of its own) it must refuse to load.

The first time it compiles llama-cpp-python, for ten minutes and more, in the environment that scripts/bench_peers.py
--install makes; $LLAMA_VENV is another one.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import environment
from peers.environment import python

VENV = Path(os.environ.get("LLAMA_VENV", environment.cache_folder() / "venv"))

if Path(sys.prefix) != VENV:
    if "llama-cpp-python" not in environment.installed(VENV):
        environment.install(VENV, ["llama.cpp-tq2_0"])
    os.execv(python(VENV), [str(python(VENV)), *sys.argv])

import gguf
import llama_cpp
import numpy as np

from peers.reference import Gguf

ROOT = Path(__file__).resolve().parent.parent
TERNARY = ("tq2_0", "tq1_0")
FLOATS = ("f32", "f16", "bf16", "q8_0", "q6_k")
NEW_TOKENS = 64
DRAWS = 4
NOISE = 1e-6
ROUNDING = 1e-7  # of an f32
ARITHMETIC = 1e-5
HALF = 2**-11  # of an f16, to which llama.cpp rounds the input of an F16 matrix
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {  # family, hidden, intermediate, heads, key and value heads, layers
    "bitnet-256": ("bitnet", 256, 256, 4, 2, 3),
    "bitnet-long": ("bitnet", 512, 768, 8, 4, 3),
    "llama-256": ("llama", 256, 256, 4, 2, 3),
    "llama-long": ("llama", 512, 1024, 8, 2, 3),
}


class LlamaCpp:
    """Logits of every position, by the C interface; keys and values in f32."""

    quiet = llama_cpp.llama_log_callback(lambda *_: None)

    def __init__(self, path, adapter=None):
        llama_cpp.llama_log_set(self.quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params())
        self.context = None
        if not self.model:
            return
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.adapter = adapter and llama_cpp.llama_adapter_lora_init(self.model, str(adapter).encode())
        if adapter and not self.adapter:
            sys.exit(f"llama.cpp does not take the adapter {adapter}")

    def logits(self, tokens):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(len(tokens), 32)
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self.model, params)
        if self.adapter:
            self.set_adapter(context)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := llama_cpp.llama_decode(context, batch):
            sys.exit(f"llama_decode returned {status}")
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self.vocab,)).copy()
                for i in range(len(tokens))]
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return np.stack(rows).astype("f8")

    def set_adapter(self, context):
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
            sys.exit("llama.cpp does not apply the adapter")

    def greedy(self, tokens, length):
        """`tokens` continued to this length."""
        tokens = list(tokens)
        while len(tokens) < length:
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens

    def text(self, tokens):
        vocab, out = llama_cpp.llama_model_get_vocab(self.model), b""
        for token in tokens:
            buffer = ctypes.create_string_buffer(256)
            length = llama_cpp.llama_token_to_piece(vocab, token, buffer, 256, 0, True)
            out += buffer.raw[:max(length, 0)]
        return out.decode(errors="replace")


class Bitnet:
    def __init__(self, binary, folder):
        self.binary, self.folder = binary, folder

    def run(self, *args):
        done = subprocess.run([self.binary, *map(str, args)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bitnet {' '.join(map(str, args))}: {done.stderr}")
        return done

    def convert(self, source, name, *options):
        path = self.folder / name
        said = self.run("convert", source, path, "--force", *options).stderr
        return path, said

    def logits(self, model, tokens, adapter=None):
        path = self.folder / "logits.safetensors"
        beside = ("--adapter", adapter) if adapter else ()
        self.run("logits", "-q", "-m", model, "--tokens", ",".join(map(str, tokens)), "-o", path, *beside)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        return np.frombuffer(data[start:], "<f4").reshape(len(tokens), -1).astype("f8")

    def greedy(self, model, prompt, count, adapter, guess):
        """The greedy text after `prompt`; `guess` continues a text, and every wrong token of it costs one more run."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            guessed = guess(tokens, len(prompt) + count)
            best = self.logits(model, guessed, adapter).argmax(1)
            wrong = (i for i in range(len(tokens), len(guessed)) if guessed[i] != best[i - 1])
            end = next(wrong, len(guessed))
            tokens = guessed[:end] + ([int(best[end - 1])] if end < len(guessed) else [])
        return tokens


class Verdicts:
    def __init__(self):
        self.failed = []

    def __call__(self, holds, text):
        print(("ok   " if holds else "FAIL ") + text, flush=True)
        if not holds:
            self.failed.append(text)


def synthetic(out, geometry, *options, activation="silu"):
    """A packed model of a geometry of MODELS in the folder `out`."""
    family, hidden, intermediate, heads, kv_heads, layers = MODELS[geometry]
    subprocess.run([sys.executable, ROOT / "scripts" / "synthetic_checkpoint.py", out, "--family", family,
                    "--vocab-size", "512", "--hidden-size", str(hidden), "--intermediate-size", str(intermediate),
                    "--num-attention-heads", str(heads), "--num-key-value-heads", str(kv_heads),
                    "--num-hidden-layers", str(layers), "--max-position-embeddings", "512", *options],
                   check=True, stdout=subprocess.DEVNULL)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": activation}))
    return out


def write_adapter(folder, config, settings, seed=5):
    """A PEFT adapter with random pairs beside all projections, large enough to be seen."""
    rng = np.random.default_rng(seed)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
              "o_proj": (hidden, queries), "gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden),
              "down_proj": (hidden, intermediate)}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            rank = settings.get("rank_pattern", {}).get(target, settings["r"])
            part = "self_attn" if target[0] in "qkvo" else "mlp"
            path = f"base_model.model.model.layers.{layer}.{part}.{target}"
            rows, cols = shapes[target]
            tensors[f"{path}.lora_A.weight"] = rng.normal(0, 1 / np.sqrt(cols), (rank, cols)).astype("f4")
            tensors[f"{path}.lora_B.weight"] = rng.normal(0, 1, (rows, rank)).astype("f4")
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset := offset + tensor.nbytes]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values()))
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": list(TARGETS)} | settings))
    return folder


def compare(check, bitnet, title, file, tokens, adapter=(None, None)):
    """Logits of both engines, position by position, within the bound; returns D and E of each position, and both."""
    peft, lora = adapter
    reference = Gguf(file, lora)
    exact = {engine: reference.logits(tokens, engine) for engine in ("llama.cpp", "bitnet")}
    moves = [np.abs(reference.logits(tokens, engine, NOISE, seed) - exact[engine]).max()
             for engine in exact for seed in range(DRAWS)]
    flips = 3 * max(moves)
    kinds = {int(kind) for _, kind in reference.tensors.values()}
    has_halves = kinds & {gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16}
    arithmetic = (HALF if has_halves else ARITHMETIC) * np.abs(exact["bitnet"]).max(1)
    d = exact["llama.cpp"] - exact["bitnet"]
    theirs, ours = LlamaCpp(file, lora).logits(tokens), bitnet.logits(file, tokens, peft)
    unexplained = np.abs(theirs - ours - d).max(1)
    drawn = {engine: [exact[engine], *(reference.logits(tokens, engine, ROUNDING, seed) for seed in range(DRAWS))]
             for engine in exact}
    nearest = [np.min([np.abs(found - logits).max(1) for logits in drawn[engine]], 0)
               for engine, found in (("llama.cpp", theirs), ("bitnet", ours))]
    tight = (np.max(nearest, 0) <= arithmetic).sum()
    check(tight > 0 and (unexplained <= arithmetic + flips).all(),
          f"{title}: logits of std {exact['bitnet'].std():.2f} differ by {np.abs(theirs - ours).max():.1e} at most, "
          f"D {np.abs(d).max():.1e}; {tight} of {len(tokens)} positions are the references' up to {arithmetic.max():.0e}, "
          f"all are D up to {unexplained.max():.1e} (E {flips:.1e})")
    return np.abs(d).max(1), arithmetic + flips, theirs, ours


def greedy(check, bitnet, title, file, prompt, adapter=(None, None)):
    """Greedy text of both; every position at which the next token differs must be as near a tie as the bound."""
    engine = LlamaCpp(file, adapter[1])
    own = engine.greedy(prompt, len(prompt) + NEW_TOKENS)
    text = bitnet.greedy(file, prompt, NEW_TOKENS, adapter[0], engine.greedy)
    d, e, theirs, ours = compare(check, bitnet, f"{title}, along the greedy text", file, text, adapter)
    same = next((i for i, (a, b) in enumerate(zip(text, own)) if a != b), len(text)) - len(prompt)
    differ = [i for i in range(len(prompt) - 1, len(text)) if theirs[i].argmax() != ours[i].argmax()]
    gaps = {i: np.diff(np.partition(ours[i], -2)[-2:])[0] for i in differ}
    for i in differ:
        print(f"     position {i}: the two best are {gaps[i]:.2e} apart, D is {d[i]:.2e}, E {e[i]:.2e}")
    check(all(gaps[i] <= 2 * (d[i] + e[i]) for i in differ),
          f"{title}: {same} of {NEW_TOKENS} greedy tokens are the same; along ours the best token differs "
          f"at {len(differ)} of {NEW_TOKENS + 1} positions, each a tie within the bound")
    return text, own, engine


def quantizers(check, bitnet, source):
    """Embeddings in blocks, byte for byte as ggml makes them."""
    ggml = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    ggml.restype, ggml.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                                                    *[ctypes.c_int64] * 3, ctypes.c_void_p]
    def embedding(kind):
        path, _ = bitnet.convert(source, f"{kind}.gguf", "--to", "tq2_0", "--token-embedding-type", kind)
        return next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    floats = np.array(embedding("f32").data, "f4")
    for kind in ("q8_0", "q6_k", "f16", "bf16"):
        tensor = embedding(kind)
        found = np.array(tensor.data).view("u1").reshape(len(floats), -1)
        expected = np.zeros_like(found)
        ggml(int(tensor.tensor_type), floats.ctypes.data, expected.ctypes.data, 0, *floats.shape, None)
        check(np.array_equal(found, expected), f"{source.name}: {kind} embedding, {found.size} bytes as ggml makes them")


def refusals(check, bitnet, folder):
    """What llama.cpp does not run it does not load, and a warning says so when it is written."""
    for what, form, source in (
        ("relu²", "tq2_0", synthetic(folder / "relu2", "bitnet-256", activation="relu2")),
        ("a BitNet with a head of its own", "tq2_0", synthetic(folder / "untied", "bitnet-256", "--untied")),
        ("I2_S", "i2_s", folder / "llama-256"),
    ):
        file, said = bitnet.convert(source, "refused.gguf", "--to", form)
        check(not LlamaCpp(file).model and "llama.cpp does not run it" in said,
              f"llama.cpp does not load {what}, and a warning says so")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet", type=Path, help="the program")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a trained model with SiLU and a vocabulary")
    args = parser.parse_args()
    check, rng = Verdicts(), np.random.default_rng(1)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bitnet = Bitnet(args.bitnet.resolve(), folder)
        f32 = ("--token-embedding-type", "f32")
        for name in MODELS:
            source = synthetic(folder / name, name)
            tokens = rng.integers(0, 512, 64).tolist()
            for form in (*TERNARY, "f16"):
                file, _ = bitnet.convert(source, f"{name}.gguf", "--to", form, *f32)
                compare(check, bitnet, f"{name} {form}", file, tokens)
            for form in TERNARY:
                file, _ = bitnet.convert(source, f"{name}.gguf", "--to", form, *f32)
                greedy(check, bitnet, f"{name} {form}", file, tokens[:8])
            config = json.loads((source / "config.json").read_text())
            for title, settings in {
                "LoRA": {"r": 8, "lora_alpha": 4},
                "rsLoRA of two ranks": {"r": 8, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {"v_proj": 3},
                                        "alpha_pattern": {"down_proj": 5}},
            }.items():
                peft = write_adapter(folder / f"{name}-{title.split()[0]}", config, settings)
                lora, _ = bitnet.convert(peft, "adapter.gguf", "--to", "lora", "--base", file)
                _, _, theirs, _ = compare(check, bitnet, f"{name} {form} and {title}", file, tokens, (peft, lora))
                change = np.abs(theirs - LlamaCpp(file).logits(tokens)).max()
                check(change > 0.1, f"{name}: {title} changes logits by {change:.2f}")
        for kind in FLOATS:
            file, _ = bitnet.convert(folder / "bitnet-256", "x.gguf", "--to", "tq2_0", "--token-embedding-type", kind)
            compare(check, bitnet, f"bitnet-256 with a {kind} embedding", file, tokens)
        for source in args.model:
            for form in TERNARY:
                file, _ = bitnet.convert(source, f"{source.name}.gguf", "--to", form, *f32)
                ids = json.loads(bitnet.run("tokenize", "-m", file, "Once upon a time", "--json").stdout)["tokens"]
                ids = [token["id"] if isinstance(token, dict) else token for token in ids]
                text, own, engine = greedy(check, bitnet, f"{source.name} {form}", file, ids)
                print(f"     bitnet:    {engine.text(text)!r}\n     llama.cpp: {engine.text(own)!r}")
            quantizers(check, bitnet, source)
        quantizers(check, bitnet, folder / "bitnet-long")
        refusals(check, bitnet, folder)
    print(f"{len(check.failed)} failed", file=sys.stderr)
    sys.exit(bool(check.failed))


if __name__ == "__main__":
    main()
