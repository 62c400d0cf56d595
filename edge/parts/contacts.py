"""From what a PLC's coil or counter reads, poll after poll, to parts. Pure.

A poll sees a state, not events: what happened between two polls is told only by a counter. A part noticed more than one
poll and one window after the poll before may be out of the camera's sight already, and which image is its own cannot be
told: it is announced with a fault, and gets ``unknown``.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.parts.identity import Wrap


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """A part noticed by a poll."""

    number: int | None
    """The counter's; None for a contact."""
    fault: str | None = None
    """Why its time is not known."""


class Contact:
    """A coil or input whose rising edge is one part.

    Args:
        max_interval_s: between two polls, so that the time of an edge is known well enough.
    """

    def __init__(self, max_interval_s: float) -> None:
        self._max_interval_s = max_interval_s
        self._level: bool | None = None
        self._polled_s = 0.0

    def poll(self, level: bool, now: float) -> Noticed | None:
        """One answer; the first only says where it stands."""
        before, interval_s = self._level, now - self._polled_s
        self._level, self._polled_s = level, now
        if before is None or before or not level:
            return None
        return Noticed(number=None, fault=_fault(interval_s, self._max_interval_s))


class Counter:
    """A register that counts parts.

    Args:
        wrap: its numbers; a value outside them, such as 0 where it counts from 1, is no part.
        max_gap: a jump by more, or back, is a counter that was set anew.
        max_interval_s: as in :class:`Contact`.
    """

    def __init__(self, wrap: Wrap, max_gap: int, max_interval_s: float) -> None:
        self._wrap = wrap
        self._max_gap = max_gap
        self._max_interval_s = max_interval_s
        self._value: int | None = None
        self._polled_s = 0.0

    def poll(self, value: int, now: float) -> Noticed | None:
        """One answer; the first only says where it stands."""
        before, interval_s = self._value, now - self._polled_s
        self._value, self._polled_s = value, now
        if before is None or value == before or not self._is_number(value):
            return None
        fault = _fault(interval_s, self._max_interval_s)
        # From where no part was, as after a reset to 0, any first number is a beginning.
        if self._is_number(before) and (value - before) % self._wrap.size > self._max_gap:
            fault = f"the counter went from {before} to {value}; it may have been set anew, and announce no part"
        return Noticed(number=value, fault=fault)

    def _is_number(self, value: int) -> bool:
        return self._wrap.first <= value <= self._wrap.last


def _fault(interval_s: float, max_interval_s: float) -> str | None:
    if interval_s <= max_interval_s:
        return None
    return f"it came while the PLC could not be asked for {interval_s:.2g} s; when, is not known"
