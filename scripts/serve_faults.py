#!/usr/bin/env python3
"""Does to `bitnet serve` what clients, networks, disks and operators do to servers, and checks that it is as before after each.

    serve_faults.py BITNET [--rounds N] [--only PART]

After each case /health must answer, nothing may run, wait or be open that was not before, and nobody may have panicked. All
cases run N times (2 without the option) on one server, which must give their memory back each time when it has nothing to do.
Then come cases with servers of their own: signals, full disks, closed outputs. It exits with 1 at the first expectation that
does not hold, and names the case. It needs Python 3.11, Linux and no package; a full disk needs root, else it says that it is
left out.
"""

import argparse
import asyncio
import resource
import socket
import struct
import sys
import time

import serve_endings
from serve_hostile import BODIES, ELSEWHERE, SHAPES, is_json_error
from serve_process import Server, Wrong, check, head, post, read_head

CLIENT_TIMEOUT = 2  # seconds, of the server
CONNECTIONS = 300
SETTLE = 15  # seconds until all is as before
GIVEN_BACK = 75  # seconds after which a server with nothing to do has given freed memory back
GROWTH = 400  # MiB that may stay: keys and values of texts, and pieces of the heap between what is in use
LONG = {"prompt": "Once upon a time", "max_tokens": 500, "n": 100, "stream": True, "temperature": 1, "logit_bias": {"0": -100}}


def plain(server, data=b"", receive_bytes=None):
    """A blocking connection on which `data` has been sent."""
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(10)
    client.connect((server.host, server.port))
    client.sendall(data)
    return client


def begun(server):
    """A connection on which a stream has begun."""
    client = plain(server, post("/v1/completions", LONG))
    seen = b""
    while b"data: " not in seen:
        piece = client.recv(4096)
        check(piece, f"no stream but {seen!r}")
        seen += piece
    return client


def reset(client):
    """Ends a connection with RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def idle(server, within, what):
    """The engine has nothing to do within so many seconds."""
    deadline = time.monotonic() + within
    while (await server.stats())["engine"]["in_flight"]:
        check(time.monotonic() < deadline, f"{what} still runs after {within} s")
        await asyncio.sleep(0.05)


async def gone_mid_stream(server):
    """Clients that vanish, by FIN and by RST, while or before texts come that would take half a minute."""
    for leave in (socket.socket.close, reset):
        running = await asyncio.to_thread(begun, server)
        waiting = plain(server, post("/v1/completions", LONG))
        await asyncio.sleep(0.2)
        leave(waiting)
        leave(running)
        await idle(server, 5, f"a text after {leave.__name__}")


async def gone_before_the_answer(server):
    """Clients that wait for whole answers, and go."""
    clients = [plain(server, post("/v1/completions", {**LONG, "stream": False})) for _ in range(2)]
    await asyncio.sleep(0.5)
    for client in clients:
        reset(client)
    await idle(server, 5, "a text nobody waits for")


async def gone_in_hundreds(server):
    """Connections that come and go at once, some with half a request."""
    whole = post("/v1/completions", {"prompt": "a", "max_tokens": 50, "stream": True})
    for number in range(600):
        client = plain(server, whole[: number * len(whole) // 600])
        (reset if number % 2 else socket.socket.close)(client)
        if number % 50 == 0:
            await asyncio.sleep(0)


async def silent(server):
    """As many silent connections as are let in: they are closed in time, and others get their turn."""
    clients = [plain(server) for _ in range(CONNECTIONS)]
    status, _ = await server.get("/health", 5 * CLIENT_TIMEOUT)
    check(status == 200, f"/health is {status} after silent connections")
    for client in clients:
        end = await asyncio.to_thread(client.recv, 1000)
        check(end == b"" or end.startswith(b"HTTP/1.1 408"), f"a silent connection hears {end!r}")
        client.close()


async def drip(server, start, rest, ends):
    """Sends `rest` a byte at a time until the server has enough, which must be soon."""
    reader, writer = await server.connect()
    writer.write(start)
    begin, answer = time.monotonic(), asyncio.create_task(reader.read(100))
    for byte in rest:
        if answer.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.1)
    heard = await asyncio.wait_for(answer, 3 * CLIENT_TIMEOUT)
    took = time.monotonic() - begin
    check(took < 2 * CLIENT_TIMEOUT and any(heard.startswith(end) if end else not heard for end in ends), f"after {took:.1f} s: {heard!r}")
    writer.close()


async def slow(server):
    """Heads and bodies that come a byte at a time."""
    request = post("/v1/completions", {"prompt": "a" * 1000})
    body = request.index(b"\r\n\r\n") + 4
    heads = [drip(server, b"", request, (b"", b"HTTP/1.1 408")) for _ in range(50)]
    bodies = [drip(server, request[:body], request[body:], (b"HTTP/1.1 408",)) for _ in range(50)]
    await asyncio.gather(*heads, *bodies)


async def never_read(server):
    """Clients that ask for long streams and never read: the server gives them up."""
    clients = [plain(server, post("/v1/completions", {**LONG, "max_tokens": 200}), 4096) for _ in range(2)]
    await asyncio.sleep(1)
    check((await server.stats())["engine"]["running"] > 0, "nothing runs for them")
    await idle(server, 60, "a text that nobody reads")
    deadline = time.monotonic() + 5 * CLIENT_TIMEOUT
    while (await server.stats())["requests"]["in_flight"] > 1:
        check(time.monotonic() < deadline, "a stream that nobody reads stays open")
        await asyncio.sleep(0.2)
    for client in clients:
        client.close()


async def crowd(server):
    """A thousand clients at once: each gets an answer or is told that the server is busy."""
    gate = asyncio.Semaphore(CONNECTIONS - 10)

    async def client(number):
        async with gate:
            status, _, body = await server.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "seed": number, "n": 1 + number % 3})
        check(status == 200 or (status == 429 and b"queue_full" in body), f"{status} {body!r}")
        return status

    statuses = await asyncio.gather(*(client(number) for number in range(1000)))
    check(statuses.count(200) >= 100, f"only {statuses.count(200)} of 1000 are answered")


async def many_pipelined(server):
    """A client that sends 2000 requests and reads afterwards."""
    reader, writer = await server.connect()
    writer.write(head("GET", "/health") * 2000)
    for _ in range(2000):
        status, headers = await asyncio.wait_for(read_head(reader), 10)
        check(status == 200, f"a pipelined request is {status}")
        await reader.readexactly(int(headers["content-length"]))
    writer.close()


async def ids(server):
    """Ids of clients come back only if they are fit for a header."""
    for given, fits in [("mine-1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("a\tb", False), ("é", False)]:
        reader, writer = await server.connect()
        writer.write(head("GET", "/health", f"X-Request-Id: {given}\r\n", close=True))
        _, headers = await read_head(reader)
        check((headers["x-request-id"] == given) == fits, f"{given!r} comes back as {headers['x-request-id']!r}")
        writer.close()


async def statuses(reader):
    """The statuses of all answers on a connection, until it ends or falls silent."""
    data = b""
    try:
        while piece := await asyncio.wait_for(reader.read(1 << 16), CLIENT_TIMEOUT + 2):
            data += piece
    except (TimeoutError, ConnectionError):
        pass
    # A body has no line breaks, and the next answer may follow it at once.
    return [int(part[:3]) for part in data.split(b"HTTP/1.")[1:] for part in [part[2:]]]


async def shapes(server):
    """HTTP as nobody should speak it."""
    for name, data, expected in SHAPES:
        reader, writer = await server.connect()
        writer.write(data)
        got = await statuses(reader)
        check(got == expected, f"{name}: the statuses are {got}, not {expected}")
        writer.close()


async def hostile(server):
    """Bodies that are wrong, deep, wide or long. Beside them, others are answered in time."""
    for path, name, body, allowed in [("/v1/completions", *case) for case in BODIES] + ELSEWHERE:
        asked = asyncio.create_task(server.post(path, body))
        slowest = 0
        while not asked.done():
            begin = time.monotonic()
            await server.get("/health", 20)
            slowest = max(slowest, time.monotonic() - begin)
            await asyncio.sleep(0.05)
        check(slowest < 2, f"{path}, {name}: others wait {slowest:.1f} s for /health")
        try:
            status, _, answer = await asked
        except (ConnectionError, asyncio.IncompleteReadError):
            check(allowed == {413}, f"{path}, {name}: the connection breaks off")
            continue  # what is too long is not read to its end
        check(status in allowed, f"{path}, {name}: {status}, not {allowed}: {answer[:300]!r}")
        check(status == 200 or is_json_error(answer), f"{path}, {name}: no error in JSON: {answer[:300]!r}")


async def bodies_at_once(server):
    """Many bodies that take many times their length as values: they are not all read at once."""
    body = b'{"prompt":"a","max_tokens":1,"x":[' + b",".join([b"{}"] * 1_300_000) + b"]}"
    before = server.rss()
    asked = asyncio.gather(*(server.post("/v1/completions", body) for _ in range(24)))
    most, slowest = before, 0
    while not asked.done():
        begin = time.monotonic()
        await server.get("/health", 30)
        most, slowest = max(most, server.rss()), max(slowest, time.monotonic() - begin)
        await asyncio.sleep(0.05)
    check({status for status, _, _ in await asked} == {200}, "they are not answered")
    check(slowest < 2, f"/health takes {slowest:.1f} s beside them")
    check(most < before + 1000, f"memory goes from {before:.0f} to {most:.0f} MiB")


CASES = [shapes, ids, hostile, bodies_at_once, gone_mid_stream, gone_before_the_answer, gone_in_hundreds, silent, slow, never_read, crowd, many_pipelined]


async def as_before(server, fds):
    """All is as before a case."""
    check((await server.get("/health", 3 * CLIENT_TIMEOUT))[0] == 200, "/health is not 200")
    deadline = time.monotonic() + SETTLE
    while True:
        stats = await server.stats()
        left = {name: stats["engine"][name] for name in ("in_flight", "running", "queued", "kv_running_bytes")}
        left |= {"requests": stats["requests"]["in_flight"] - 1, "files": max(0, server.fds() - fds)}
        if not any(left.values()):
            break
        check(time.monotonic() < deadline, f"{left} are left")
        await asyncio.sleep(0.1)
    status, _, answer = await server.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0})
    check(status == 200, f"a text is {status} {answer!r}")
    errors = server.errors()
    check("panicked" not in errors and "ERROR" not in errors, f"stderr has {errors[-2000:]}")


async def clients(args):
    """The cases on one server."""
    options = ["--client-timeout", str(CLIENT_TIMEOUT), "--max-connections", str(CONNECTIONS), "--kv-memory", "32"]
    # A request that takes more memory than this is to fail here, and not to fell the machine.
    limit = 8 << 30
    with Server(args.bitnet, *options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) as server:
        await server.until_ready()
        fds, before = server.fds(), server.rss()
        for number in range(args.rounds):
            for case in CASES:
                try:
                    begin = time.monotonic()
                    await case(server)
                    await as_before(server, fds)
                    print(f"   {case.__name__}: as before after {time.monotonic() - begin:.1f} s, {server.rss():.0f} MiB", flush=True)
                except (Wrong, OSError, TimeoutError, EOFError, AssertionError) as error:
                    raise Wrong(f"{case.__name__}, round {number + 1}: {type(error).__name__}: {error}") from error
            deadline = time.monotonic() + GIVEN_BACK
            while server.rss() > before + GROWTH:
                check(time.monotonic() < deadline, f"of {server.rss():.0f} MiB after round {number + 1} nothing is given back")
                await asyncio.sleep(1)
            print(f"   memory: {before:.0f} MiB at first, {server.rss():.0f} after round {number + 1}", flush=True)
        check(server.end() == 0, "SIGTERM does not end it with status 0")


def main():
    """Says what holds, case after case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["clients", "endings"])
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        if args.only != "endings":
            asyncio.run(clients(args))
        if args.only != "clients":
            asyncio.run(serve_endings.run(args.bitnet))
    except Wrong as wrong:
        sys.exit(f"   {wrong}")


if __name__ == "__main__":
    main()
