"""The findings of a check: of the doctor, and of the daemon before it runs."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeflame.masking import without_secrets

Level = Literal["ok", "note", "problem"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the doctor's report."""

    check: str
    level: Level
    """``note``: works, but not all of it, or not for long."""
    what: str
    """What was found."""
    do: str | None = None
    """The one thing to do about it."""


def ok(check: str, what: str) -> Finding:
    return Finding(check=check, level="ok", what=without_secrets(what))


def note(check: str, what: str, do: str | None = None) -> Finding:
    return Finding(check=check, level="note", what=without_secrets(what), do=do)


def problem(check: str, what: str, do: str) -> Finding:
    return Finding(check=check, level="problem", what=without_secrets(what), do=do)
