#!/usr/bin/env python3
"""Put one bug at a time into the CUDA kernels, their launches and their ops: the tests must find each.

    scripts/cuda_mutations.py [WORD...]     # only the bugs whose names contain a word

A bug is a change of text. Those of a kernel are compiled by nvcc and executed with the programs of
`scripts/cuda_interpret.sh --prepare`; those of the Rust code are compiled into programs of their own first, in a copy
of the tree. Prints a table of what found each bug, and fails if one was not found. Standard library only; needs the
compiler of scripts/cuda_toolkit.sh. Takes some seconds a bug of a kernel, a minute of the Rust code.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path("bitnet-model/src/cuda")
TOOLKIT = os.environ.get("BITNET_CUDA_TOOLKIT", Path.home() / ".cache/bitnet-cuda/13.4")
NVCC = os.environ.get("BITNET_NVCC", f"{TOOLKIT}/nvidia/cu13/bin/nvcc")
SECONDS = 600  # of a run
# Words of the tests that look at what a file does; of other files, all tests.
TESTS = {
    "adamw.cu": ["run", "trained", "norms"],
    "attention.cu": ["attention"],
    "attention_backward.cu": ["gradients"],
    "dense.cu": ["floats", "ends", "screened"],
    "dropout.cu": ["trained"],
    "gated.cu": ["gates", "gradients"],
    "gemm.cu": ["gradients"],
    "hadamard.cu": ["rotated"],
    "head.cu": ["ends", "screened"],
    "loss.cu": ["gradients"],
    "mma.cuh": ["products"],
    "quantize.cu": ["way"],
    "quantize.cuh": ["products"],
    "rms_norm.cu": ["norm", "gradients"],
    "rope.cu": ["rotations"],
    "ternarize.cu": ["gradients", "halfway", "way"],
    "ternary_backward.cu": ["gradients"],
    "ternary_gemm.cu": ["products"],
    "ternary_gemv.cu": ["products"],
}

# Name, file of src/cuda, what is there (once), and what is there instead.
BUGS = [
    ("no Σx for a token", "ternary_gemv.cu", "int sum = -x.sums[token];", "int sum = 0;"),
    ("no Σx for tokens", "ternary_gemv.cu", "int sum = -x.sums[first + token];", "int sum = 0;"),
    ("no Σx in the matrix product", "ternary_gemm.cu", "c[b][tile][i] - x.sums[token]", "c[b][tile][i]"),
    ("a padded row is written", "ternary_gemv.cu", "threadIdx.x < band.rows", "threadIdx.x <= band.rows"),
    ("a token too many", "ternary_gemv.cu", "first + token < tokens && r", "first + token <= tokens && r"),
    ("a row too few of a ragged band", "ternary_gemm.cu", "r < band.rows", "r + 1 < band.rows"),
    ("columns behind the last chunk", "ternary_gemv.cu", "if (chunk < w.chunks) words", "if (chunk <= w.chunks) words"),
    ("two registers of the weights exchanged", "mma.cuh", "words[i % 2][step / 2]", "words[(i + 1) % 2][step / 2]"),
    ("depth of the weights exchanged", "mma.cuh", "2 * (step % 2) + i / 2", "2 * (step % 2) + 1 - i / 2"),
    ("operands of sm_75 exchanged", "mma.cuh", "c[2], c[3], a[1], b0", "c[2], c[3], a[2], b0"),
    ("activations exchanged", "mma.cuh", "mma(c, a[2], unsigned(high.x)", "mma(c, a[2], unsigned(low.x)"),
    ("rows of the result exchanged", "ternary_gemv.cu", "[g + 8 * (i / 2)] = c[i]", "[g + 8 * (i % 2)] = c[i]"),
    ("no barrier before the sum of warps", "ternary_gemv.cu", "sums[warp][lane / 4 + 8] = high;\n    }\n    __syncthreads();", "sums[warp][lane / 4 + 8] = high;\n    }"),
    ("no barrier before the next chunk", "ternary_gemm.cu", "__syncthreads(); // all have read", "// all have read"),
    ("no barrier before the next band", "ternary_backward.cu", "__syncthreads(); // all have read", "// all have read"),
    ("no barrier after a tile", "rms_norm.cu", "__syncthreads(); // the chains have read the tile before", ""),
    ("no barrier behind the scores", "attention.cu", "score * shape.scale;\n        }\n    }\n    __syncthreads();", "score * shape.scale;\n        }\n    }"),
    ("no wait for the warp's scores", "attention.cu", "__syncwarp();\n        float sum = 0.f;", "float sum = 0.f;"),
    ("one lane of a warp's sum left out", "ternary_gemv.cu", "unsigned step = 2; step > 0", "unsigned step = 2; step > 1"),
    ("sums of all lanes, not of sixteen", "reduce.cuh", "unsigned step = SUM_LANES / 2;", "unsigned step = SUM_LANES;"),
    ("codes rounded up at a half", "quantize.cuh", "half_up ? floorf(y + 0.5f) : y", "floorf(y + 0.5f)"),
    ("codes rounded towards zero", "quantize.cuh", "__float2int_rn", "__float2int_rz"),
    ("a scale of 128", "quantize.cuh", "levels / fmaxf", "(levels + 1.f) / fmaxf"),
    ("padding is not zero", "quantize.cuh", "finite && i < width ?", "finite && i < padded ?"),
    ("sum of squares not fused", "rms_norm.cu", "sum = fmaf(shared.tile[i], shared.tile[i], sum)", "sum += shared.tile[i] * shared.tile[i]"),
    ("a norm of another order", "rms_norm.cu", "weight[i] * (x[i] * r);\n}\n\n/// What", "weight[i] * x[i] * r;\n}\n\n/// What"),
    ("an approximate root", "rms_norm.cu", "1.f / sqrtf(sum / float(width) + eps)", "rsqrtf(sum / float(width) + eps)"),
    ("angles of another token", "rope.cu", "token % angle_rows * half", "token / angle_rows * half"),
    ("a rotation the other way", "rope.cu", "x1 * c - x2 * s", "x1 * c + x2 * s"),
    ("an element too many of a gate", "gated.cu", "min(width, (blockIdx.y + 1) * GATED)", "(blockIdx.y + 1) * GATED"),
    ("a chain of 256", "reduce.cuh", "CHAIN = 512", "CHAIN = 256"),
    ("bfloat16 cut off", "floats.cuh", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
    ("a column too many of a gradient", "ternary_backward.cu", "if (token < tokens && col < w.cols) dx[", "if (token < tokens && col <= w.cols) dx["),
    ("a query sees the next position", "attention.cu", "query % shape.seq + 1;", "query % shape.seq + 2;"),
    ("another head's keys", "attention.cu", "kv_head = blockIdx.y / parts", "kv_head = blockIdx.y % parts"),
    ("no scale of int8 keys", "attention.cu", "if constexpr (T::SCALED) score *=", "if constexpr (false) score *="),
    ("blocks merged without their maxima", "attention.cu", "sum = sum * before + partial.sum * now", "sum = sum + partial.sum * now"),
    ("another order of a dense sum", "dense.cu", "sums[t][r] = fmaf(value, values[r], sums[t][r])", "sums[t][r] += value * values[r]"),
    ("a row behind the last one is written", "dense.cu", "row0 + r < w.rows) y[", "row0 + r <= w.rows) y["),
    ("rows of the head that are not those listed", "dense.cu", "w.ids ? w.ids[row] : row", "row"),
    ("a token too many of a dense product", "dense.cu", "min(DENSE_TOKENS, tokens - first)", "DENSE_TOKENS"),
    ("activations of the head cut off", "head.cu", "__float2int_rn(x[i] * factor) : 0, hi", "int(x[i] * factor) : 0, hi"),
    ("low halves of activations of others", "head.cu", "(signed char)(value - 64 * hi)", "(signed char)(value - 63 * hi)"),
    ("groups of the head in another order", "head.cu", "out[t] = at.half ? fmaf(other_scale, other, out[t]) : fmaf(scale, sum, out[t]);", "out[t] = at.half ? fmaf(scale, sum, out[t]) : fmaf(other_scale, other, out[t]);"),
    ("no offset of the head's codes", "head.cu", "lo - Codes::OFFSET * x.sums[place]", "lo"),
    ("high bits of six exchanged", "head.cu", "i < 4 ? high.x : high.y", "i < 4 ? high.y : high.x"),
    ("a scale of another group", "head.cu", "__ldg(scales + group * HEAD_BAND", "__ldg(scales + 2 * pair * HEAD_BAND"),
    ("half of a row of eight bits", "head.cu", "hi[t] + __shfl_xor_sync(ALL_LANES, hi[t], 1)", "hi[t]"),
    ("a sum of the norm's gradient without its order", "rms_norm.cu", "sum = fmaf(dy[i] * weight[i], x[i], sum)", "sum += dy[i] * weight[i] * x[i]"),
    ("shares of 32 rows", "rms_norm.cu", "SHARE_ROWS = 64", "SHARE_ROWS = 32"),
    ("a derivative of relu", "gated.cu", "2.f * positive}", "positive}"),
    ("no barrier before more of the depth", "gemm.cu", "__syncthreads(); // all have read", "// all have read"),
    ("factors that are not divided", "gemm.cu", "x * (1.f / divisors[d])", "x"),
    ("a sum that replaces what is there", "gemm.cu", "!shape.add && depth0 < CHAIN", "depth0 < CHAIN"),
    ("means of single precision", "ternarize.cu", "double sum = 0.;", "float sum = 0.f;"),
    ("weights rounded up at a half", "ternarize.cu", "half_up ? y >= 1.f : x > 0.5f", "y >= 1.f"),
    ("no barrier before the sum of a chunk", "ternarize.cu", "parts[threadIdx.x] = sum;\n    __syncthreads();", "parts[threadIdx.x] = sum;"),
    ("probabilities of hidden keys", "attention_backward.cu", "if (!inside) scores[row + key] = 0.f;", ""),
    ("no barrier before the mean", "attention_backward.cu", "sum = fmaf(p[i], ds[i], sum);\n        sum = sum_lanes(sum);\n        if (threadIdx.x == 0) sums[1] = sum;\n    }\n    __syncthreads();", "sum = fmaf(p[i], ds[i], sum);\n        sum = sum_lanes(sum);\n        if (threadIdx.x == 0) sums[1] = sum;\n    }"),
    ("no target in the loss's gradient", "loss.cu", "i == target ? value - scale : value", "value"),
    ("a target's logit of another row", "loss.cu", "logits[targets[row]]", "logits[targets[0]]"),
    ("a decay that is not decoupled", "adamw.cu", "parameter[i] * keep - step_size * m / root", "(parameter[i] - step_size * m / root) * keep"),
    ("a first moment of another order", "adamw.cu", "first[i] + one_minus_beta1 * (g - first[i])", "(1.f - one_minus_beta1) * first[i] + one_minus_beta1 * g"),
    ("squares of another order", "adamw.cu", "one_minus_beta2 * g * g", "one_minus_beta2 * (g * g)"),
    ("a root that is not corrected", "adamw.cu", "sqrtf(v) / bias2_root", "sqrtf(v)"),
    ("elements of a norm left out", "adamw.cu", "sums[chunk] = total + rest;", "sums[chunk] = total;"),
    ("a column dropped for its neighbour", "dropout.cu", "dropout_word(key, i)", "dropout_word(key, i + 1)"),
    ("a transform without its last round", "hadamard.cu", "half < size; half *= 2", "2 * half < size; half *= 2"),
    ("no barrier between the rounds", "hadamard.cu", "__syncthreads(); // all values of the round before are there", ""),
    ("no way to integers", "quantize.cu", "lambda == 1.f ? grid : x[i] + lambda * (grid - x[i])", "grid"),
    ("a way to codes by another sum", "ternarize.cu", "latent[i] + lambda * (grid - latent[i])", "(1.f - lambda) * latent[i] + lambda * grid"),
    ("blocks of rows too few", "launch/vocabulary.rs", "(w.rows as usize).div_ceil(block_rows), 1]", "w.rows as usize / block_rows, 1]"),
    ("signs of eight bits left out", "head_layout.rs", "0x8080_8080 } else { 0 }", "0 } else { 0 }"),
    ("a norm that is not applied", "ops/mod.rs", "let quantize = match &norm {", "let quantize = match &norm.filter(|_| false) {"),
    ("keys from the first one on", "ops/gradients.rs", "row * strides.row + begin * strides.position", "row * strides.row"),
    ("gradients of the other factor", "ops/latent.rs", "Factor::index_inner(rows, dy.address), codes.factors)", "Factor::index_inner(rows, dy.address), 0)"),
    ("rows of the loss that do not count", "ops/loss.rs", "(row_ids.address, count)", "(target_ids.address, count)"),
    ("an update of too few", "launch/optimizer.rs", "count.div_ceil(ADAMW_ELEMENTS)", "(count / ADAMW_ELEMENTS)"),
    ("a pair that does not see what is dropped", "ops/low_rank.rs", "let factors = (by_rows(k, seen), by_rows(k, &a));", "let factors = (by_rows(k, &x_memory), by_rows(k, &a));"),
    ("a gradient through what was dropped", "ops/low_rank.rs", "let dx = match dropout {", "let dx = match dropout.as_ref().filter(|_| false) {"),
    ("half the grid of a product", "launch/mod.rs", "tokens.div_ceil(GEMV_TOKENS), 1]", "tokens / GEMV_TOKENS, 1]"),
    ("no last block of tokens", "launch/mod.rs", "tokens.div_ceil(block_tokens), 1];\n                Self", "tokens / block_tokens, 1];\n                Self"),
    ("a stride of a dense row", "launch/mod.rs", "vec![Arg::U64(x.address), Arg::U64(x.stride as u64), Arg::U32(dim(x.width))]", "vec![Arg::U64(x.address), Arg::U64(x.width as u64), Arg::U32(dim(x.width))]"),
    ("arguments exchanged", "launch/mod.rs", "Arg::U64(cos),\n            Arg::U64(sin)", "Arg::U64(sin),\n            Arg::U64(cos)"),
    ("half a block of threads", "launch/mod.rs", "const ROW_THREADS: u32 = 256", "const ROW_THREADS: u32 = 128"),
    ("room for codes that are not padded", "ops/mod.rs", "rows * padded(width)", "rows * width"),
    ("room for one partial result", "ops/mod.rs", "uninitialized::<f32>(device, 2 * count)", "uninitialized::<f32>(device, count)"),
    ("a view from the beginning of its buffer", "device.rs", "as_cuda_slice()?, layout.start_offset())", "as_cuda_slice()?, 0)"),
    ("the first matrix of a stack for any", "ops/mod.rs", "words.address + word as u64", "words.address"),
    ("a gradient that is not added", "ops/mod.rs", "rows, index > 0, bf16", "rows, false, bf16"),
]


def changed(folder, file, before, after):
    """Puts the bug into a copy of the sources."""
    path = folder / file
    text = path.read_text()
    if text.count(before) != 1:
        sys.exit(f"{file}: {text.count(before)} times, not once: {before!r}")
    path.write_text(text.replace(before, after))


def includers(folder, file):
    """The kernels' files that a header is part of, or the file itself."""
    if file.endswith(".cu"):
        return [file]
    found = {file}
    while True:
        texts = {path.name: path.read_text() for path in folder.glob("*.cu*")}
        more = {name for name, text in texts.items() if any(f'"{header}"' in text for header in found)}
        if more <= found:
            return sorted(name for name in found if name.endswith(".cu"))
        found |= more


def prepared(tree):
    """The test programs of a tree, and the variables that they need."""
    command = [tree / "scripts/cuda_interpret.sh", "--prepare"]
    environment = {"CARGO_TARGET_DIR": str(ROOT / "target"), **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return None
    lines = done.stdout.split()
    variables = [line for line in lines if "=" in line]
    return [line for line in lines if line not in variables], dict(variable.split("=", 1) for variable in variables)


def reason(programs, variables, tests=()):
    """What some tests of the programs say, or nothing if they are satisfied."""
    for program, run in product(programs, [{}, {"BITNET_CUDA_CAPABILITY": "75"}]):
        try:
            done = subprocess.run(
                [program, "--test-threads", "2", *tests], env={**os.environ, **variables, **run}, timeout=SECONDS,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT / "bitnet-model",
            )
        except subprocess.TimeoutExpired:
            return "does not end"
        if done.returncode:
            stand_in = re.search(r"libcuda stand-in: (.*)", done.stdout)
            failed = ", ".join(sorted(set(re.findall(r"^test ([\w:]+) \.\.\. FAILED", done.stdout, re.MULTILINE))))
            return stand_in.group(1) if stand_in else failed or f"exit {done.returncode}"
    return None


def kernel_bug(programs, variables, file, before, after):
    with tempfile.TemporaryDirectory() as scratch:
        sources, ptx = Path(scratch, "cuda"), Path(scratch, "ptx")
        shutil.copytree(ROOT / CUDA, sources)
        shutil.copytree(variables["BITNET_CUDA_PTX"], ptx)
        changed(sources, file, before, after)
        for source in includers(sources, file):
            for capability in ["75", "80"]:
                name = ptx / f"{source.removesuffix('.cu')}.{capability}.ptx"
                flags = ["-ptx", "-std=c++17", "-O3", "-fmad=false", "-w", f"-arch=compute_{capability}"]
                if subprocess.run([NVCC, *flags, "-o", name, sources / source]).returncode:
                    return "does not compile"
        return reason(programs, {**variables, "BITNET_CUDA_PTX": str(ptx)}, TESTS.get(file, []))


def rust_bug(file, before, after):
    tree = Path(tempfile.gettempdir(), "bitnet-mutation")  # always the same: what is compiled is compiled once
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    changed(tree / CUDA, file, before, after)
    programs = prepared(tree)
    return reason(*programs) if programs else "does not compile"


def main():
    words = sys.argv[1:]
    bugs = [bug for bug in BUGS if not words or any(word in bug[0] or word in bug[1] for word in words)]
    programs = prepared(ROOT)
    if not programs or reason(*programs):
        sys.exit("the tests fail without a bug")
    missed = 0
    print("| bug | file | found by |\n| --- | --- | --- |")
    for name, file, before, after in bugs:
        found = rust_bug(file, before, after) if file.endswith(".rs") else kernel_bug(*programs, file, before, after)
        missed += found is None
        print(f"| {name} | `{file}` | {found or '**nothing**'} |", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} found", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
