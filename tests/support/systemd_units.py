"""Our systemd units as tests read them, and their command lines as systemd would run them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.paths import REPOSITORY

SYSTEMD = REPOSITORY / "deploy" / "systemd"
EXAMPLES = REPOSITORY / "deploy" / "examples"
LAUNCHER = "/opt/edgeflame/edgeflame"
SERVICES = ("edgeflame-aggregate.service", "edgeflame-train@.service", "edgeflame-inspect@.service")


def settings(name: str) -> dict[str, list[str]]:
    """A unit's settings, each with its values in order; sections do not share names here."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def environment_file(path: Path) -> dict[str, str]:
    """As ``EnvironmentFile=`` reads it."""
    lines = (line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {key: value for key, _, value in lines}


def command_line(name: str, instance: str, environment: Mapping[str, str], places: Mapping[str, Path]) -> list[str]:
    """The arguments of a unit's ``ExecStart`` after the launcher.

    Args:
        name: of the unit.
        instance: what stands for ``%i``.
        environment: for ``${NAME}``, one argument, and ``$NAME``, as many as it has words (``systemd.service(5)``).
        places: for each folder of an installed system, another that stands in its place.
    """
    (line,) = settings(name)["ExecStart"]
    launcher, *words = line.split()
    assert launcher == LAUNCHER
    return list(_expanded(words, instance, environment, places))


def _expanded(
    words: list[str], instance: str, environment: Mapping[str, str], places: Mapping[str, Path]
) -> Iterator[str]:
    for word in words:
        if word.startswith("$") and not word.startswith("${"):
            yield from shlex.split(environment.get(word[1:], ""))
            continue
        text = word.replace("%i", instance)
        for key, value in environment.items():
            text = text.replace(f"${{{key}}}", value)
        assert "$" not in text, text
        for place, other in places.items():
            if text.startswith(f"{place}/"):
                text = str(other / text[len(place) + 1 :])
        yield text
