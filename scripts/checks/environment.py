"""A virtual environment outside the repository, in which a script goes on."""

import os
import subprocess
import sys
import venv
from pathlib import Path


def enter(variable, name, packages):
    """Runs the script again in the environment that `variable` names, or ~/.cache/NAME, made with `packages` if it is not there.
    To be called where one of them cannot be imported."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    environment = Path(os.environ.get(variable, home / name))
    python = environment / "bin" / "python"
    if Path(sys.prefix) == environment:
        sys.exit(f"{environment}: lacks one of {', '.join(packages)}: delete it and start again")
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    os.execv(python, [str(python), *sys.argv])
