"""Which part is the golden one: asked for by a test, answered by the line, and never a part of the production.

It is the first part whose picture was taken after the request: frames that were waiting then show what passed before.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import final

import msgspec

from edge.capture import Captured
from edge.results import Inspected


@final
class GoldenRequests:
    """Safe for any thread. A request that was given up in time marks nothing.

    Args:
        clock: monotonic, seconds; that of the frames.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[queue.SimpleQueue[Inspected]] = []
        self._since = 0.0

    def wait_for_one(self, timeout_s: float) -> Inspected | None:
        """The next part that is judged, marked as golden; None when none came in time."""
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

    def take(self, inspected: Inspected, captured: Captured) -> Inspected:
        """A part that was just judged; marked as golden if somebody waits for one.

        An outage shows no part: it is never taken for one.
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
