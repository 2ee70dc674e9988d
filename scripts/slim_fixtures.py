#!/usr/bin/env python3
"""Reduce the full reference fixtures to the ones committed under tests/fixtures.

The full set (about 26 MB) is written by the reference stack; tests/fixtures/README.md says which
one and what each file holds.  This script copies files, and tensors inside safetensors files, byte
for byte: it never computes a value.  FIXTURES below is the whole selection.

Standard library only.
"""

import argparse
import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path

SIZE_LIMIT = 8 * 10**6  # bytes; scripts/check.sh enforces the same limit on the committed files
HEADER_LIMIT = 100 * 10**6  # bytes; the safetensors library's own limit

MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")

# Which tensors of expected.safetensors are kept, by prefix.
SINGLE = ("single.input_ids", "single.embed", "single.layer.", "single.norm", "single.logits",
          "single.unit.", "greedy.")
BATCH = ("batch.input_ids", "batch.attention_mask", "batch.position_ids", "batch.labels",
         "batch.logits", "greedy_batch.")
# Other precisions, and a position convention this project does not have.
DROPPED = {"single.logits_bf16", "batch.logits_arange", "logits_adapter_bf16"}
# The input of the feed-forward layer is that of gate_proj, its output that of down_proj: tests take those.
DROPPED |= {f"single.unit.model.layers.0.mlp.{end}" for end in ("input", "output")}
GRAD = ("input_ids", "attention_mask", "labels", "logits", "grad.")
ADAMW = ("adamw1.",)
LORA = ("input_ids", "attention_mask", "labels", "logits_base", "logits_adapter")
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")

# Fixture -> (prefixes kept of expected.safetensors, further files kept).
FIXTURES = {
    "bitnet_packed_tied": (SINGLE + BATCH, ()),
    "bitnet_packed_untied": (SINGLE, ()),
    "bitnet_online_tied": (SINGLE, ()),
    "legacy_1bitllm": (SINGLE, ()),
    "llama_packed_headdim": (SINGLE, ()),
    "llama_packed_rmsnorm": (SINGLE, ("source/latent.safetensors",)),
    "llama_packed_tied_sharded": (SINGLE, ()),
    "onebitllms_converted": (
        SINGLE,
        ("source/config.json", "source/generation_config.json", "source/model.safetensors"),
    ),
    "grad_bitnet_qat": (GRAD + ADAMW, ()),
    "grad_llama_onebit_qat": (GRAD, ()),
    "lora_bitnet_offline": (LORA + ("grad.",), ("source/latent.safetensors",) + ADAPTER),
}


def read_safetensors(path):
    """The header without padding, and where the data starts."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            sys.exit(f"{path}: not a safetensors file: shorter than its length field")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_LIMIT:
            sys.exit(f"{path}: not a safetensors file: header of {length} bytes")
        return json.loads(file.read(length)), 8 + length


def copy_tensors(source, target, prefixes):
    """Write the tensors whose names start with one of `prefixes`, in their order in `source`."""
    header, data = read_safetensors(source)
    kept = [(name, entry) for name, entry in header.items()
            if name != "__metadata__" and name.startswith(prefixes) and name not in DROPPED]
    kept.sort(key=lambda item: item[1]["data_offsets"])
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in kept):
            sys.exit(f"{source}: no tensor starts with {prefix!r}")

    out, spans, end = {}, [], 0
    if "__metadata__" in header:
        out["__metadata__"] = header["__metadata__"]
    for name, entry in kept:
        first, last = entry["data_offsets"]
        spans.append((first, last))
        out[name] = {**entry, "data_offsets": [end, end + last - first]}
        end += last - first
    encoded = json.dumps(out, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts on a multiple of 8

    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        for first, last in spans:
            reader.seek(data + first)
            writer.write(reader.read(last - first))


def slim(source, target, prefixes, extra):
    """Copy one fixture."""
    target.mkdir()
    files = {path for pattern in MODEL for path in source.glob(pattern)}
    files = {path for path in files if not path.name.startswith("expected")}
    if prefixes:
        copy_tensors(source / "expected.safetensors", target / "expected.safetensors", prefixes)
        files.add(source / "expected.json")
    for path in sorted(files | {source / name for name in extra}):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        if path.name == "expected.json":
            values = json.loads(path.read_text())
            copy.write_text(json.dumps(values, separators=(",", ":")) + "\n")
        else:
            shutil.copyfile(path, copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the full fixtures")
    parser.add_argument("target", type=Path, nargs="?",
                        default=Path(__file__).resolve().parent.parent / "tests" / "fixtures",
                        help="folder to write to (default: tests/fixtures)")
    args = parser.parse_args()
    if missing := [name for name in FIXTURES if not (args.source / name).is_dir()]:
        sys.exit(f"{args.source}: no fixture named {', '.join(missing)}")

    args.target.mkdir(parents=True, exist_ok=True)
    total = 0
    with tempfile.TemporaryDirectory(dir=args.target, prefix=".slim-") as scratch:
        for name, (prefixes, extra) in FIXTURES.items():
            made = Path(scratch) / name
            slim(args.source / name, made, prefixes, extra)
            size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            print(f"{size:>9}  {name}")
            total += size
        print(f"{total:>9}  in all")
        if total > SIZE_LIMIT:
            sys.exit(f"more than {SIZE_LIMIT} bytes: keep less")
        for name in FIXTURES:
            if (args.target / name).exists():
                shutil.rmtree(args.target / name)
            (Path(scratch) / name).rename(args.target / name)


if __name__ == "__main__":
    main()
