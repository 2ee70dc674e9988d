#!/usr/bin/env python3
"""50 AdamW steps of a small BitNet b1.58 in plain PyTorch: the oracle of tests/torch_training.rs.

    python scripts/torch_training.py [FIXTURE.json]     (torch 2.15.0, CPU)

Written from the formulas: absmean ternary weights and absmax 8-bit activations, both rounded half to even, gradients
straight through; RMSNorm, rotary embedding, grouped-query attention, relu², sub-norms, tied head. Nothing is shared with
the Rust code but the closed formulas below for initial weights and tokens, which use integers and powers of two only, so that
both sides start from the same bits.

The same steps run with one thread and with two, and once in f64. The first two differ by the order of additions alone: how
far apart they drift says how close another correct f32 implementation can be expected to stay. The f64 run says how far f32
itself is from the formulas.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 128, 512, 2, 4, 2, 256
BATCH, SEQUENCE, STEPS = 4, 32, 50
HEAD_DIM = HIDDEN // HEADS
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0
LR, BETAS, ADAM_EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
AMPLITUDE = 2.0**-5  # uniform weights of a standard deviation of 0.018

FIXTURE = Path(__file__).parent.parent / "tests/fixtures/torch_training.json"


def mix(x):
    """The finalizer of MurmurHash3, 32 bits, of a number or a tensor."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def fnv(name):
    """FNV-1a, 32 bits."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def initial(name, shape):
    """Norms are 1; other parameters are 24 random bits, as multiples of 2⁻²³ between -1 and 1, times AMPLITUDE."""
    if len(shape) == 1:
        return torch.ones(shape)
    places = torch.arange(shape[0] * shape[1]) + fnv(name)
    values = (mix(places & 0xFFFFFFFF) >> 8) - (1 << 23)
    return (values.double() * (AMPLITUDE / (1 << 23))).float().reshape(shape)


def tokens(step):
    """Seven of eight tokens follow from the one before, so that there is something to learn."""
    rows = []
    for row in range(BATCH):
        token, ids = 0, []
        for i in range(SEQUENCE + 1):
            random = mix(((step * BATCH + row) * (SEQUENCE + 1) + i) * 0x9E3779B1 & 0xFFFFFFFF)
            token = (random >> 8) % VOCAB if i == 0 or random % 8 == 0 else (token * 5 + 17) % VOCAB
            ids.append(token)
        rows.append(ids)
    return torch.tensor(rows)


def shapes():
    """The parameters, named as in a checkpoint."""
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "o_proj"):
            found[f"{at}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("k_proj", "v_proj"):
            found[f"{at}self_attn.{name}.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            found[f"{at}mlp.{name}.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{at}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm"):
            found[f"{at}{name}.weight"] = (HIDDEN,)
        found[f"{at}mlp.ffn_sub_norm.weight"] = (INTERMEDIATE,)
    return found


def straight_through(x, quantized):
    """The value of `quantized`, the gradient of `x`."""
    return Identity.apply(x, quantized)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantized):
        return quantized.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def bit_linear(x, weight):
    """x · Wᵀ with int8 rows of x and ternary W."""
    with torch.no_grad():
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x_quantized = (x * scale).round().clamp(-128, 127) / scale
        scale = 1 / weight.abs().mean().clamp(min=1e-5)
        w_quantized = (weight * scale).round().clamp(-1, 1) / scale
    return straight_through(x, x_quantized) @ straight_through(weight, w_quantized).T


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS))


def rotate(x):
    """Rotary embedding of x (batch, heads, seq, head_dim): pairs (i, i + head_dim/2)."""
    frequency = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=x.dtype) / HEAD_DIM)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


def attention(x, weights):
    batch, seq, _ = x.shape
    split = lambda y, heads: y.reshape(batch, seq, heads, HEAD_DIM).transpose(1, 2)
    q = rotate(split(bit_linear(x, weights["q_proj.weight"]), HEADS))
    k = rotate(split(bit_linear(x, weights["k_proj.weight"]), KV_HEADS))
    v = split(bit_linear(x, weights["v_proj.weight"]), KV_HEADS)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
    scores = q @ k.transpose(2, 3) * HEAD_DIM**-0.5
    future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, HIDDEN)
    return bit_linear(rms_norm(y, weights["attn_sub_norm.weight"]), weights["o_proj.weight"])


def feed_forward(x, weights):
    y = F.relu(bit_linear(x, weights["gate_proj.weight"])).pow(2) * bit_linear(x, weights["up_proj.weight"])
    return bit_linear(rms_norm(y, weights["ffn_sub_norm.weight"]), weights["down_proj.weight"])


def below(weights, prefix):
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def loss_of(weights, ids):
    """Mean cross-entropy of the next token."""
    x = weights["model.embed_tokens.weight"][ids[:, :-1]]
    for layer in range(LAYERS):
        block = below(weights, f"model.layers.{layer}.")
        x = x + attention(rms_norm(x, block["input_layernorm.weight"]), below(block, "self_attn."))
        x = x + feed_forward(rms_norm(x, block["post_attention_layernorm.weight"]), below(block, "mlp."))
    logits = rms_norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(threads, dtype=torch.float32):
    """Losses and gradient norms of all steps."""
    torch.set_num_threads(threads)
    weights = {name: initial(name, shape).to(dtype).requires_grad_() for name, shape in shapes().items()}
    parameters = list(weights.values())
    optimizer = torch.optim.AdamW(parameters, LR, BETAS, ADAM_EPS, WEIGHT_DECAY)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(weights, tokens(step))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "grad_norms": norms}


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURE
    runs = {"one_thread": train(1), "two_threads": train(2), "f64": train(1, torch.float64)}
    for step in range(STEPS):
        one, two, f64 = (runs[run]["losses"][step] for run in runs)
        print(f"{step:3} {one:.7f}  2 threads {abs(one - two):.1e}  f64 {abs(one - f64):.1e}")
    record = {"torch": torch.__version__, **runs}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
