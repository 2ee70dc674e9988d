#!/usr/bin/env python3
"""Asks a running `bitnet serve` what probes and Prometheus ask it, on the embedded model, and ends it as an orchestrator does.

    packaging_probes.py BITNET       run by packaging_check.sh, in its environment
"""

import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from packaging_check import DRAIN_SECONDS, OPEN_PATHS, Wrong, check, manifest, scaled_metrics

PATIENCE = 60  # seconds to load the embedded model, on a busy machine


def ask(url, key=None):
    """Status and text of a GET."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def refuses_without_keys(bitnet):
    """On all addresses and without keys it must end, as the image's own command does."""
    run = subprocess.run([bitnet, "serve", "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, timeout=PATIENCE)
    check(run.returncode not in (0, None) and "key" in run.stderr, f"serves all addresses without keys: {run.stderr}")


def main():
    """Starts the server with the keys of secret.example.yaml."""
    bitnet = sys.argv[1]
    refuses_without_keys(bitnet)
    data = manifest("secret.example.yaml", "Secret")["stringData"]
    with tempfile.TemporaryDirectory() as folder:
        keys = pathlib.Path(folder, "api-keys")
        keys.write_text(data["api-keys"])
        server = subprocess.Popen(
            [bitnet, "serve", "--host", "127.0.0.1", "--port", "0", "--api-keys", keys], stdout=subprocess.PIPE, text=True
        )
        try:
            first = server.stdout.readline()
            check(first.startswith("listening on http://127.0.0.1:"), f"first line: {first!r}")
            base = first.split()[-1]
            deadline = time.monotonic() + PATIENCE
            while (status := ask(f"{base}/ready")[0]) != 200:
                check(status == 503 and time.monotonic() < deadline, f"/ready is {status}")
                time.sleep(0.2)
            for path in OPEN_PATHS:
                check(ask(base + path)[0] == 200, f"{path} without a key is not 200")
            endpoint = manifest("servicemonitor.yaml", "ServiceMonitor")["spec"]["endpoints"][0]
            check(ask(base + endpoint["path"])[0] == 401, f"{endpoint['path']} needs no key")
            status, text = ask(base + endpoint["path"], data[endpoint["authorization"]["credentials"]["key"]])
            check(status == 200, f"{endpoint['path']} with Prometheus's key is {status}")
            missing = [name for name in scaled_metrics() if f"\n{name} " not in text and f"\n{name}{{" not in text]
            check(not missing, f"/metrics has no {', '.join(missing)}, which hpa.yaml scales on")
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(DRAIN_SECONDS + 15)
    check(status == 0, f"SIGTERM ends it with {status}, and systemd would start it again")
    print("   /health, /ready, /metrics and SIGTERM are as the files say")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
