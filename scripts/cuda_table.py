#!/usr/bin/env python3
"""Compare what ptxas says of the kernels with the table in docs/cuda.md, or write the table.

    scripts/cuda_table.py LOG [--write]

Called by scripts/cuda_check.sh with the output of `ptxas -v`.  Standard library only.
"""

import re
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- table of scripts/cuda_check.sh -->\n", "<!-- end of the table -->\n"
MARGIN = 8  # registers more than in the table: ptxas gives them out in eights

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def parse(log):
    """{kernel: {processor: (registers, shared bytes)}}, and what is spilled."""
    kernels, spills, kernel, processor = {}, [], None, None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernel, processor = entry[1], int(entry[2])
        elif (spilled := SPILLS.search(line)) and (int(spilled[1]) or int(spilled[2])):
            spills.append(f"{kernel} spills registers on sm_{processor}: {line.strip()}")
        elif used := USED.search(line):
            shared = SHARED.search(line)
            kernels.setdefault(kernel, {})[processor] = (int(used[1]), int(shared[1]) if shared else 0)
    return kernels, spills


def table(kernels):
    processors = sorted({processor for found in kernels.values() for processor in found})
    lines = ["| kernel | shared bytes | " + " | ".join(f"sm_{processor}" for processor in processors) + " |"]
    lines.append("| --- " * (len(processors) + 2) + "|")
    for kernel, found in sorted(kernels.items()):
        shared = max(found[processor][1] for processor in processors)
        registers = " | ".join(str(found[processor][0]) for processor in processors)
        lines.append(f"| `{kernel}` | {shared} | {registers} |")
    return "\n".join(lines) + "\n"


def read(text):
    """The table of the document, as `parse` gives it with the shared memory of all processors."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    processors = [int(cell.removeprefix("sm_")) for cell in rows[0][2:]]
    return {
        row[0]: {processor: (int(registers), int(row[1])) for processor, registers in zip(processors, row[2:])}
        for row in rows[2:]
    }


def differences(found, expected):
    for kernel in sorted(found.keys() ^ expected.keys()):
        yield f"{kernel} is only in {'the sources' if kernel in found else 'the table'}"
    for kernel in sorted(found.keys() & expected.keys()):
        for processor, (registers, shared) in sorted(found[kernel].items()):
            most, room = expected[kernel].get(processor, (0, 0))
            if registers > most + MARGIN:
                yield f"{kernel} takes {registers} registers on sm_{processor}, {most} in the table"
            if shared > room + 16:
                yield f"{kernel} takes {shared} bytes of shared memory on sm_{processor}, {room} in the table"


def main():
    kernels, problems = parse(Path(sys.argv[1]).read_text())
    before, rest = DOCUMENT.read_text().split(BEGIN)
    old, after = rest.split(END)
    if "--write" in sys.argv[2:]:
        DOCUMENT.write_text(before + BEGIN + table(kernels) + END + after)
    else:
        problems += differences(kernels, read(old))
    count = sum(map(len, kernels.values()))
    print("\n".join(problems) or f"{len(kernels)} kernels, {count} times compiled: nothing is spilled, all is as in the table")
    sys.exit(bool(problems) or not kernels)


if __name__ == "__main__":
    main()
