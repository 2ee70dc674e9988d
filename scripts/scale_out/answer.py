"""Answers lines of requests with `bitnet batch`: what one task of Ray or Spark does, on whichever machine it runs."""

import pathlib
import subprocess
import tempfile


def answer(lines, command, threads):
    """The lines of answers to `lines`, in any order. `command` is the program with its options, such as
    ["bitnet", "batch", "-m", MODEL]; it must be on every machine, and so must what it reads."""
    lines = list(lines)
    if not lines:
        return []
    with tempfile.TemporaryDirectory(prefix="bitnet-") as folder:
        requests, answers = pathlib.Path(folder, "requests.jsonl"), pathlib.Path(folder, "answers.jsonl")
        requests.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        run = subprocess.run(
            [*command, "-i", requests, "-o", answers, "--threads", str(threads), "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {run.stdout[-2000:]}")
        # Not splitlines(): JSON may hold U+2028 and its like as they are.
        return answers.read_text(encoding="utf-8").split("\n")[:-1]
