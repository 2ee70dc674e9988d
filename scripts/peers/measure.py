#!/usr/bin/env python3
"""Check or measure one engine in this process, as `bench_peers.py` asks.

    measure.py JOB RESULT

JOB is a JSON file: `task` (check | measure), `engine` (a key of engines.ENGINES), `model` (a path),
`threads`, `prompts` (lengths), `generate` (tokens a decoding run, or 0), `depth` (context of a second
decoding run, or 0), `repeats`, and for `measure` the `pieces` that `check` found.  RESULT is
written as JSON.
"""

import importlib
import json
import random
import sys
import time
from pathlib import Path

FIRST_PROMPT = 16  # tokens until the first answer
SMALL_CONTEXT = 128  # tokens within which the memory of a short conversation is measured
REFERENCE_PIECE = 16  # tokens a call of the prompt that others are compared with
MOST_PIECE = 512  # tokens a call when a deep context is filled
ENOUGH = 0.9  # cosine of two logits of one prompt; rounding alone leaves more than 0.99


def token_ids(count):
    """Tokens below every special one, the same for every engine."""
    rng = random.Random(0)
    return [rng.randrange(1000, 100_000) for _ in range(count)]


def memory(field):
    """A field of /proc/self/status in bytes: VmHWM counts resident file pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def fill(engine, tokens, piece):
    """All tokens in calls of `piece`; a copy of the last logits."""
    for start in range(0, len(tokens), piece):
        logits = engine.prefill(tokens[start:start + piece])
    return logits.copy()


def cosine(a, b):
    """Of two logits without their means; 0 if one is constant or not finite."""
    import numpy as np

    a, b = a.astype("f8") - a.mean(), b.astype("f8") - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 0 and np.isfinite(scale) else 0.0


def check(engine, job):
    """What is wrong with the logits (nothing: an empty list), and the longest correct call for each prompt length."""
    import numpy as np

    tokens = token_ids(max([*job["prompts"], FIRST_PROMPT]) + 1)
    problems, pieces, cosines = [], {}, {}
    engine.start(len(tokens) + 64)

    short = tokens[:FIRST_PROMPT]
    first = fill(engine, short, REFERENCE_PIECE)
    if not np.isfinite(first).all():
        return {"problems": ["the logits of a short prompt are not finite"]}
    if first.std() == 0:
        return {"problems": ["the logits of a short prompt are all equal"]}
    following = engine.decode(tokens[FIRST_PROMPT]).copy()
    engine.truncate(0)
    swapped = fill(engine, [short[1], short[0], *short[2:]], REFERENCE_PIECE)
    for what, other in (("with the next token", following), ("when two tokens change places", swapped)):
        if np.abs(other - first).max() < 1e-3 * first.std() or not np.isfinite(other).all():
            problems.append(f"the logits do not change {what}")

    for length in job["prompts"]:
        engine.truncate(0)
        expected = fill(engine, tokens[:length], REFERENCE_PIECE)
        for piece in dict.fromkeys((length, 64, 32, REFERENCE_PIECE)):
            engine.truncate(0)
            alike = cosine(fill(engine, tokens[:length], piece), expected)
            cosines[f"{length} in calls of {piece}"] = alike
            if alike >= ENOUGH:
                pieces[str(length)] = piece
                break
        else:
            problems.append(f"a prompt of {length} tokens gives other logits when it is read again")
    return {"problems": problems, "pieces": pieces, "cosines": cosines}


def timed(work, tokens):
    """Tokens a second of `work()`."""
    began = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - began)


def measure(engine, job, result):
    pieces = {int(length): piece for length, piece in job["pieces"].items()}
    tokens = token_ids(max([*pieces, job["generate"] + 1]))
    following = tokens[:job["generate"]]
    tests = result["tests"] = {}

    engine.start(max([*pieces, job["depth"]]) + job["generate"] + 64)
    for length, piece in pieces.items():
        def prompt():
            engine.truncate(0)
            fill(engine, tokens[:length], piece)

        if "torch" in sys.modules:
            prompt()  # compiles for this shape
        tests[f"pp{length}"] = [timed(prompt, length) for _ in range(job["repeats"])]

    def generate(depth):
        engine.truncate(depth)
        for token in following[:2]:  # compiles and faults what is new
            engine.decode(token)
        samples = []
        for _ in range(job["repeats"]):
            engine.truncate(depth)
            samples.append(timed(lambda: [engine.decode(token) for token in following], len(following)))
        return samples

    if following:
        tests[f"tg{len(following)}"] = generate(0)
    if following and job["depth"]:
        engine.truncate(0)
        fill(engine, token_ids(job["depth"]), min(max(pieces.values(), default=REFERENCE_PIECE), MOST_PIECE))
        tests[f"tg{len(following)}@{job['depth']}"] = generate(job["depth"])


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    from engines import ENGINES

    kind = ENGINES[job["engine"]]
    for module in kind.MODULES:
        importlib.import_module(module)
    result = {"imports_rss_bytes": memory("VmHWM")}
    began = time.perf_counter()
    engine = kind(job["model"], job["threads"])
    result["load_seconds"] = time.perf_counter() - began
    if job["task"] == "check":
        result |= check(engine, job)
    else:
        tokens = token_ids(SMALL_CONTEXT)
        engine.start(2 * SMALL_CONTEXT)
        engine.prefill(tokens[:FIRST_PROMPT])
        result["first_token_seconds"] = time.perf_counter() - began
        fill(engine, tokens[FIRST_PROMPT:-FIRST_PROMPT], REFERENCE_PIECE)
        for token in tokens[-FIRST_PROMPT:]:
            engine.decode(token)
        result["short_rss_bytes"] = memory("VmHWM")
        measure(engine, job, result)
        result["peak_rss_bytes"] = memory("VmHWM")
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
