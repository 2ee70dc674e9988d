#!/usr/bin/env python3
"""Copies what `docker build` would send: the tracked and new files of the working tree that .dockerignore lets through.

    packaging_context.py FOLDER
"""

import fnmatch
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def sent(path, patterns):
    """Whether the last pattern that matches the path, or a folder above it, begins with `!`."""
    above = [path, *(str(parent) for parent in pathlib.PurePosixPath(path).parents if str(parent) != ".")]
    keep = True
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        # `**/` is any number of folders; without it a pattern is of the root, and `*` does not cross folders.
        names = [name.rsplit("/", 1)[-1] for name in above] if "**/" in pattern else above
        if any(fnmatch.fnmatchcase(name, bare) and name.count("/") == bare.count("/") for name in names):
            keep = pattern.startswith("!")
    return keep


def main():
    """Copies, and fails if a file that must not leave is among them."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    target = pathlib.Path(sys.argv[1])
    for path in sorted(filter(None, listed.split("\0"))):
        if path.startswith("target/") or not sent(path, patterns) or not (ROOT / path).is_file():
            continue
        if path.startswith(("packaging/", "tests/fixtures/", "runs/")) or path.endswith(("api-keys", "metrics-key")):
            sys.exit(f"   .dockerignore lets {path} into the image's build")
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target / path)


if __name__ == "__main__":
    main()
