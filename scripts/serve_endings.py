"""What becomes of `bitnet serve` when it is killed, ended, or has nowhere to write to: cases with servers of their own."""

import asyncio
import json
import os
import pathlib
import resource
import socket
import subprocess
import tempfile

from serve_process import Server, Wrong, check, events, post, read_head

TEXT = "/v1/completions"
STREAM = {"prompt": "Once upon a time", "max_tokens": 100, "n": 4, "stream": True}


async def asks(server):
    """A text is answered."""
    status, _, body = await server.post(TEXT, {"prompt": "a", "max_tokens": 2})
    check(status == 200, f"a text is {status} {body!r}")


async def killed_and_started_again(bitnet):
    """After kill -9 in the middle of streams, the next server has the same port at once."""
    with Server(bitnet) as server:
        await server.until_ready()
        streams = [await server.connect() for _ in range(20)]
        for reader, writer in streams:
            writer.write(post(TEXT, STREAM))
            await read_head(reader)
        server.process.kill()
        server.process.wait()
        with Server(bitnet, "--port", str(server.port)) as again:
            await again.until_ready()
            await asks(again)
        for _, writer in streams:
            writer.close()


async def ended_under_load(bitnet):
    """SIGTERM lets every stream that has begun come to its end, refuses what is new, and ends with 0."""
    with Server(bitnet) as server:
        await server.until_ready()
        streams = [await server.connect() for _ in range(40)]
        idle = await server.connect()

        async def whole(reader, writer):
            writer.write(post(TEXT, STREAM))
            status, _ = await read_head(reader)
            check(status == 200, f"a stream is {status}")
            begins.release()
            return [event async for event in events(reader)][-1]

        begins = asyncio.Semaphore(0)
        running = [asyncio.create_task(whole(*stream)) for stream in streams]
        for _ in streams:
            await asyncio.wait_for(begins.acquire(), 60)
        ending = asyncio.create_task(asyncio.to_thread(server.end))
        check(await asyncio.gather(*running) == [None] * len(running), "a stream is cut")
        check(await ending == 0, f"it ends with {server.process.returncode}")
        check(await idle[0].read() == b"", "a silent connection hears something")
        check("panicked" not in server.errors(), server.errors())


class SmallDisk:
    """A file system of 64 KiB; needs root."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="bitnet-disk-")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", self.folder], check=True)
        return pathlib.Path(self.folder)

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.folder], check=True)
        os.rmdir(self.folder)


def is_whole(line):
    """Whether a line is JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


async def full_disk(bitnet):
    """With a full disk requests are answered; the log says so, and goes on when there is room, with whole lines."""
    if os.geteuid() != 0:
        print("   full_disk: LEFT OUT, it needs root")
        return
    with SmallDisk() as disk:
        audit, stats = disk / "audit", disk / "stats"
        options = ["--audit-log", str(audit), "--stats-file", str(stats), "--stats-every", "1"]
        with Server(bitnet, *options) as server:
            await server.until_ready()
            filler = disk / "filler"
            filler.write_bytes(bytes(32 << 10))
            for _ in range(150):
                await asks(server)
            await asyncio.sleep(1.5)
            check("gap" in server.errors() and "old" in server.errors(), f"stderr does not tell: {server.errors()!r}")
            metrics = (await server.get("/metrics"))[1].decode()
            lost = next(line for line in metrics.splitlines() if line.startswith("bitnet_audit_lost_total"))
            check(int(lost.split()[1]) > 0, lost)
            check(server.errors().count("\n") < 20, "stderr is told of every line")
            filler.unlink()
            for _ in range(5):
                await asks(server)
            await asyncio.sleep(1.5)
            check("goes on" in server.errors(), "stderr does not tell that the log goes on")
            json.loads(stats.read_text())
            lines = audit.read_text().splitlines()
            torn = [line for line in lines if not is_whole(line)]
            check(is_whole(lines[-1]), f"the last line is {lines[-1]!r}")
            check(not any(line.endswith("}") for line in torn), f"a line goes on where another was torn: {torn}")
            check(server.end() == 0, "it ends with another status than 0")


async def no_listener(bitnet):
    """Who started it reads neither of its outputs: it serves."""
    for option in ("warn", "info"):
        reading, writing = os.pipe()
        with Server(bitnet, "--log", option, "--audit-log", "/dev/full", stderr=writing) as server:
            os.close(reading)
            os.close(writing)
            server.process.stdout.close()
            await server.until_ready()
            for _ in range(3):
                await asks(server)
            check(server.end() == 0, "it ends with another status than 0")
    port = free_port()
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([bitnet, "serve", "--port", str(port)], stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    try:
        for _ in range(100):
            check(process.poll() is None, f"without a reader of stdout it ends with {process.returncode}")
            try:
                await asyncio.open_connection("127.0.0.1", port)
                return
            except ConnectionError:
                await asyncio.sleep(0.1)
        raise Wrong("without a reader of stdout it does not listen")
    finally:
        process.kill()
        process.wait()


def free_port():
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def nowhere_to_write(bitnet):
    """Files that cannot be written are told before anything is served."""
    for option in ("--audit-log", "--stats-file"):
        for path in ("/nowhere/at/all", "/proc/x"):
            ended = subprocess.run([bitnet, "serve", "--port", "0", option, path], capture_output=True, text=True, timeout=30)
            check(ended.returncode == 1 and path in ended.stderr, f"{option} {path}: {ended.returncode} {ended.stderr!r}")


async def few_files(bitnet):
    """With too few open files for its connections it answers those it has, and all the others later."""
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    with Server(bitnet, preexec_fn=limit) as server:
        await server.until_ready()
        crowd = [await server.connect() for _ in range(100)]
        await asyncio.sleep(1)
        check(server.process.poll() is None, f"it ended: {server.errors()}")
        for _, writer in crowd:
            writer.close()
        await asks(server)
        lines = server.errors().count("\n")
        check("panicked" not in server.errors() and lines < 200, f"{lines} lines on stderr")


async def at_ipv6(bitnet):
    """It listens at ::1 as well."""
    with Server(bitnet, "--host", "::1") as server:
        await server.until_ready()
        await asks(server)


CASES = [killed_and_started_again, ended_under_load, full_disk, no_listener, nowhere_to_write, few_files, at_ipv6]


async def run(bitnet):
    """All cases."""
    for case in CASES:
        try:
            await case(bitnet)
        except (Wrong, OSError, TimeoutError, EOFError, subprocess.SubprocessError) as error:
            raise Wrong(f"{case.__name__}: {type(error).__name__}: {error}") from error
        print(f"   {case.__name__}: holds", flush=True)
