"""One measurement, one process: started alone, watched, and its outcome as data."""

import json
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import environment, ours
from .machine import Watch

MEASURE = Path(__file__).with_name("measure.py")
ERROR_LINES = 3


@dataclass
class Outcome:
    """How a process ended: `error` is None where it ended well."""

    error: str | None
    output: str
    seconds: float
    peak_rss_bytes: int
    load: dict
    busy: bool


def variables(threads):
    """Every library's own name for the number of threads, and no network."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count, "RAYON_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(environment.cache_folder() / "inductor"),
    }


def run(command, threads, limit):
    """Runs a command for at most `limit` seconds."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        watch, began = Watch(), time.monotonic()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=variables(threads))
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            raise
        finally:
            timer.cancel()
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        load = watch.stop(usage.ru_utime + usage.ru_stime)
        stdout.seek(0)
        stderr.seek(0)
        output, complaint = stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")
    error = None
    if process.returncode < 0 and seconds >= limit:
        error = f"stopped after {limit} s"
    elif process.returncode:
        lines = [line.strip() for line in complaint.splitlines() if line.strip()]
        error = f"exit {process.returncode}: " + " / ".join(lines[-ERROR_LINES:])
    return Outcome(error, output, round(seconds, 2), 1024 * usage.ru_maxrss, asdict(load), load.busy)


def run_peer(python, job, limit):
    """`measure.py` with a job: its outcome and its result."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "job.json", Path(scratch) / "result.json"
        asked.write_text(json.dumps(job))
        outcome = run([python, MEASURE, asked, answer], job["threads"], limit)
        return outcome, json.loads(answer.read_text()) if outcome.error is None else {}


def run_ours(plan, job, limit):
    """`bitnet bench`, and then the time to the first token from the packed checkpoint where there is one."""
    outcome = run(ours.bench_command(plan.bitnet, plan.model, job), job["threads"], limit)
    if outcome.error:
        return outcome, {}
    try:
        result = ours.bench_result(outcome.output)
    except (ValueError, KeyError, TypeError) as error:
        outcome.error = f"bitnet bench printed something else than its JSON: {error!r}"
        return outcome, {}
    if plan.checkpoint:
        with tempfile.TemporaryDirectory() as scratch:
            command = ours.start_command(plan.bitnet, plan.checkpoint, job["threads"], Path(scratch))
            start = run(command, job["threads"], limit)
        if start.error:
            outcome.error = start.error
        result |= {"first_token_seconds": start.seconds, "short_rss_bytes": start.peak_rss_bytes}
    return outcome, result
