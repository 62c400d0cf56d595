"""Whose turn it is: the loop's, frame after frame, or that of somebody who wants to change something between two."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import final

from edgeflame.errors import RuntimeUnavailableError

PATIENCE_S = 5.0
"""How long a change waits for the frame in hand; a judge that takes longer hangs."""


@final
class Turn:
    """A lock with a *door* before it: whoever wants a change waits behind one frame, however fast frames follow.

    Args:
        camera: for messages.
    """

    def __init__(self, camera: str) -> None:
        self._camera = camera
        self._door, self._lock = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """While a frame is judged."""
        with self._door:
            pass
        with self._lock:
            yield

    @contextlib.contextmanager
    def between_frames(self) -> Iterator[None]:
        """While something is changed.

        Raises:
            RuntimeUnavailableError: the frame in hand does not come to an end.
        """
        with self._door:
            if not self._lock.acquire(timeout=PATIENCE_S):
                msg = f"camera {self._camera}: the part in hand has been judged for more than {PATIENCE_S:g} s"
                raise RuntimeUnavailableError(msg)
            try:
                yield
            finally:
                self._lock.release()
