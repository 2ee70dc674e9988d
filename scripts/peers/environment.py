"""The peers, the versions they are pinned to, and the virtual environment they live in."""

import json
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

from . import models


@dataclass(frozen=True)
class Peer:
    """One row of the table: a key of engines.ENGINES with a kind of models.KINDS."""

    engine: str
    kind: str
    packages: tuple
    head: str  # how the tied embedding and head are stored
    default: bool = True


TORCH = ("torch", "transformers", "accelerate")

PEERS = {
    "llama.cpp-tq2_0": Peer("llama.cpp", "tq2_0", ("llama-cpp-python",), "q6_K"),
    "llama.cpp-tq1_0": Peer("llama.cpp", "tq1_0", ("llama-cpp-python",), "q6_K"),
    "transformers": Peer("transformers", "packed", TORCH, "bf16"),
    "transformers-bf16": Peer("transformers", "latent", TORCH, "bf16", default=False),
    "litespark": Peer("litespark", "latent", ("litespark-inference",), "int4"),
}

# What every model file but the packed one is made with.
TOOLS = ("numpy", "gguf")

PINS = {
    "numpy": "2.4.6",
    "gguf": "0.19.0",
    "llama-cpp-python": "0.3.36",
    "torch": "2.15.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "litespark-inference": "1.0.3",
}

VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-peers"


def python(folder):
    return folder / "bin" / "python"


def installed(folder):
    """Package -> version of those among PINS that the environment has."""
    if not python(folder).exists():
        return {}
    output = subprocess.run([python(folder), "-c", VERSIONS, *PINS], check=True, capture_output=True, text=True)
    return json.loads(output.stdout)


def install(folder, engines):
    """Creates the environment where there is none and installs what these peers need, at the pinned versions."""
    if not python(folder).exists():
        venv.create(folder, with_pip=True)
    wanted = dict.fromkeys([*TOOLS, *(name for engine in engines for name in PEERS[engine].packages)])
    # llama-cpp-python comes as source: compile it for this processor, as a user who wants speed would.
    native = os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")
    subprocess.run([python(folder), "-m", "pip", "install", *(f"{name}=={PINS[name]}" for name in wanted)],
                   check=True, env=os.environ | {"CMAKE_ARGS": native})


def missing(engine, versions):
    """Packages a peer lacks."""
    return [name for name in (*TOOLS, *PEERS[engine].packages) if name not in versions]


def make_model(folder, kind, cache):
    """The path of a kind of the model, written when it is not there."""
    path = models.model_path(cache, kind)
    if not path.exists():
        subprocess.run([python(folder), models.__file__, kind, cache], check=True)
    return path
