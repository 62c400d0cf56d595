"""Background work: child processes that never outlive their parent, and how long to wait before a repetition."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Called in a child: have the kernel send it a signal when its parent ends, however that ends. Linux only;
    elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


FIRST_DELAY_S = 5.0
MAX_DELAY_S = 30.0


class Backoff:
    """Runs out after ``FIRST_DELAY_S`` of silence, then after twice as long each time, ``MAX_DELAY_S`` at most.

    What is heard restores it, but not below twice the pause just waited for: on a link so slow that a chunk takes
    eight seconds, nothing is to be repeated every five.

    Args:
        now: monotonic clock, seconds.
    """

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._quiet_since = now
        self._wait_s = FIRST_DELAY_S

    def heard(self, now: float) -> None:
        """There was progress."""
        self._wait_s = min(max(FIRST_DELAY_S, 2 * (now - self._heard_at)), MAX_DELAY_S)
        self._heard_at = self._quiet_since = now

    def said(self, now: float) -> None:
        """It was said just now; wait anew."""
        self._quiet_since = now

    def is_out(self, now: float) -> bool:
        """Whether to say it again; saying so begins the next, longer wait."""
        if now - self._quiet_since < self._wait_s:
            return False
        self._quiet_since = now
        self._wait_s = min(2 * self._wait_s, MAX_DELAY_S)
        return True
