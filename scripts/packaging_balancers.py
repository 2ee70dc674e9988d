#!/usr/bin/env python3
"""Runs packaging/nginx.conf and packaging/Caddyfile before two stand-ins for servers, and watches where requests go.

    packaging_balancers.py [--nginx NGINX] [--caddy CADDY]       run by packaging_check.sh

A stand-in answers as `bitnet serve` does: /ready, and a stream of events with pauses between them. Must hold: events come one by one
and not all at the end; requests with one X-Prefix meet at one server, different ones do not all; those without go to the server with
less to do; a server that answers 503 is passed over, by nginx at once, by Caddy when it has asked /ready again; /metrics of one
server is not shown.
"""

import argparse
import http.client
import http.server
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

PACKAGING = pathlib.Path(__file__).resolve().parent.parent / "packaging"
PAUSE = 0.3  # seconds between events: far above what passing one on takes
EVENTS = 4
NOTICE = {"nginx": 0, "caddy": 2}  # seconds: the second exceeds health_interval


class Standin(http.server.ThreadingHTTPServer):
    """A server that knows its name, and whether it is ready."""

    daemon_threads = True

    def __init__(self, name):
        super().__init__(("127.0.0.1", 0), Answer)
        self.name, self.ready = name, True
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    """Events in chunks, or 503."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """/ready, and any other path."""
        self.plain(200 if self.server.ready else 503)

    def do_POST(self):
        """A stream; with the header `X-Short` its first event alone, with `X-Close` not in chunks but until the connection ends."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.ready:
            return self.plain(503)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.chunked = not self.headers["X-Close"]
        self.send_header(*(("Transfer-Encoding", "chunked") if self.chunked else ("Connection", "close")))
        self.end_headers()
        for event in range(1 if self.headers["X-Short"] else EVENTS):
            time.sleep(PAUSE if event else 0)
            self.chunk(f"data: {self.server.name}\n\n".encode())
        return self.chunk(b"")

    def chunk(self, data):
        """One piece of a stream, sent at once."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def plain(self, status):
        """A whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        """Nothing."""


def ask(port, headers, path="/v1/chat/completions", method="POST"):
    """The status, the server that answered, and the seconds at which each event came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    began = time.monotonic()
    connection.request(method, path, body=b"{}" if method == "POST" else None, headers=headers)
    reply = connection.getresponse()
    name, times = None, []
    while line := reply.readline():
        if line.startswith(b"data: "):
            name = line[6:].strip().decode()
            times.append(time.monotonic() - began)
    connection.close()
    return reply.status, name, times


def short(port, prefix=None):
    """Which server answers a short request."""
    status, name, _ = ask(port, {"X-Short": "1"} | ({"X-Prefix": prefix} if prefix else {}))
    assert status == 200, f"status {status}"
    return name


def watch(balancer, port, servers):
    """What must hold of a balancer that listens on the port."""
    for headers in ({}, {"X-Close": "1"}):  # nginx holds back only what is not in chunks
        status, _, times = ask(port, headers)
        gaps = [after - before for before, after in zip(times, times[1:])]
        assert status == 200 and len(times) == EVENTS, f"{balancer}: status {status}, {len(times)} events"
        assert min(gaps) > PAUSE / 2, f"{balancer}: events come together, {gaps}"

    homes = {f"p{number}": short(port, f"p{number}") for number in range(12)}
    assert len(set(homes.values())) == 2, f"{balancer}: all prefixes are at one server"
    for prefix, home in homes.items():
        assert {short(port, prefix) for _ in range(3)} == {home}, f"{balancer}: prefix {prefix} wanders"

    busy = threading.Thread(target=lambda: found.append(ask(port, {})[1]))
    found = []
    busy.start()
    time.sleep(PAUSE / 2)
    others = {short(port) for _ in range(4)}
    busy.join()
    assert others.isdisjoint(found), f"{balancer}: {others} while {found} was busy"

    servers[0].ready = False
    time.sleep(NOTICE[balancer])
    names = {short(port, prefix) for prefix in homes} | {short(port) for _ in range(6)}
    assert names == {servers[1].name}, f"{balancer}: {names} while {servers[0].name} was loading"
    servers[0].ready = True

    for path in ("/metrics", "/stats", "/v1/load_lora_adapter"):
        status, _, _ = ask(port, {}, path, "GET")
        assert status == 404, f"{balancer}: {path} is {status}"
    print(f"   {balancer}: streams, keeps prefixes together, evens out, passes over who is not ready")


def free_port():
    """A port that was free a moment ago."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    return server.server_port


def start(name, program, folder, port, servers):
    """The balancer's process, with its file's ports replaced by those of here."""
    text = (PACKAGING / {"nginx": "nginx.conf", "caddy": "Caddyfile"}[name]).read_text()
    for old, new in ((":8081", f":{servers[0].server_port}"), (":8082", f":{servers[1].server_port}")):
        assert old in text, f"{name}: no server {old}"
        text = text.replace(old, new)
    config = folder / name
    if name == "nginx":
        text = text.replace("listen 8080", f"listen 127.0.0.1:{port}")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {paths}\n{text} }}"
        command = [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]
    else:
        text = "{\n\tadmin off\n}\n" + text.replace(":8080 {", f"http://127.0.0.1:{port} {{")
        command = [program, "run", "--config", str(config), "--adapter", "caddyfile"]
    config.write_text(text)
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=log, env={"HOME": str(folder), "PATH": "/usr/bin:/bin"})


def main():
    """Tries each balancer that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nginx")
    parser.add_argument("--caddy")
    for name, program in vars(parser.parse_args()).items():
        if not program:
            continue
        servers, port = [Standin("first"), Standin("second")], free_port()
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            folder.chmod(0o755)  # nginx's workers are another user's
            balancer = start(name, program, folder, port, servers)
            try:
                time.sleep(1)
                watch(name, port, servers)
            except (AssertionError, OSError) as error:
                log = (folder / f"{name}.log").read_text()[-2000:]
                sys.exit(f"   {error!r}\n{log}")
            finally:
                balancer.terminate()
                balancer.wait(10)


if __name__ == "__main__":
    main()
