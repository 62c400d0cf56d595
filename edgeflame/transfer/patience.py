"""How long to wait before saying something again. No clock."""

from __future__ import annotations

FIRST_S = 5.0
LONGEST_S = 30.0


class Patience:
    """Runs out after ``FIRST_S`` of silence, then after twice as long each time, ``LONGEST_S`` at most.

    What is heard restores it, but not below twice the pause just waited for: on a link so slow that a chunk takes
    eight seconds, nothing is to be repeated every five.

    Args:
        now: monotonic clock, seconds.
    """

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._quiet_since = now
        self._wait_s = FIRST_S

    def heard(self, now: float) -> None:
        """There was progress."""
        self._wait_s = min(max(FIRST_S, 2 * (now - self._heard_at)), LONGEST_S)
        self._heard_at = self._quiet_since = now

    def said(self, now: float) -> None:
        """It was said just now; wait anew."""
        self._quiet_since = now

    def is_out(self, now: float) -> bool:
        """Whether to say it again; saying so begins the next, longer wait."""
        if now - self._quiet_since < self._wait_s:
            return False
        self._quiet_since = now
        self._wait_s = min(2 * self._wait_s, LONGEST_S)
        return True
