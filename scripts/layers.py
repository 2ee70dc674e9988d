#!/usr/bin/env python3
"""Check the direction of dependencies: between the crates, and between the modules of bitnet-model.

MAY_USE lists what each module of bitnet-model may name besides itself.  A new module gets a line
here, so that where it stands is decided and not found out.  Comments and `#[cfg(test)]` code at the
end of a file are not looked at.  Standard library only.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAY_USE = {
    "error": set(),
    "fingerprint": set(),
    "kernels": set(),
    "isolated": set(),
    "storage": set(),
    "pages": set(),
    "metal": set(),
    "calibration": {"kernels", "pages", "threads"},
    "threads": set(),
    "quant": {"cuda", "error", "storage", "threads"},
    "rows": {"cuda", "kernels", "storage", "threads"},
    "head_weights": {"cuda", "kernels", "pages", "rows", "threads"},
    "packed": {"kernels"},
    "activations": {"fingerprint", "kernels", "quant", "threads"},
    "weights": {"activations", "cuda", "error", "kernels", "packed", "pages", "quant", "threads"},
    "checkpoint": {"error", "config", "kernels", "packed", "quant", "rows", "storage", "weights"},
    "cuda": {"config", "head_weights", "kernels", "quant", "rows", "storage", "threads", "weights"},
    "config": {"error", "checkpoint", "quant"},
    "ops": {"activations", "error", "config", "cuda", "head_weights", "kernels", "quant", "rows", "storage", "threads", "weights"},
    "adapter": {"error", "checkpoint", "config", "kernels", "ops", "quant", "storage", "weights"},
    "nn": {"activations", "error", "adapter", "config", "head_weights", "kernels", "kv_cache", "ops", "packed", "pages", "quant", "rows", "storage",
           "threads", "weights"},
    "kv_cache": {"adapter", "config", "ops", "pages"},
    "model": {"error", "adapter", "config", "kv_cache", "nn", "ops"},
    "sampler": {"error", "config", "nn"},
    "session": {"error", "kv_cache", "model", "nn", "ops", "sampler", "speculative"},
    "batch": {"error", "adapter", "grammar", "kv_cache", "model", "nn", "ops", "sampler", "score", "session"},
    "speculative": set(),
    "score": {"error", "model", "storage"},
    "perplexity": {"error", "model", "ops", "score"},
    "choices": {"error", "kv_cache", "model", "ops", "score", "storage"},
    "synthetic": {"error", "config", "checkpoint"},
    "hub": {"error"},
    "text": {"error", "isolated"},
    "grammar": {"error", "isolated", "text"},
    "pretrained": {"calibration", "error", "checkpoint", "config", "head_weights", "hub", "kv_cache", "model", "nn", "kernels", "ops",
                   "pages", "quant", "rows", "sampler", "score", "session", "synthetic", "text", "weights"},
}

# Folder -> words that must not occur in its code.
MUST_NOT_NAME = {
    "bitnet-model/src": r"\bbitnet_(train|cli)\b",
    "bitnet-train/src": r"\bbitnet_cli\b",
    "bitnet-model/src/kernels": r"\bcandle\w*|\brayon\b|\bstd::(thread|sync::mpsc)\b",
}


def code(path):
    """The file without comments and without its tests."""
    return re.sub(r"//[^\n]*", "", path.read_text()).split("#[cfg(test)]\nmod ")[0]


def sources(folder):
    return (path for path in sorted((ROOT / folder).rglob("*.rs")) if path.stem != "tests")


def used_modules(text):
    """Modules named as `crate::module`, or first in an item of a `crate::{…}` group."""
    yield from re.findall(r"\bcrate::(\w+)", text)
    for group in re.finditer(r"\bcrate::\{", text):
        depth, end = 1, group.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        items, outer = "", text[group.end():end - 1]
        while items != outer:  # strip the inner groups, innermost first
            items, outer = outer, re.sub(r"\{[^{}]*\}", "", outer)
        yield from (item.strip().split("::")[0] for item in items.split(","))


def main():
    problems = []
    model = ROOT / "bitnet-model" / "src"
    for path in sources("bitnet-model/src"):
        module = path.relative_to(model).parts[0].removesuffix(".rs")
        if module == "lib":
            continue
        if module not in MAY_USE:
            problems.append(f"{module}: not in the table of scripts/layers.py")
            continue
        for used in sorted(set(used_modules(code(path))) & MAY_USE.keys() - {module} - MAY_USE[module]):
            problems.append(f"{path.relative_to(ROOT)}: {module} must not use {used}")
    for folder, pattern in MUST_NOT_NAME.items():
        for path in sources(folder):
            for match in re.finditer(pattern, code(path)):
                problems.append(f"{path.relative_to(ROOT)}: must not name {match[0]}")
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
