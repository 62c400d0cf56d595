"""What other threads ask of a camera's loop, and the bound on its own errors.

A change waits for the frame in hand (:class:`FrameLock`); the next part can be asked for as a golden one
(:class:`GoldenRequests`); unexpected errors are counted (:class:`RestartBudget`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import final

import msgspec

from edge.frame import Captured
from edge.result import Inspected
from edgeflame.errors import CrashLoopError, RuntimeUnavailableError
from edgeflame.log import EventLog

log = EventLog("line")

PATIENCE_S = 5.0
"""How long a change waits for the frame being inspected, seconds; a model that takes longer hangs."""


@final
class FrameLock:
    """A lock with a *door* before it: a change waits for one frame at most, however fast frames follow each other.

    Args:
        camera: for messages.
    """

    def __init__(self, camera: str) -> None:
        self._camera = camera
        self._door, self._lock = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def hold_frame(self) -> Iterator[None]:
        """Held while a frame is inspected."""
        with self._door:
            pass
        with self._lock:
            yield

    @contextlib.contextmanager
    def between_frames(self) -> Iterator[None]:
        """Held while something is changed.

        Raises:
            RuntimeUnavailableError: the frame in hand does not come to an end.
        """
        with self._door:
            if not self._lock.acquire(timeout=PATIENCE_S):
                raise RuntimeUnavailableError(
                    f"camera {self._camera}: the part in hand has been judged for more than {PATIENCE_S:g} s"
                )
            try:
                yield
            finally:
                self._lock.release()


MAX_CRASHES, CRASH_WINDOW_S = 5, 600.0
"""More unexpected errors of one camera than this, within this time (seconds), end the daemon for a new start."""


@final
class RestartBudget:
    """Counts the unexpected errors of one camera.

    Args:
        camera: for messages.
        clock: monotonic, seconds.
    """

    def __init__(self, camera: str, clock: Callable[[], float]) -> None:
        self._camera = camera
        self._clock = clock
        self._crashes: collections.deque[float] = collections.deque()

    def record(self, exc: Exception) -> None:
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
            raise CrashLoopError(
                f"camera {self._camera}: {len(self._crashes)} unexpected errors within {CRASH_WINDOW_S:g} s, the last "
                f"{exc!r}; the daemon has to be started again"
            ) from exc


@final
class GoldenRequests:
    """Requests to mark the next part as golden; thread-safe. A request that has timed out marks nothing.

    Args:
        clock: monotonic, seconds; the clock of the frames.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[queue.SimpleQueue[Inspected]] = []
        self._since = 0.0

    def wait_for_one(self, timeout_s: float) -> Inspected | None:
        """The next inspected part, marked as golden; None if none came in time."""
        answer: queue.SimpleQueue[Inspected] = queue.SimpleQueue()
        with self._lock:
            self._since = self._clock()
            self._waiting.append(answer)
        try:
            return answer.get(timeout=timeout_s)
        except queue.Empty:
            with self._lock:
                if answer in self._waiting:
                    self._waiting.remove(answer)
                    return None
            # It came at the last moment, and is marked.
            return answer.get()

    def mark_if_golden(self, inspected: Inspected, captured: Captured) -> Inspected:
        """The part that was just inspected, marked as golden if a request waits.

        An outage shows no part and is never marked.
        """
        with self._lock:
            frame = captured.frame
            if not self._waiting or frame.image_bgr is None or frame.captured_monotonic_s < self._since:
                return inspected
            waiting, self._waiting = self._waiting, []
        marked = dataclasses.replace(inspected, result=msgspec.structs.replace(inspected.result, golden=True))
        for answer in waiting:
            answer.put(marked)
        return marked
