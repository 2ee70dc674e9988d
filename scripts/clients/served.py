"""A `bitnet serve` for clients to ask, and what the command line says to the same, to compare answers with."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

PATIENCE = 60  # seconds to load the embedded model, and for what ends soon, on a busy machine


class Wrong(Exception):
    """Something is not as it must be."""


def check(truth, message):
    """`message` is what is wrong if this is not true."""
    if not truth:
        raise Wrong(message)


def equal(name, found, expected):
    """Both must be the same."""
    check(found == expected, f"{name}:\n      found    {found!r}\n      expected {expected!r}")


def get(url):
    """Status and text of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait(for_what, is_so):
    """Until it is so, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        check(time.monotonic() < deadline, f"{for_what}: not so after {PATIENCE} s")
        time.sleep(0.05)


@contextlib.contextmanager
def serving(bitnet, *flags, keys=None):
    """The address of a server, ready, which must end well at the end. It serves the embedded model unless the flags say otherwise."""
    environment = {**os.environ, "BITNET_API_KEYS": keys} if keys else None
    command = [bitnet, "serve", "--quiet", "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        first = server.stdout.readline()
        check(first.startswith("listening on http://127.0.0.1:"), f"{' '.join(command)}: its first line is {first!r}")
        base = first.split()[-1]
        wait(f"{base}/ready", lambda: get(f"{base}/ready")[0] == 200)
        yield base
    except BaseException:
        server.kill()
        raise
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(PATIENCE)
    equal("status of the server's end", status, 0)


def statistics(base):
    """What /stats says."""
    return json.loads(get(f"{base}/stats")[1])


def idle(base):
    """Waits until no text is continued."""
    wait("running texts are 0", lambda: statistics(base)["engine"]["running"] == 0)


def generated(bitnet, prompt, new_tokens, *flags):
    """The continuation of a text, or of token ids, by `bitnet generate`: an object with `text`, `tokens` and more."""
    prompt = [prompt] if isinstance(prompt, str) else ["--tokens", ",".join(map(str, prompt))]
    command = [bitnet, "generate", "--quiet", "--json", "--max-new-tokens", str(new_tokens), *flags, *prompt]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def replied(bitnet, message, new_tokens, *flags):
    """The greedy reply to a message, by `bitnet chat`."""
    with tempfile.TemporaryDirectory() as folder:
        saved = pathlib.Path(folder, "chat.json")
        command = [bitnet, "chat", "--quiet", "--no-history", "--temperature", "0", "-n", str(new_tokens), *flags]
        subprocess.run(command, input=f"{message}\n/save {saved}\n", check=True, capture_output=True, text=True)
        return json.loads(saved.read_text())[-1]["content"]
