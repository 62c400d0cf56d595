"""How many unexpected errors a camera's loop may outlive."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import final

from edgeflame.console import EventLog
from edgeflame.errors import CrashLoopError

log = EventLog("line")

MAX_CRASHES, CRASH_WINDOW_S = 5, 600.0
"""So many unexpected errors of one camera within so long are taken for a defect that only a new start may cure."""


@final
class CrashLimit:
    """Counts the unexpected errors of one camera.

    Args:
        camera: for messages.
        clock: monotonic, seconds.
    """

    def __init__(self, camera: str, clock: Callable[[], float]) -> None:
        self._camera = camera
        self._clock = clock
        self._crashes: collections.deque[float] = collections.deque()

    def note(self, exc: Exception) -> None:
        """Note an unexpected error.

        Raises:
            CrashLoopError: it was one too many.
        """
        now = self._clock()
        self._crashes.append(now)
        while now - self._crashes[0] > CRASH_WINDOW_S:
            self._crashes.popleft()
        log.error("unexpected_error", camera=self._camera, reason=repr(exc), count=len(self._crashes))
        if len(self._crashes) > MAX_CRASHES:
            msg = (
                f"camera {self._camera}: {len(self._crashes)} unexpected errors within {CRASH_WINDOW_S:g} s, the last "
                f"{exc!r}; the daemon has to be started again"
            )
            raise CrashLoopError(msg) from exc
