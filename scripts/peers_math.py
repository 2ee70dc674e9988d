#!/usr/bin/env python3
"""Compare the judgement of mathematical answers with sympy's and math-verify's, as lm-evaluation-harness uses both.

    scripts/peers_math.py --data FILE [--program target/release/examples/same_answer]

FILE is that of MATH-500. Each of its answers, in normal form, is compared with others in which it is written, with answers that are
wrong in one place, and with another question's. Printed are how often `is_equiv` of the harness (equal text, or sympy) and `verify` of
math-verify say the same as the program here, and every pair that only the program takes for equal, for somebody to look at.

Needs lm_eval (pip install 'lm_eval[math]==0.4.13') and the program: cargo build --release -p bitnet-train --example same_answer
"""

import argparse
import json
import logging
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

logging.disable(logging.CRITICAL)

from lm_eval.tasks.minerva_math import utils
from math_verify import parse, verify

ROOT = Path(__file__).resolve().parent.parent


def answers(path):
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    return [utils.normalize_final_answer(utils.remove_boxed(utils.last_boxed_only_string(row["solution"]))) for row in rows]


def rewritten(answer):
    """The answer in other words: some of these mean the same, some do not, and some mean nothing."""
    yield answer
    yield re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", lambda m: str(int(m[1]) / int(m[2])), answer)
    yield re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", answer)
    yield re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", lambda m: f"\\frac{{{3 * int(m[1])}}}{{{3 * int(m[2])}}}", answer)
    yield re.sub(r"\\sqrt\{(\d+)\}", r"\1^{\\frac{1}{2}}", answer)
    yield re.sub(r"\\sqrt\{(\d+)\}", lambda m: f"\\frac{{\\sqrt{{{4 * int(m[1])}}}}}{{2}}", answer)
    yield re.sub(r"(?<![\d.{^_])(\d+)(?![\d.}])", r"\1.0", answer)
    yield re.sub(r"(?<![\d.])(\d+)(?![\d.])", lambda m: str(int(m[1]) + 1), answer, count=1)
    yield re.sub(r"(?<![\d.])(\d+)(?![\d.])", lambda m: str(int(m[1]) * 10), answer, count=1)
    yield answer[1:] if answer.startswith("-") else "-" + answer
    yield answer.replace("+", "-") if "+" in answer else answer + "+0"
    yield answer.replace("[", "(") if "[" in answer else answer.replace("(", "[", 1)
    yield ",".join(reversed(answer.split(",")))
    if "+" in answer and not re.search(r"[({\[]", answer):
        yield "+".join(reversed(answer.split("+")))
    yield answer.replace("\\left", "").replace("\\right", "")


def pairs(all_answers):
    random.seed(0)
    for answer in all_answers:
        others = [*rewritten(answer), random.choice(all_answers)]
        yield from ((other, answer) for other in dict.fromkeys(others) if other)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="math500_test.json, or minerva_math500.jsonl")
    parser.add_argument("--program", default=str(ROOT / "target/release/examples/same_answer"))
    parser.add_argument("--all", action="store_true", help="print every pair that is judged in different ways")
    args = parser.parse_args()
    tried = list(pairs(answers(args.data)))
    lines = "".join(json.dumps(pair) + "\n" for pair in tried)
    result = subprocess.run([args.program], input=lines, capture_output=True, text=True, check=True)
    ours = [json.loads(line) for line in result.stdout.splitlines()]
    counts, alone = {"is_equiv": Counter(), "math_verify": Counter()}, []
    for (found, target), (value, answer) in zip(tried, ours, strict=True):
        value = value or found == target  # as the harness and the program here do before they look at formulas
        theirs = bool(utils.is_equiv(found, target))
        verified = bool(verify(parse(f"${target}$"), parse(f"${found}$")))
        counts["is_equiv"][value, theirs] += 1
        counts["math_verify"][answer, verified] += 1
        if args.all and (value != theirs or answer != verified):
            print(f"{found}  |  {target}: here {value} {answer}, there {theirs} {verified}")
        if (value or answer) and not (theirs or verified):
            alone.append(f"{found} = {target}")
    for name, count in counts.items():
        same = count[True, True] + count[False, False]
        print(f"{name}: {same} of {len(tried)} pairs judged alike ({100 * same / len(tried):.2f} %); both equal {count[True, True]}, "
              f"only here {count[True, False]}, only there {count[False, True]}")
    print("\n".join(["equal here alone:", *alone]) if alone else "nothing is equal here alone")


if __name__ == "__main__":
    main()
