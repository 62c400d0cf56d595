"""Prints a lock's lines for one machine, without markers; wheelhouse.sh downloads what they say.

    lock_for.py deploy/locks/line.txt [--python-version 3.10] [--platform manylinux_2_28_aarch64]

pip decides markers by the Python that runs it, also where it downloads for another. The two options are pip's; without
them the machine is this one. Other options of pip are passed over.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

# There wherever pip is, which is all that a machine without EdgeFlame has.
from pip._vendor.packaging.requirements import Requirement


def environment(python_version: str | None, platforms: list[str]) -> dict[str, str]:
    """What markers are decided by, where it is not what this Python is itself (PEP 508's names)."""
    found = {}
    if python_version is not None:
        # As pip takes it: 3.10, 310 or 3.10.2.
        parts = python_version.split(".") if "." in python_version else [python_version[:1], python_version[1:] or "0"]
        found["python_version"] = ".".join(parts[:2])
        found["python_full_version"] = ".".join([*parts, "0"][:3])
    if platforms:
        found["sys_platform"] = "linux"
        found["platform_machine"] = re.sub(r"^(manylinux_\d+_\d+|manylinux\d+|linux)_", "", platforms[0])
    return found


def lines_for(lock: str, target: dict[str, str]) -> list[str]:
    """The lines of a lock's text that hold for a target, each with all its hashes."""
    found = []
    for line in lock.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            words, *hashes = line.split(" --hash=")
            requirement = Requirement(words.strip())
            if requirement.marker is None or requirement.marker.evaluate(target):
                pin = f"{requirement.name}{requirement.specifier}"
                found.append(" ".join([pin, *(f"--hash={value.strip()}" for value in hashes)]))
    return found


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("lock", type=Path)
    parser.add_argument("--python-version")
    parser.add_argument("--platform", action="append", default=[])
    options, _ = parser.parse_known_args()
    target = environment(options.python_version, options.platform)
    sys.stdout.write("\n".join(lines_for(options.lock.read_text(encoding="utf-8"), target)) + "\n")


if __name__ == "__main__":
    main()
