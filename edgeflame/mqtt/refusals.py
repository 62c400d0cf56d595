"""What is logged of messages that are refused: anybody who may publish can send more of them than a disk holds."""

from __future__ import annotations

from typing import final

from edgeflame.log import EventLog

REFUSALS_AT_ONCE = 20
REFUSALS_PER_S = 0.1
"""A few lines tell what is wrong."""


@final
class RefusalLog:
    """Logs refused messages at a bounded rate, and counts the others. Not thread-safe."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._lines = float(REFUSALS_AT_ONCE)
        self._counted_at: float | None = None
        self._num_left_out = 0

    def add(self, topic: str, reason: str, now: float) -> None:
        """One message was refused at ``now``, a monotonic clock's reading in seconds."""
        passed = 0.0 if self._counted_at is None else now - self._counted_at
        self._counted_at = now
        self._lines = min(REFUSALS_AT_ONCE, self._lines + passed * REFUSALS_PER_S)
        if self._lines < 1:
            self._num_left_out += 1
            return
        self._lines -= 1
        left_out = {"not_logged_before": self._num_left_out} if self._num_left_out else {}
        self._log.warning("message_refused", topic=topic[:200], reason=reason, **left_out)
        self._num_left_out = 0
