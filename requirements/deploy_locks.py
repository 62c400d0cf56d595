"""Writes ``deploy/locks``: all that a machine or an image of a role installs, each file of it by its hash.

    .venv/bin/python requirements/deploy_locks.py      (make lock)

uv resolves each lock for every Python from 3.10 on and for all processors at once; markers tell the cases apart. What
the tests ran with (``ci.txt``) is taken wherever it fits. All locks agree in their versions, so that a machine can have
several roles.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = REPOSITORY / "deploy" / "locks"
ROLES = [("aggregator", "cpu"), ("site", "cpu"), ("site", "gpu"), ("line", "cpu"), ("line", "gpu")]
BUILD = "setuptools>=77"
"""What makes EdgeFlame's own wheel in an image, apart from what is installed there."""
# A line's images have more: TensorRT-RTX, or what a Jetson with JetPack 6 builds engines with.
IMAGES = {"line-rtx": ("gpu", ",rtx", []), "line-jetpack6": ("cpu", "", ["cuda-bindings>=12.6,<13", "onnx>=1.16"])}


def shell(function: str, *arguments: str) -> str:
    """What a function of ``deploy/roles.sh`` says."""
    script = f'. "$1"; shift; {function} "$@"'
    roles = REPOSITORY / "deploy" / "roles.sh"
    command = ["sh", "-c", script, "sh", str(roles), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wanted() -> dict[str, list[str]]:
    """What each lock is made of, by its file's name: arguments for pip, as ``.[extras]`` and requirements."""
    found = {shell("lock_of", role, runtime): [f".[{shell('extras_of', role, runtime)}]"] for role, runtime in ROLES}
    for name, (runtime, extras, more) in IMAGES.items():
        found[f"{name}.txt"] = [f".[{shell('extras_of', 'line', runtime)}{extras}]", *more]
    found["build.txt"] = [BUILD]
    return found


def resolve(requirements: list[str], out: Path, *options: str) -> None:
    """Have uv write the lock of these requirements; versions that ``out`` has already are kept where they fit.

    Exits with uv's code if they cannot be had together.
    """
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10",
        "--no-header", "--no-annotate", "--no-emit-package", "edgeflame", *options, "--output-file", str(out), "-",
    ]  # fmt: skip
    done = subprocess.run(command, input="\n".join(requirements), text=True, cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def main() -> None:
    """Write the files."""
    LOCKS.mkdir(exist_ok=True)
    tested = [line.partition(" ;")[0] for line in (REPOSITORY / "requirements" / "ci.txt").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        # Of what one lock alone holds back (cuda-bindings of JetPack 6) the others take the newest.
        common = Path(folder) / "all.txt"
        common.write_text("\n".join(tested) + "\n")
        locks = wanted()
        jetson = locks.pop("line-jetpack6.txt")
        resolve([text for texts in locks.values() for text in texts], common)
        for name, texts in {**locks, "line-jetpack6.txt": jetson}.items():
            made = Path(folder) / name
            made.write_text(common.read_text())
            resolve(texts, made, "--generate-hashes")
            head = "# Made by requirements/deploy_locks.py: run `make lock`, do not edit.\n"
            (LOCKS / name).write_text(head + made.read_text())


if __name__ == "__main__":
    main()
