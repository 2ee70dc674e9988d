#!/usr/bin/env python3
"""Reads a run's event file with TensorBoard's own reader and compares it with the run's metrics.jsonl.

    python3 -m venv /tmp/tb && /tmp/tb/bin/pip install tensorboard
    /tmp/tb/bin/python scripts/tensorboard_check.py runs/NAME

Every update, evaluation and census must be there once, in order, with the metrics' value as f32. Run it on a run that was killed
and resumed, too.
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train": {"train/loss": "loss", "train/lr": "lr", "train/grad_norm": "grad_norm", "speed/tokens_per_second": "tokens_per_second"},
    "evaluation": {"evaluation/nats_per_byte": "nats_per_byte", "evaluation/nats_per_token": "nats_per_token"},
}


def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def main():
    run = pathlib.Path(sys.argv[1])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    tags = events.Tags()["scalars"]
    for kind, names in TAGS.items():
        for tag, key in names.items():
            expected = [(record["step"], f32(record[key])) for record in records if record["kind"] == kind]
            found = [(event.step, event.value) for event in events.Scalars(tag)] if tag in tags else []
            if found != expected:
                sys.exit(f"{tag}: {len(found)} points, the metrics have {len(expected)}, or their values differ")
    layers = [(record["step"], name, layer) for record in records if record["kind"] == "codes" for name, layer in record["layers"].items()]
    for name in {name for _, name, _ in layers}:
        expected = [(step, f32(layer["zero"])) for step, other, layer in layers if other == name]
        if [(event.step, event.value) for event in events.Scalars(f"codes/{name}/zero")] != expected:
            sys.exit(f"codes/{name}/zero differs from the metrics")
    times = [event.wall_time for event in events.Scalars("train/loss")]
    if times != sorted(times):
        sys.exit("wall times go backwards")
    print(f"{run}: {len(tags)} tags, {len(times)} updates, all as in metrics.jsonl")


if __name__ == "__main__":
    main()
