#!/usr/bin/env python3
"""Measure the engines that install from PyPI beside `bitnet`, on one synthetic model of the 2B-4T geometry.

    scripts/bench_peers.py --install         # once: the peers, in an environment of their own
    scripts/bench_peers.py --quick           # a few minutes: one round, one prompt length, no deep context
    scripts/bench_peers.py --json out.json --markdown out.md

Every engine runs in a process of its own, one at a time, in the order A B B A.  Before anything is
timed, each peer's logits are checked: finite, changing with the tokens and their order, and the same
whether a prompt is read in one call or in short ones.  A peer that fails is reported with the reason;
one that is right only for short calls is measured in these, and marked.

Engines: bitnet, llama.cpp-tq2_0, llama.cpp-tq1_0, transformers (packed checkpoint, bf16), litespark, and on
request transformers-bf16 (quantized at run time).  They do the same matrix products on the same random
weights; llama.cpp's graph has SiLU where the model has relu², and the heads differ as the table says.

`ppN` is the prefill of N tokens, `tgN` the decoding of N, `tgN@D` the same after D tokens, in tokens/s.
`first token`: loading and a prompt of 16 tokens with a warm file cache, without the start of Python for
the peers, with the start of the process for bitnet.  `RSS short`: peak resident memory, file pages and
for the peers Python included, after 128 tokens (bitnet: after 16); `RSS peak`: after all tests.

Standard library only; Linux.  The models take 1.6 GB under the cache folder, 7.5 GB with litespark or
transformers-bf16, and torch 5 GB.  llama-cpp-python is compiled, for ten minutes and more.
"""

import argparse
import datetime
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from peers import environment, machine, ours, processes, report
from peers.environment import PEERS

OURS = report.OURS
ROOT = Path(__file__).resolve().parent.parent
QUICK = {"prompts": [128], "generate": 16, "depth": 0, "rounds": 1, "repeats": 1}
FULL = {"prompts": [128, 512], "generate": 64, "depth": 2048, "rounds": 2, "repeats": 2}
MOST_TOKENS = 4096  # the model's context


@dataclass
class Plan:
    """What is measured, how often, and where the programs and files are."""

    engines: list
    threads: list
    prompts: list
    generate: int
    depth: int
    rounds: int
    repeats: int
    bitnet: Path
    model: str
    venv: Path
    cache: Path
    limit: int
    checkpoint: Path | None = None

    def tests(self):
        names = [f"pp{length}" for length in self.prompts]
        if self.generate:
            names += [f"tg{self.generate}"] + ([f"tg{self.generate}@{self.depth}"] if self.depth else [])
        return names

    def job(self, threads, **more):
        return {"threads": threads, "prompts": self.prompts, "generate": self.generate, "depth": self.depth,
                "repeats": self.repeats, **more}


def say(text):
    print(text, file=sys.stderr, flush=True)


def numbers(text):
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a list of numbers") from None
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError("numbers here are at least 1")
    return list(dict.fromkeys(values))


def engine_names(text):
    names = [name for name in text.split(",") if name]
    for name in names:
        if name != OURS and name not in PEERS:
            raise argparse.ArgumentTypeError(f"no engine `{name}`; there are {', '.join([OURS, *PEERS])}")
    return list(dict.fromkeys(names))


def parse_args():
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=engine_names, metavar="A,B",
                        default=[OURS, *(name for name, peer in PEERS.items() if peer.default)],
                        help="what to measure; all but transformers-bf16 by default")
    parser.add_argument("--quick", action="store_true",
                        help="one round, all cores only, 128 tokens of prompt, 16 decoded, no deep context")
    parser.add_argument("--threads", type=numbers, metavar="N,M", help=f"default 1,{cores}; --quick: {cores}")
    parser.add_argument("--prompts", type=numbers, metavar="N,M", help="prompt lengths; default 128,512")
    parser.add_argument("--generate", type=int, metavar="N", help="tokens a decoding run; default 64")
    parser.add_argument("--depth", type=int, metavar="N", help="context of a second decoding run; default 2048, 0: none")
    parser.add_argument("--rounds", type=int, metavar="N", help="processes for each engine and thread count; default 2")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples a test in each process; default 2")
    parser.add_argument("--timeout", type=int, default=3600, metavar="S", help="limit of one process; default 3600")
    parser.add_argument("--bitnet", type=Path, default=ROOT / "target/release/bitnet", metavar="FILE")
    parser.add_argument("--model", default="synthetic:2b-4t", help="what `bitnet bench -m` gets")
    parser.add_argument("--cache", type=Path, default=environment.cache_folder(), metavar="DIR",
                        help="models and, if --venv is not given, the environment")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="environment of the peers; default CACHE/venv")
    parser.add_argument("--install", action="store_true", help="install the peers of --engines, then stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample, load and version")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in (("generate", 0), ("depth", 0), ("rounds", 1), ("repeats", 1), ("timeout", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if max([*args.prompts, args.depth]) + args.generate + 64 > MOST_TOKENS:
        parser.error(f"prompts and depth with what is generated must stay below {MOST_TOKENS - 64} tokens")
    args.threads = args.threads or list(dict.fromkeys([cores] if args.quick else [1, cores]))
    args.venv = args.venv or args.cache / "venv"
    return args


def reason_against(plan, engine, versions):
    """Why an engine cannot be measured here, or None."""
    if engine == OURS:
        return None if plan.bitnet.exists() else f"not built: {plan.bitnet} is missing (cargo build --release)"
    lacking = environment.missing(engine, versions)
    return f"not installed: {', '.join(lacking)} (scripts/bench_peers.py --install)" if lacking else None


def check(plan, engine, path):
    """(problem or None, pieces by prompt length, notes by test) of a peer."""
    say(f"check    {engine}")
    job = plan.job(max(plan.threads), task="check", engine=PEERS[engine].engine, model=str(path))
    outcome, result = processes.run_peer(environment.python(plan.venv), job, plan.limit)
    if outcome.error:
        return f"failed: {outcome.error}", {}, {}
    if result["problems"]:
        return f"failed: {'; '.join(result['problems'])}", {}, {}
    notes = {}
    for length, piece in result["pieces"].items():
        if piece < int(length):
            alike = result["cosines"][f"{length} in calls of {length}"]
            notes[f"pp{length}"] = (f"in calls of {piece} tokens; one call of {length} gives wrong logits "
                                    f"(cosine {alike:.3f} with the right ones)")
    return None, result["pieces"], notes


def prepare(plan, versions):
    """engine -> {head, problem}, the job of every peer that can run, and the notes."""
    engines, jobs, notes = {}, {}, {}
    for engine in plan.engines:
        head = "" if engine == OURS else PEERS[engine].head
        problem = reason_against(plan, engine, versions)
        if engine != OURS and not problem:
            path = environment.make_model(plan.venv, PEERS[engine].kind, plan.cache)
            problem, pieces, marks = check(plan, engine, path)
            jobs[engine] = {"task": "measure", "engine": PEERS[engine].engine, "model": str(path), "pieces": pieces}
            if marks:
                notes[engine] = marks
        if problem:
            say(f"         {engine}: {problem}")
        engines[engine] = {"head": head, "problem": problem}
    return engines, jobs, notes


def measure(plan, engines, jobs):
    """Every run, in the order A B B A."""
    able = [engine for engine, about in engines.items() if not about["problem"]]
    runs = []
    for number, threads in itertools.product(range(1, plan.rounds + 1), plan.threads):
        for engine in able if number % 2 else reversed(able):
            say(f"round {number}  {engine}, {threads} threads")
            if engine == OURS:
                outcome, result = processes.run_ours(plan, plan.job(threads), plan.limit)
            else:
                job = plan.job(threads, **jobs[engine])
                outcome, result = processes.run_peer(environment.python(plan.venv), job, plan.limit)
            say(f"         {outcome.error or f'{outcome.seconds:.0f} s'}, load {outcome.load['before']} before, "
                f"{outcome.load['others']} cores used by others")
            runs.append({"engine": engine, "threads": threads, "round": number, "error": outcome.error,
                         "seconds": outcome.seconds, "load": outcome.load, "busy": outcome.busy, "result": result})
    return runs


def main():
    args = parse_args()
    peers = [engine for engine in args.engines if engine != OURS]
    if args.install:
        args.cache.mkdir(parents=True, exist_ok=True)
        environment.install(args.venv, peers)
        return
    plan = Plan(args.engines, args.threads, args.prompts, args.generate, args.depth, args.rounds, args.repeats,
                args.bitnet, args.model, args.venv, args.cache, args.timeout)
    versions = environment.installed(plan.venv)
    engines, jobs, notes = prepare(plan, versions)
    used = {name for engine in jobs for name in (*environment.TOOLS, *PEERS[engine].packages)}
    versions = {name: version for name, version in versions.items() if name in used}
    if OURS in engines and not engines[OURS]["problem"]:
        versions = {OURS: ours.version(plan.bitnet), **versions}
        packed = environment.models.model_path(plan.cache, "packed")
        plan.checkpoint = packed if packed.exists() else None
    runs = measure(plan, engines, jobs)
    marks = {(engine, test): note for engine, tests in notes.items() for test, note in tests.items()}
    document = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine.description(), "versions": versions, "model": plan.model,
        "threads": plan.threads, "rounds": plan.rounds, "repeats": plan.repeats, "tests": plan.tests(),
        "engines": engines, "notes": notes, "results": report.results(runs, marks), "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(report.text(document, as_markdown=True) + "\n")
    print(report.text(document))
    sys.exit(any(run["error"] for run in runs) or any(
        (about["problem"] or "").startswith("failed") for about in engines.values()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
