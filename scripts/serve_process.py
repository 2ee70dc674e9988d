"""A `bitnet serve` of a script's own, and a small HTTP client for it, of which a script sees every byte."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time

PATIENCE = 60  # seconds to load the embedded model, on a busy machine


class Wrong(Exception):
    """What is not as it should be."""


def check(holds, message):
    """Says what is wrong."""
    if not holds:
        raise Wrong(message)


class Server:
    """A server on a free port of 127.0.0.1 (or as the options say), its standard error in a file."""

    def __init__(self, bitnet, *options, **process):
        self.folder = tempfile.TemporaryDirectory(prefix="bitnet-serve-")
        self.log = pathlib.Path(self.folder.name, "stderr")
        options = options if "--port" in options else ("--port", "0", *options)
        with open(self.log, "w") as log:
            process.setdefault("stderr", log)
            self.process = subprocess.Popen([bitnet, "serve", *options], stdout=subprocess.PIPE, text=True, **process)
        first = self.process.stdout.readline()
        check(first.startswith("listening on http://"), f"the first line is {first!r}, stderr {self.errors()!r}")
        self.host, _, port = first.split("//", 1)[1].strip().rpartition(":")
        self.host, self.port = self.host.strip("[]"), int(port)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    @property
    def pid(self):
        return self.process.pid

    def errors(self):
        """Its standard error so far."""
        return self.log.read_text(errors="replace")

    def rss(self):
        """MiB of memory."""
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise Wrong(f"the server has ended: {self.errors()[-2000:]}")

    def fds(self):
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self, patience=40):
        """SIGTERM, and the status it ends with."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    async def connect(self):
        """A connection: reader and writer."""
        return await asyncio.wait_for(asyncio.open_connection(self.host, self.port), 10)

    async def get(self, path, patience=10):
        """Status and body of a GET on a connection of its own."""
        reader, writer = await self.connect()
        try:
            writer.write(head("GET", path, close=True))
            status, headers = await asyncio.wait_for(read_head(reader), patience)
            return status, await asyncio.wait_for(read_body(reader, headers), patience)
        finally:
            writer.close()

    async def stats(self):
        """What /stats says."""
        status, body = await self.get("/stats")
        check(status == 200, f"/stats is {status}")
        return json.loads(body)

    async def until_ready(self):
        """Waits until it answers requests."""
        deadline = time.monotonic() + PATIENCE
        while (status := (await self.get("/ready"))[0]) != 200:
            check(status == 503 and time.monotonic() < deadline, f"/ready is {status}")
            await asyncio.sleep(0.1)

    async def post(self, path, body, patience=60):
        """Status, headers and body of a POST of JSON on a connection of its own."""
        reader, writer = await self.connect()
        try:
            writer.write(post(path, body, close=True))
            status, headers = await asyncio.wait_for(read_head(reader), patience)
            return status, headers, await asyncio.wait_for(read_body(reader, headers), patience)
        finally:
            writer.close()


def head(method, path, more="", close=False):
    """The head of a request, of a body as long as `more` says."""
    kept = "close" if close else "keep-alive"
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {kept}\r\n{more}\r\n".encode()


def post(path, body, close=False):
    """A request with a JSON body, of a value or of bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("POST", path, f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n", close) + body


async def read_head(reader):
    """Status and headers (names in lower case) of a response."""
    line = await reader.readline()
    check(line.startswith(b"HTTP/1.1 ") and line.endswith(b"\r\n"), f"the answer begins with {line[:80]!r}")
    headers = {}
    while (field := await reader.readline()) != b"\r\n":
        check(field.endswith(b"\r\n"), f"the head of the answer breaks off at {field[:80]!r}")
        name, _, value = field.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


async def chunks(reader):
    """The chunks of a chunked body, each as it was sent, up to the last."""
    while True:
        line = await reader.readline()
        check(line.endswith(b"\r\n"), "a chunked body breaks off")
        size = int(line, 16)
        chunk = await reader.readexactly(size + 2)
        check(chunk.endswith(b"\r\n"), "a chunk is longer than it says")
        if size == 0:
            return
        yield chunk[:-2]


async def read_body(reader, headers):
    """A body, chunked or of a known length."""
    if headers.get("transfer-encoding") == "chunked":
        return b"".join([chunk async for chunk in chunks(reader)])
    return await reader.readexactly(int(headers["content-length"]))


async def events(reader):
    """The data of server-sent events, as they come. What is no event, or follows [DONE], is wrong."""
    rest, done = b"", False
    async for chunk in chunks(reader):
        rest += chunk
        while b"\n\n" in rest:
            event, _, rest = rest.partition(b"\n\n")
            if event.startswith(b":"):
                continue
            check(event.startswith(b"data: ") and b"\n" not in event, f"no event: {event[:80]!r}")
            check(not done, f"after [DONE] comes {event[:80]!r}")
            done = event == b"data: [DONE]"
            yield None if done else json.loads(event[6:])
    check(not rest and done, f"the stream ends without [DONE], at {rest[:80]!r}")
