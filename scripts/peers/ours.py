"""This project's side of the comparison: `bitnet bench`, and `bitnet logits` for the time to the first token."""

import json
import subprocess

from .measure import FIRST_PROMPT, token_ids


def version(binary):
    return subprocess.run([binary, "--version"], check=True, capture_output=True, text=True).stdout.strip()


def bench_command(binary, model, job):
    """Prints JSON: `results` of `test`, `threads`, `batch`, `samples`, and `peak_rss_bytes`."""
    command = [binary, "bench", "-m", model, "--threads", job["threads"], "--repetitions", job["repeats"], "--json",
               "--n-prompt", ",".join(map(str, job["prompts"])) or 0, "--n-gen", job["generate"]]
    if job["generate"] and job["depth"]:
        command += ["--depth", f"0,{job['depth']}"]
    return [str(part) for part in command]


def bench_result(output):
    """The samples of each test of one sequence, and the peak of memory."""
    report = json.loads(output)
    tests = {row["test"]: row["samples"] for row in report["results"] if row.get("batch", 1) == 1}
    return {"tests": tests, "peak_rss_bytes": report.get("peak_rss_bytes")}


def start_command(binary, model, threads, scratch):
    """The whole life of a process that loads a checkpoint and answers a prompt."""
    tokens = ",".join(map(str, token_ids(FIRST_PROMPT)))
    return [str(binary), "logits", "-m", str(model), "--threads", str(threads), "--quiet",
            "--tokens", tokens, "-o", str(scratch / "logits.safetensors")]
