#!/usr/bin/env python3
"""Speed of quantization-aware training: `bitnet train qat` beside PyTorch, in turns on the same machine.

    scripts/peers_training.py --bitnet target/release/bitnet [--rounds 3] [--json]

The model is that of bitnet-train/recipes/benchmark.toml. PyTorch trains it as its users write it: nn.Linear with
straight-through absmean ternary weights and absmax 8-bit activations, scaled_dot_product_attention, fused AdamW, eager and
compiled, in f32 and under bfloat16 autocast. Every run is a process of its own, on as many threads as `--threads` says; its
figure is the median over its steps after the first three, the table has the median of the rounds. Machines change their
speed from minute to minute: the ratio of a round, not its figures, is what lasts.

Needs torch and a C++ compiler, for example

    python3 -m venv ~/.cache/bitnet-torch/venv
    ~/.cache/bitnet-torch/venv/bin/pip install torch==2.15.0
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "bitnet-train/recipes/benchmark.toml"
WARM_UP, STEPS = 3, 13
PYTORCH = {
    "PyTorch f32": (),
    "PyTorch bf16": ("--bf16",),
    "PyTorch f32 compiled": ("--compile",),
    "PyTorch bf16 compiled": ("--bf16", "--compile"),
}
OURS = {"bitnet f32": "f32", "bitnet bf16": "bf16"}


def peak_memory(pid="self"):
    """The most resident bytes so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def network(sizes, nn, F, torch):
    """The model as a torch module: token ids (batch, seq + 1) to the loss."""
    hidden, heads, kv_heads = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    intermediate, vocab, head_dim = sizes["intermediate_size"], sizes["vocab_size"], hidden // heads

    class BitLinear(nn.Linear):
        def forward(self, x):
            scale = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = x + ((x * scale).round().clamp(-128, 127) / scale - x).detach()
            scale = 1 / self.weight.detach().abs().mean().clamp(min=1e-5)
            weight = self.weight + ((self.weight * scale).round().clamp(-1, 1) / scale - self.weight).detach()
            return F.linear(x, weight)

    def bit_linear(inputs, outputs):
        return BitLinear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(size, 1e-5) for size in (hidden, hidden, hidden, intermediate))
            self.q, self.o = bit_linear(hidden, hidden), bit_linear(hidden, hidden)
            self.k, self.v = (bit_linear(hidden, kv_heads * head_dim) for _ in "kv")
            self.gate, self.up = (bit_linear(hidden, intermediate) for _ in "gu")
            self.down = bit_linear(intermediate, hidden)

        def forward(self, x, cos, sin):
            batch, seq, _ = x.shape
            h = self.norms[0](x)
            q, k, v = (f(h).view(batch, seq, -1, head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = (rotate(y, cos, sin) for y in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            x = x + self.o(self.norms[1](y.transpose(1, 2).reshape(batch, seq, hidden)))
            h = self.norms[2](x)
            return x + self.down(self.norms[3](F.relu(self.gate(h)).square() * self.up(h)))

    def rotate(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocab, hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes["num_hidden_layers"]))
            self.norm = nn.RMSNorm(hidden, 1e-5)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids):
            seq = ids.shape[1] - 1
            frequency = 500_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
            angle = (torch.arange(seq)[:, None] * frequency).repeat(1, 2)
            x, cos, sin = self.embed(ids[:, :-1]), angle.cos(), angle.sin()
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = F.linear(self.norm(x), self.embed.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return Network()


def worker(args):
    """Trains in this process; prints tokens a second and the peak of memory as JSON."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    recipe = tomllib.loads(RECIPE.read_text())
    batch, seq = recipe["train"]["batch_size"], recipe["data"]["sequence_length"]
    model = network(recipe["model"], nn, F, torch)
    loss_of = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    speeds = []
    for _ in range(WARM_UP + STEPS):
        ids = torch.randint(recipe["model"]["vocab_size"], (batch, seq + 1))
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        speeds.append(batch * seq / (time.perf_counter() - start))
    print(json.dumps({"tokens_per_second": statistics.median(speeds[WARM_UP:]), "peak_bytes": peak_memory()}))


def run_pytorch(flags, args):
    command = [sys.executable, __file__, "--worker", "--threads", str(args.threads), *flags]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_ours(backward, args):
    with tempfile.TemporaryDirectory() as folder:
        command = [args.bitnet, "train", "qat", RECIPE, "--backward", backward, "-o", f"{folder}/run", "--quiet"]
        environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        lines = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
        updates = [line for line in lines if line["kind"] == "train"]
    return {
        "tokens_per_second": statistics.median(update["tokens_per_second"] for update in updates[WARM_UP:]),
        "peak_bytes": updates[-1]["memory"]["peak_bytes"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitnet", default=ROOT / "target/release/bitnet", help="the program, a release build")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each [default: 3]")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run [default: 2]")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    for flag in ("--worker", "--bf16", "--compile"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    runs = {name: [] for name in (*PYTORCH, *OURS)}
    for number in range(args.rounds):
        for name in runs:
            print(f"round {number + 1}: {name}", file=sys.stderr)
            run = run_pytorch(PYTORCH[name], args) if name in PYTORCH else run_ours(OURS[name], args)
            runs[name].append(run)
    if args.json:
        return print(json.dumps(runs, indent=1))
    median = {name: statistics.median(run["tokens_per_second"] for run in found) for name, found in runs.items()}
    print("| | tokens/s, median | all | peak memory |\n|---|---:|---:|---:|")
    for name, found in runs.items():
        speeds = ", ".join(f"{run['tokens_per_second']:.0f}" for run in found)
        peak = max(run["peak_bytes"] for run in found) / 2**30
        print(f"| {name} | {median[name]:.0f} | {speeds} | {peak:.2f} GiB |")
    for ours, theirs in (("f32", ("f32", "f32 compiled")), ("bf16", PYTORCH)):
        best = max(theirs, key=lambda name: median[f"PyTorch {name.removeprefix('PyTorch ')}"])
        best = f"PyTorch {best.removeprefix('PyTorch ')}"
        print(f"bitnet {ours} is {median[f'bitnet {ours}'] / median[best]:.2f} × {best}", file=sys.stderr)


if __name__ == "__main__":
    main()
