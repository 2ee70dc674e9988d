"""llama.cpp's graphs `bitnet` and `llama`, in float64 numpy, on a GGUF file as the package `gguf` reads it.

The one thing that is chosen is how the input of a ternary matrix is rounded: for the whole row, as BitNet was
trained and as `bitnet` computes, or for every block of 256, as llama.cpp's Q8_K does.  Either rounds to
multiples of absmax / 127, so that a value errs by at most absmax / 254 of what shares the scale.
"""

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType
TERNARY = (Type.TQ1_0, Type.TQ2_0)


def rounded(x, width, step_type="f8"):
    """x on the grid of absmax / 127 of every `width` values; `step_type` is what this is stored as."""
    groups = x.reshape(*x.shape[:-1], -1, width)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    step[step == 0] = 1
    return (np.rint(groups / step) * step.astype(step_type).astype("f8")).reshape(x.shape)


def to_bf16(x):
    bits = x.astype("f4").view("u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype("u4").view("f4").astype("f8")


def as_llama_cpp(x, kind):
    """x as llama.cpp rounds it before it meets a matrix of this type."""
    if kind in (*TERNARY, Type.Q6_K):
        return rounded(x, 256)
    if kind == Type.Q8_0:
        return rounded(x, 32, "f2")
    if kind == Type.F16:
        return x.astype("f2").astype("f8")
    return to_bf16(x) if kind == Type.BF16 else x


def as_bitnet(x, kind, is_projection):
    """x as `bitnet` rounds it: the rows of all projections, and nothing else."""
    return rounded(x, x.shape[-1]) if is_projection else x


class Gguf:
    """A model: `logits(tokens, engine)` with "llama.cpp" or "bitnet" as the engine."""

    def __init__(self, path, adapter=None):
        reader = gguf.GGUFReader(path)
        field = {key: value.contents() for key, value in reader.fields.items()}
        self.arch = field["general.architecture"]
        get = lambda key, default=None: field.get(f"{self.arch}.{key}", default)
        self.layers, self.eps = get("block_count"), get("attention.layer_norm_rms_epsilon")
        self.heads, self.kv_heads = get("attention.head_count"), get("attention.head_count_kv")
        self.head_dim, self.theta = get("attention.key_length"), get("rope.freq_base")
        self.tensors = {
            tensor.name: (gguf.dequantize(tensor.data, tensor.tensor_type).astype("f8"), tensor.tensor_type)
            for tensor in reader.tensors
        }
        self.pairs, self.alpha = {}, 0
        if adapter:
            reader = gguf.GGUFReader(adapter)
            self.alpha = reader.fields["adapter.lora.alpha"].contents()
            self.pairs = {tensor.name: np.array(tensor.data, "f8") for tensor in reader.tensors}

    def logits(self, tokens, engine, noise=0, seed=0):
        """(tokens, vocabulary); `noise` multiplies what is rounded by 1 ± so much, as the arithmetic of f32 does."""
        rng = np.random.default_rng(seed)
        length, angles = len(tokens), self.angles(len(tokens))
        embedding, _ = self.tensors["token_embd.weight"]
        x = embedding[tokens]
        future = np.triu(np.full((length, length), -np.inf), 1)

        def matmul(name, x):
            matrix, kind = self.tensors[f"{name}.weight"]
            is_projection = name.startswith("blk.")
            shaken = x * (1 + noise * rng.uniform(-1, 1, x.shape)) if noise else x
            given = (as_llama_cpp(shaken, kind) if engine == "llama.cpp"
                     else as_bitnet(shaken, kind, is_projection))
            y = given @ matrix.T
            if f"{name}.weight.lora_a" in self.pairs:
                a, b = (self.pairs[f"{name}.weight.lora_{which}"] for which in "ab")
                y = y + self.alpha / len(a) * (x @ a.T @ b.T)
            return y

        def norm(name, x):
            weight, _ = self.tensors[f"{name}.weight"]
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

        for layer in range(self.layers):
            block = f"blk.{layer}"
            h = norm(f"{block}.attn_norm", x)
            heads = [matmul(f"{block}.attn_{which}", h).reshape(length, -1, self.head_dim).swapaxes(0, 1)
                     for which in "qkv"]
            q, k, v = self.turn(heads[0], angles), self.turn(heads[1], angles), heads[2]
            k, v = (np.repeat(t, self.heads // self.kv_heads, 0) for t in (k, v))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(self.head_dim) + future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            h = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(length, -1)
            if self.arch == "bitnet":
                h = norm(f"{block}.attn_sub_norm", h)
            x = x + matmul(f"{block}.attn_output", h)
            h = norm(f"{block}.ffn_norm", x)
            gate = matmul(f"{block}.ffn_gate", h)
            h = gate / (1 + np.exp(-gate)) * matmul(f"{block}.ffn_up", h)
            if self.arch == "bitnet":
                h = norm(f"{block}.ffn_sub_norm", h)
            x = x + matmul(f"{block}.ffn_down", h)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return matmul(head, norm("output_norm", x))

    def angles(self, length):
        frequencies = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.outer(np.arange(length), frequencies)

    def turn(self, x, angles):
        """Rotary embedding: `llama` turns neighbours together, `bitnet` halves."""
        half = self.head_dim // 2
        first, second = (x[..., 0::2], x[..., 1::2]) if self.arch == "llama" else (x[..., :half], x[..., half:])
        cos, sin = np.cos(angles), np.sin(angles)
        turned = first * cos - second * sin, first * sin + second * cos
        if self.arch == "llama":
            return np.stack(turned, -1).reshape(x.shape)
        return np.concatenate(turned, -1)
