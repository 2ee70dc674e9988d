#!/usr/bin/env python3
"""Puts `bitnet serve` on the embedded model under load, and checks every answer and that memory stays flat.

    serve_load.py BITNET [--clients N] [--seconds S] [--requests N] [--json]

Clients ask one after the other, over connections they keep or don't, in pieces or not, for one choice or several. Every answer
must be complete; the one refusal allowed is a full queue. A sample is asked again alone and must be the same text. Memory is
fitted by a line over what comes after the warm-up. Latencies are the clients', beside what /stats says: where clients and
server share the cores, the clients' are longer. It needs Python 3.11 and Linux, and no package.
"""

import argparse
import asyncio
import json
import random
import sys
import time

from serve_process import Server, Wrong, check, events, post, read_body, read_head

WORDS = "once upon a time there was little girl who had red ball dog and cat went to the park saw big tree said mom".split()
KV_MIB = 16  # what is kept of ended texts fills this during the warm-up
WARM_UP = 1 / 3  # of the run
FLAT = 0.03, 4  # the rise of the fitted line that is still flat: part of the memory, or MiB
SETTLE = 10  # seconds until nothing runs


def ask(rng):
    """A request of any kind that clients send."""
    body = {
        "prompt": " ".join(rng.choices(WORDS, k=rng.choice([2, 5, 20, 60, 150]))).capitalize(),
        "max_tokens": rng.choice([1, 8, 32, 64, 150]),
        "temperature": rng.choice([0, 0.7, 1.2]),
        "seed": rng.randrange(2**63),
        "n": rng.choice([1, 1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.85,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.1:
        body["stop"] = [" and", ".\n", "the end"]
    if rng.random() < 0.1:
        body["logprobs"] = 2
    return body


class Load:
    """What the clients saw."""

    def __init__(self, server):
        self.server, self.requests, self.tokens, self.full = server, 0, 0, 0
        self.first, self.between, self.sample, self.series = [], [], [], []

    async def client(self, number, goes_on):
        """Asks until it is time to end."""
        rng, connection = random.Random(number), None
        while goes_on():
            body = ask(rng)
            connection = connection or await self.server.connect()
            reader, writer = connection
            sent = time.monotonic()
            writer.write(post("/v1/completions", body))
            status, headers = await read_head(reader)
            if status == 200:
                texts = await self.answer(reader, headers, body, sent)
                self.requests += 1
                if rng.random() < 0.02:
                    self.sample.append((body, texts))
            else:
                refusal = json.loads(await read_body(reader, headers))["error"]
                check((status, refusal["code"]) == (429, "queue_full"), f"{status} {refusal} for {body}")
                check(int(headers["retry-after"]) >= 1, "a full queue does not say when to ask again")
                self.full += 1
                await asyncio.sleep(rng.random())
            if rng.random() < 0.3:
                writer.close()
                connection = None
        if connection:
            connection[1].close()

    async def answer(self, reader, headers, body, sent):
        """The texts of an answer; it must be whole."""
        if not body["stream"]:
            whole = json.loads(await read_body(reader, headers))
            texts = {choice["index"]: choice["text"] for choice in whole["choices"]}
            check(all(choice["finish_reason"] in ("stop", "length") for choice in whole["choices"]), f"no end: {whole}")
            self.count(whole["usage"], texts, body)
            return texts
        check(headers["content-type"] == "text/event-stream", f"a stream is {headers['content-type']}")
        texts, ended, usage, ids, last = {}, {}, None, set(), None
        async for event in events(reader):
            now = time.monotonic()
            if event is None:
                continue
            check("error" not in event, f"an error in a stream: {event}")
            ids.add(event["id"])
            check(usage is None, f"after the usage comes {event}")
            usage = event["usage"]
            for choice in event["choices"]:
                index = choice["index"]
                check(index not in ended, f"after its end choice {index} goes on: {event}")
                texts[index] = texts.get(index, "") + choice["text"]
                if choice["finish_reason"]:
                    ended[index] = choice["finish_reason"]
            if event["choices"]:
                if last is None:
                    self.first.append(now - sent)
                elif body["n"] == 1:
                    self.between.append(now - last)
                last = now
        check(len(ids) == 1, f"a stream has the ids {ids}")
        check(set(ended) == set(range(body["n"])) and set(ended.values()) <= {"stop", "length"}, f"ends {ended} for {body}")
        check(usage is not None, "a stream without the usage it was asked for")
        self.count(usage, texts, body)
        return texts

    def count(self, usage, texts, body):
        """Takes the tokens of an answer."""
        check(set(texts) == set(range(body["n"])), f"choices {set(texts)} for {body}")
        check(1 <= usage["completion_tokens"] + body["n"] and usage["completion_tokens"] <= body["n"] * body["max_tokens"], f"{usage} for {body}")
        self.tokens += usage["completion_tokens"]

    async def watch(self, start):
        """Writes down, every second, how the server is."""
        while True:
            engine = (await self.server.stats())["engine"]
            self.series.append((time.monotonic() - start, self.server.rss(), self.server.fds(), engine["kv_kept_bytes"] / 2**20))
            await asyncio.sleep(1)


async def replay(load):
    """Asks the sample again, one at a time."""
    for body, texts in load.sample:
        status, _, answer = await load.server.post("/v1/completions", {**body, "stream": False, "stream_options": None})
        check(status == 200, f"alone {status} {answer} for {body}")
        alone = {choice["index"]: choice["text"] for choice in json.loads(answer)["choices"]}
        check(alone == texts, f"alone {alone}, among others {texts}, for {body}")


async def settle(server, fds):
    """Waits until nothing runs, waits or is open."""
    deadline = time.monotonic() + SETTLE
    while True:
        stats = await server.stats()
        left = [stats["engine"][name] for name in ("in_flight", "running", "queued", "kv_running_bytes")]
        left += [stats["requests"]["in_flight"] - 1, max(0, server.fds() - fds)]
        if not any(left):
            return
        check(time.monotonic() < deadline, f"in flight, running, queued, KV bytes, requests, files: {left} are left")
        await asyncio.sleep(0.1)


def percentiles(values):
    """In milliseconds."""
    values = sorted(values) or [0]
    return {f"p{part}": round(1000 * values[min(len(values) - 1, len(values) * part // 100)], 1) for part in (50, 90, 99)}


def slope(points):
    """Of a line through points by least squares."""
    count = len(points)
    x, y = (sum(axis) / count for axis in zip(*points))
    square = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / square if square else 0


def memory(series):
    """How memory goes after the warm-up."""
    warm = [(at, rss) for at, rss, *_ in series if at >= WARM_UP * series[-1][0]]
    rise = slope(warm) * (warm[-1][0] - warm[0][0])
    most = max(FLAT[0] * warm[0][1], FLAT[1])
    return {
        "rss_mib_first": round(series[0][1], 1),
        "rss_mib_warm": round(warm[0][1], 1),
        "rss_mib_last": round(warm[-1][1], 1),
        "rise_mib_after_warm_up": round(rise, 2),
        "rise_mib_allowed": round(most, 2),
        "is_flat": rise <= most,
        "kv_kept_mib": round(series[-1][3], 1),
        "most_fds": max(fds for _, _, fds, _ in series),
    }


async def run(args):
    """Starts a server, runs the clients, and says how it was."""
    with Server(args.bitnet, "--kv-memory", str(KV_MIB), *args.options) as server:
        await server.until_ready()
        fds, load, start = server.fds(), Load(server), time.monotonic()
        ends = start + args.seconds
        watching = asyncio.create_task(load.watch(start))

        def goes_on():
            return time.monotonic() < ends and (args.requests is None or load.requests < args.requests)

        async with asyncio.TaskGroup() as group:
            for number in range(args.clients):
                group.create_task(load.client(number, goes_on))
        took = time.monotonic() - start
        if watching.done():
            watching.result()
        watching.cancel()
        stats = await server.stats()
        await settle(server, fds)
        await replay(load)
        await settle(server, fds)
        check("panicked" not in server.errors(), f"a panic: {server.errors()[-2000:]}")
        check(server.end() == 0, "SIGTERM does not end it with status 0")
    window = stats["windows"][0]
    return {
        "clients": args.clients,
        "seconds": round(took, 1),
        "requests": load.requests,
        "queue_full": load.full,
        "compared_alone": len(load.sample),
        "requests_per_second": round(load.requests / took, 1),
        "tokens_per_second": round(load.tokens / took),
        "client_ttft_ms": percentiles(load.first),
        "server_ttft_ms": window["ttft_ms"],
        "client_inter_token_ms": percentiles(load.between),
        "server_inter_token_ms": window["inter_token_ms"],
        **memory(load.series),
    }, load.series


def main():
    """Exits with 1 if an answer is wrong or memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--requests", type=int, help="end after so many")
    parser.add_argument("--json", action="store_true", help="one object, with the series of seconds, MiB, files and MiB of KV")
    parser.add_argument("options", nargs="*", help="of bitnet serve, after --")
    args = parser.parse_args()
    try:
        result, series = asyncio.run(run(args))
    except* (Wrong, ConnectionError, TimeoutError, asyncio.IncompleteReadError) as errors:
        error = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"{type(error).__name__}: {error}")
    if args.json:
        print(json.dumps({**result, "series": series}))
    else:
        for name, value in result.items():
            print(f"{name.replace('_', ' '):24} {value if not isinstance(value, dict) else '  '.join(f'{k} {v}' for k, v in value.items())}")
    sys.exit(0 if result["is_flat"] else "memory grows")


if __name__ == "__main__":
    main()
