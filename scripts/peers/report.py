"""From the runs to medians, ratios and tables."""

import statistics

OURS = "bitnet"


def medians(runs):
    """(engine, threads) -> what its runs measured: {test: samples}, and medians of start and memory."""
    measured = {}
    for run in runs:
        if run["error"]:
            continue
        entry = measured.setdefault((run["engine"], run["threads"]), {"tests": {}, "first": [], "short": [], "peak": []})
        for test, samples in run["result"]["tests"].items():
            entry["tests"].setdefault(test, []).extend(samples)
        for key, field in (("first", "first_token_seconds"), ("short", "short_rss_bytes"), ("peak", "peak_rss_bytes")):
            if run["result"].get(field):
                entry[key].append(run["result"][field])
    return measured


def results(runs, notes):
    """One row for each engine, number of threads and test, with the ratio ours / peer."""
    measured = medians(runs)
    rows = []
    for (engine, threads), entry in measured.items():
        base = measured.get((OURS, threads), {"tests": {}})["tests"]
        for test, samples in entry["tests"].items():
            speed = statistics.median(samples)
            ours = statistics.median(base[test]) if test in base and engine != OURS else None
            rows.append({
                "engine": engine, "threads": threads, "test": test, "tokens_per_second": round(speed, 3),
                "samples": [round(sample, 3) for sample in samples],
                "ours_over_peer": round(ours / speed, 3) if ours else None,
                "note": notes.get((engine, test)),
            })
    return rows


def cell(row):
    text = f"{row['tokens_per_second']:.1f}" + ("*" if row["note"] else "")
    return text + (f" ({row['ours_over_peer']:.2f}x)" if row["ours_over_peer"] else "")


def table(report, threads):
    """Rows of cells, the heading first, for one number of threads."""
    rows = {(row["engine"], row["test"]): row for row in report["results"] if row["threads"] == threads}
    measured = medians(report["runs"])
    tests = report["tests"]
    lines = [["engine", "head", *tests, "first token s", "RSS short MiB", "RSS peak MiB"]]
    for engine, about in report["engines"].items():
        entry = measured.get((engine, threads))
        if entry is None:
            lines.append([engine, about["head"], about["problem"] or "no result", *[""] * (len(tests) + 2)])
            continue

        def memory(key):
            return f"{statistics.median(entry[key]) / 2**20:.0f}" if entry[key] else "-"

        speeds = [cell(rows[engine, test]) if (engine, test) in rows else "-" for test in tests]
        first = f"{statistics.median(entry['first']):.2f}" if entry["first"] else "-"
        lines.append([engine, about["head"], *speeds, first, memory("short"), memory("peak")])
    return lines


def aligned(lines):
    """Columns as wide as their widest cell; a row that holds only a reason may run over."""
    full = [line for line in lines if line[3]]
    widths = [max(len(line[i]) for line in full) for i in range(len(full[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    widths[1] = max(len(line[1]) for line in lines)

    def row(line):
        if not line[3]:
            return f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}"
        right = (f"{text:>{width}}" for text, width in zip(line[2:], widths[2:]))
        return "  ".join([f"{line[0]:<{widths[0]}}", f"{line[1]:<{widths[1]}}", *right])

    return "\n".join(row(line).rstrip() for line in lines)


def markdown(lines):
    heading, *rows = ("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return "\n".join([heading, "|" + "---|" * 2 + "---:|" * (len(lines[0]) - 2), *rows])


def footnotes(report):
    """What a reader must know: who could not run, what was measured otherwise, and how busy the machine was."""
    machine = report["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
             f"Linux {machine['kernel']}, {report['date']}",
             "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
             f"tokens/s, medians of {report['rounds']} interleaved round(s) of {report['repeats']} samples; "
             "in brackets: ours / peer"]
    lines += [f"{engine}: {about['problem']}" for engine, about in report["engines"].items() if about["problem"]]
    lines += [f"* {engine}, {test}: {note}" for engine, notes in report["notes"].items()
              for test, note in notes.items()]
    lines += [f"{run['engine']}, {run['threads']} threads, round {run['round']}: failed, {run['error']}"
              for run in report["runs"] if run["error"]]
    busy = [run for run in report["runs"] if run["busy"]]
    if busy:
        others = statistics.median(run["load"]["others"] for run in busy)
        worst = max(run["load"]["others"] for run in busy)
        lines.append(f"WARNING: the machine was busy during {len(busy)} of {len(report['runs'])} runs: other processes "
                     f"used {others:.2f} cores in the median, {worst:.2f} at worst. These figures are not final.")
    return lines


def text(report, as_markdown=False):
    """All tables, then the footnotes."""
    parts = []
    for threads in report["threads"]:
        lines = table(report, threads)
        title = f"{threads} thread{'s' if threads > 1 else ''}"
        parts.append(f"### {title}\n\n{markdown(lines)}" if as_markdown else f"{title}\n{aligned(lines)}")
    notes = footnotes(report)
    parts.append("\n".join(f"- {note}" for note in notes) if as_markdown else "\n".join(notes))
    return "\n\n".join(parts)
