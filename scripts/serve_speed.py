#!/usr/bin/env python3
"""What serving costs beside computing: `bitnet serve` against `bitnet bench` and `bitnet generate`.

    scripts/serve_speed.py BITNET MODEL [--clients 8] [--tokens 64] [--rounds 3]

In turns, ROUNDS times: tokens/s of `bench` with a batch of CLIENTS and with one sequence, then the same over HTTP, as
streams of one server that does nothing else.  Of clients that start together the tokens count from when the last of them has its
first one, until the first of them ends.  Prints the medians, the ratio, and what a token of a lone stream takes longer than with
`bench`.  Standard library only; MODEL needs a tokenizer, and the machine should do nothing else.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time


def bench(bitnet, model, batch, tokens):
    """Tokens/s of all sequences together."""
    command = [bitnet, "bench", "-m", model, "-p", "0", "-n", str(tokens), "-d", "16", "-b", str(batch), "-r", "3", "--json", "-q"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = [row for row in report["results"] if row["batch"] == batch]
    return found[0]["tokens_per_second"]


async def stream(port, seed, tokens):
    """When each token of a text came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [100 + seed * 7 + i for i in range(16)], "max_tokens": tokens, "temperature": 0, "stream": True,
                       "repetition_penalty": 1})
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    times = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"error"' in line:
                raise RuntimeError(line.decode())
            times.append(time.perf_counter())
    writer.close()
    return times


async def together(port, clients, tokens):
    """Tokens/s of streams that run at the same time, and seconds between tokens."""
    all_times = await asyncio.gather(*(stream(port, seed, tokens) for seed in range(clients)))
    first, last = max(times[0] for times in all_times), min(times[-1] for times in all_times)
    count = sum(sum(first < at <= last for at in times) for times in all_times)
    gaps = [b - a for times in all_times for a, b in zip(times, times[1:-1])]
    return count / (last - first), statistics.median(gaps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        benched = [bench(args.bitnet, args.model, batch, args.tokens) for batch in (args.clients, 1)]
        command = [args.bitnet, "serve", "-q", "-m", args.model, "--port", "0", "--max-batch", str(args.clients), "--kv-memory", "1024"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            while subprocess.run(["curl", "-sf", "-o", "/dev/null", f"http://127.0.0.1:{port}/ready"]).returncode:
                time.sleep(0.1)
            asyncio.run(together(port, args.clients, 8))
            served = asyncio.run(together(port, args.clients, args.tokens))[0]
            alone, gap = asyncio.run(together(port, 1, args.tokens))
        finally:
            server.terminate()
            server.wait()
        rounds.append((benched[0], served, benched[1], alone, 1000 * (gap - 1 / benched[1])))
        print("  ".join(f"{value:.2f}" for value in rounds[-1]), file=sys.stderr)
    medians = [statistics.median(column) for column in zip(*rounds)]
    ratio = statistics.median(served / benched for benched, served, *_ in rounds)
    print(f"{args.clients} sequences: bench {medians[0]:.1f} tokens/s, {args.clients} clients {medians[1]:.1f}, ratio {ratio:.3f}")
    print(f"1 sequence: bench {medians[2]:.1f} tokens/s, a client {medians[3]:.1f}, {medians[4]:+.3f} ms a token")


if __name__ == "__main__":
    main()
