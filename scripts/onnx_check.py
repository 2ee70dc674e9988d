#!/usr/bin/env python3
"""Run what `bitnet convert --to onnx` writes in ONNX Runtime and compare its logits with those of `bitnet logits`.

    scripts/onnx_check.py BITNET [--speed] [MODEL...]

MODELs are folders of the Hub's layout or `default`; without any, all families of tests/fixtures and the default model.  Each is
written with both kinds of weights, passes onnx.checker, and is run as a whole prompt, token by token with the cache, and in a
batch of two of which one is padded on the left.

Bounds.  Products of projections are integers, exact in both programs, so that logits of both kinds of weights must have the same bits.
Everything else differs by the order of f32 sums: some units of 2^-24 of the values in each of some hundred steps, so that logits
agree within SAME of the largest of them (or of 1).  Where
an activation times its factor comes within that of k + 1/2, its code flips, by 1/127 of the largest activation of its row, and this row
and those that see it differ by more, up to a relative RMS of 0.03 (what the reference software differs by from itself).  So:
most rows must agree within SAME, the relative RMS must be below 0.03, and the most
probable token must be equal wherever its lead is larger than twice the difference of its row.

--speed times a prompt of 128 tokens and 64 more one by one, with two threads, and `bitnet bench` beside it.

Needs Python 3.11 and, the first time, PyPI: packages go into a virtual environment outside the repository, $ONNX_VENV or
~/.cache/bitnet-onnx.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checks import environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("onnx==1.23.2", "onnxruntime==1.32.0", "numpy==2.4.6")

try:
    import numpy as np
    import onnx
    import onnxruntime
except ImportError:
    environment.enter("ONNX_VENV", "bitnet-onnx", PACKAGES)

from checks.safetensors import read_safetensors

SAME = 1e-5
RELATIVE_RMS_LIMIT = 0.03
NEW_TOKENS = 32
THREADS = 2


class Program:
    def __init__(self, path):
        self.path = path

    def run(self, *arguments):
        command = [self.path, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: failed with status {done.returncode}")
        return done.stdout

    def logits(self, model, tokens, scratch):
        file = scratch / "logits.safetensors"
        tokens = ",".join(map(str, tokens))
        self.run("logits", "-m", model, "--tokens", tokens, "--output", file, "--quiet")
        return read_safetensors(file)["logits"]


class Decoder:
    """An exported model in ONNX Runtime, with its cache."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.pasts = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, ids, mask=None, cache=None):
        """Logits (batch, seq, vocab) of `ids` (batch, seq) behind `cache`, and the cache with them."""
        ids = np.asarray(ids, np.int64)
        if cache is None:
            empty = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in self.pasts.items()}
            cache = (empty, np.zeros((len(ids), 0), np.int64))
        past, seen = cache
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        mask = np.concatenate([seen, mask], 1)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1]:]
        outputs = self.session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past)
        outputs = dict(zip(self.outputs, outputs))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in self.pasts}
        return outputs["logits"], (past, mask)


def compare(what, found, expected):
    """Checks the bounds above; returns how many rows are the same, of how many, and the largest difference of those."""
    assert found.shape == expected.shape and np.isfinite(found).all(), f"{what}: {found.shape} {expected.shape}"
    rows = np.abs(found - expected).max(1)
    same = rows <= SAME * np.maximum(np.abs(expected).max(1), 1)
    rms = np.sqrt(((found - expected).astype(np.float64) ** 2).sum() / (expected.astype(np.float64) ** 2).sum())
    assert rms < RELATIVE_RMS_LIMIT, f"{what}: relative RMS {rms:.2e}"
    ordered = np.sort(expected, 1)
    leads = ordered[:, -1] - ordered[:, -2]
    clear = leads > 2 * rows
    assert (found.argmax(1) == expected.argmax(1))[clear].all(), f"{what}: other tokens are the most probable"
    return same.sum(), len(rows), rows[same].max(initial=0)


def check_interface(path, config):
    graph = onnx.load(path, load_external_data=False).graph
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    shape = lambda value: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    cache = lambda kind, length: {f"{kind}.{layer}.{part}": ["batch_size", kv_heads, length, head_dim]
                                  for layer in range(layers) for part in ("key", "value")}
    seq, past, both = "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    tokens = {"input_ids": ["batch_size", seq], "attention_mask": ["batch_size", both], "position_ids": ["batch_size", seq]}
    assert {i.name: shape(i) for i in graph.input} == tokens | cache("past_key_values", past)
    logits = {"logits": ["batch_size", seq, config["vocab_size"]]}
    assert {o.name: shape(o) for o in graph.output} == logits | cache("present", both)


def check(program, model, scratch):
    """All comparisons of one model."""
    name = Path(model).name
    folder = ROOT / "bitnet-model" / "assets" / "default" if model == "default" else Path(model)
    config = json.loads((folder / "config.json").read_text())
    random = np.random.default_rng(0)
    prompt = random.integers(3, config["vocab_size"], 24).tolist()
    whole, counts = {}, np.zeros(2, int)
    for kind in ("int2", "int8"):
        path = scratch / f"{name}_{kind}.onnx"
        program.run("convert", model, path, "--to", "onnx", "--onnx-weights", kind, "--force", "--quiet")
        onnx.checker.check_model(path, full_check=True)
        check_interface(path, config)
        decoder = Decoder(path)
        whole[kind], cache = decoder([prompt])
        text, logits = list(prompt), whole[kind][:, -1:]
        one_by_one = [whole[kind][0]]
        for _ in range(NEW_TOKENS):  # greedy, with the cache
            text.append(int(logits[0, -1].argmax()))
            logits, cache = decoder([text[-1:]], cache=cache)
            one_by_one.append(logits[0])
        expected = program.logits(model, text, scratch)
        results = {"greedy": compare(f"{name} {kind} greedy", np.concatenate(one_by_one), expected)}
        results["whole"] = compare(f"{name} {kind} whole", decoder([text])[0][0], expected)
        cut = len(text) - 15  # a second row that is padded on the left
        ids = np.array([text, [0] * 15 + text[:cut]])
        mask = np.ones_like(ids)
        mask[1, :15] = 0
        batch, cache = decoder(ids[:, :-2], mask[:, :-2])
        last, _ = decoder(ids[:, -2:], cache=cache)
        batch = np.concatenate([batch, last], 1)
        results["batch"] = compare(f"{name} {kind} batch", batch[0], expected)
        results["padded"] = compare(f"{name} {kind} padded", batch[1, 15:], expected[:cut])
        for same, rows, _ in results.values():
            counts += [same, rows]
        worst = max(result[2] for result in results.values())
        line = ", ".join(f"{what} {same}/{rows}" for what, (same, rows, _) in results.items())
        size = sum(file.stat().st_size for file in (path, Path(f"{path}.data")))
        print(f"{name} {kind}: rows the same: {line}; largest difference of those {worst:.1e}; {size:,} bytes", flush=True)
    assert np.array_equal(whole["int2"], whole["int8"]), f"{name}: int2 and int8 differ by {np.abs(whole['int2'] - whole['int8']).max()}"
    return counts


def seconds(call, times):
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def speed(program, model, scratch):
    name = Path(model).name
    for kind in ("int2", "int8"):
        path = scratch / f"{name}_{kind}.onnx"
        program.run("convert", model, path, "--to", "onnx", "--onnx-weights", kind, "--force", "--quiet")
        decoder = Decoder(path)
        prompt = np.arange(3, 131)[None]
        _, cache = decoder(prompt)
        prefill = seconds(lambda: decoder(prompt), 3)

        def decode():
            state = cache
            for token in range(64):
                _, state = decoder([[token]], cache=state)
        print(f"{name} {kind}: {128 / prefill:.1f} tokens/s of the prompt, {64 / seconds(decode, 3):.2f} new tokens/s", flush=True)
    print(program.run("bench", "-m", model, "--threads", THREADS, "-p", 128, "-n", 64).decode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet", help="the program")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_intermixed_args()
    program = Program(str(Path(args.bitnet).resolve()))
    fixtures = sorted(path.parent for path in (ROOT / "tests" / "fixtures").glob("*/expected.safetensors"))
    fixtures = [path for path in fixtures if not path.name.startswith(("grad_", "lora_"))]
    models = args.models or [*map(str, fixtures), "default"]
    print(f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, {THREADS} threads")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.speed:
            for model in models:
                speed(program, model, scratch)
            return
        same, rows = sum(check(program, model, scratch) for model in models)
    print(f"{same} of {rows} rows the same within {SAME}")
    assert same > rows / 2, "most rows must be the same"


if __name__ == "__main__":
    main()
