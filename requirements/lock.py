"""Writes ``requirements/ci.txt``: the versions that the tests ran with, as constraints for pip.

    .venv/bin/python requirements/lock.py      (make lock)

They hold for the Python and the machine they were taken from, and for no other: every line has a marker. Where they
hold, a new release of a dependency reaches the tests when this is run again, in a commit of its own, and not before.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
EXTRAS = ("cpu", "train", "broker", "demo", "report", "dev")
"""What `make test` installs."""


def closure() -> dict[str, str]:
    """The versions of all that is needed, by name, as they are installed here."""
    project = msgspec.toml.decode((HERE.parent / "pyproject.toml").read_bytes())["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in wanted]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed here: make .venv/.installed-dev first")
        found[name] = distribution.version
        for option in ("", *sorted(requirement.extras)):
            if (name, option) not in seen:
                seen.add((name, option))
                queue += [(Requirement(text), option) for text in distribution.requires or ()]
    return found


def main() -> None:
    """Write the file."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    marker = f'python_version == "{version}" and platform_machine == "{platform.machine()}" and sys_platform == "linux"'
    # Of a build for one kind of GPU (2.15.0+cu130) the public version is what a registry has.
    pins = [f"{name}=={re.sub(r'[+].*', '', found)} ; {marker}" for name, found in sorted(closure().items())]
    lines = ["# Made by requirements/lock.py: run `make lock`, do not edit.", *pins, ""]
    (HERE / "ci.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
