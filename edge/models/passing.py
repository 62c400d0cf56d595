"""Whether a candidate has passed its shadow run. Pure."""

from __future__ import annotations

import msgspec

from edge.models.config import ModelsConfig
from edgeflame.releases.messages import Disagreement


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a shadow run that is over."""

    passed: bool
    reason: str = ""
    detail: str = ""


class LineTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What the present model takes, and what a part may take."""

    latency_ms: float | None = None
    """95% of its parts are judged within this."""
    deadline_ms: float | None = None


def rule(found: Disagreement, *, needed: int, config: ModelsConfig, times: LineTimes) -> Ruling | None:
    """The ruling on a shadow run; None while it has to go on.

    A single failure of the model's own is one too many: on a line it is a part without a verdict. What can no longer
    pass is not tried to the end.

    Args:
        found: so far.
        needed: parts that both have to judge.
        config: the limits.
        times: of the line.
    """
    if found.faults:
        detail = f"{found.faults} of {found.parts + found.faults} parts without a score, or with one that is not finite"
        return Ruling(passed=False, reason="faults", detail=detail)
    if found.slowdown is not None and (slow := _too_slow(found.slowdown, config, times)) is not None:
        return Ruling(passed=False, reason="too_slow", detail=slow)
    allowed = config.max_disagreement * needed
    if found.differing > allowed:
        detail = (
            f"other verdicts on {found.differing} of {found.parts} parts ({found.newly_failed} newly failed, "
            f"{found.newly_passed} newly passed); of {needed} at most {int(allowed)} may differ"
        )
        return Ruling(passed=False, reason="disagreement", detail=detail)
    return Ruling(passed=True) if found.parts >= needed else None


def _too_slow(slowdown: float, config: ModelsConfig, times: LineTimes) -> str | None:
    if slowdown > config.max_slowdown:
        return f"{slowdown:.2f} times the present model's computing time; {config.max_slowdown:g} are allowed"
    if times.latency_ms is not None and times.deadline_ms is not None and slowdown > 1:
        expected_ms = times.latency_ms * slowdown
        if expected_ms > times.deadline_ms:
            return (
                f"{slowdown:.2f} times the present model's computing time would be {expected_ms:.0f} ms a part; the "
                f"deadline is {times.deadline_ms:g} ms"
            )
    return None
