"""Capture ahead of scoring: a thread reads the source into a short queue, so that reading hides behind scoring."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

import msgspec

from edge.sources import Frame, Source
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError

log = EventLog("capture")

SUPERSEDED = "superseded"
"""Why a live frame was dropped: a newer one came before it was looked at."""

_POLL_S = 0.2
"""How often a waiting reader looks whether it should stop; a frame wakes it at once."""

_STOP_TIMEOUT_S = 3.0
"""How long a stop waits for the source; a camera's driver may hang for ever."""


class CaptureConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[capture]``."""

    policy: Literal["auto", "wait", "latest"] = "auto"
    """When scoring is slower than the source: ``wait`` holds the source back, ``latest`` drops the oldest frame
    and counts it. ``auto``: ``latest`` for cameras and streams, ``wait`` for files."""
    depth: int = 2
    """Frames held ready."""

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 64:
            msg = f"capture.depth must be 1..64, not {self.depth}"
            raise ConfigError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ahead:
    """What is being found out about a frame ahead of its turn; see :mod:`edge.lanes`."""

    looker: object
    """Who looks."""
    found: Future[Any]
    """What it finds, or raises."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """A frame and its place in the order of capture; a gap in the numbers is a dropped frame."""

    sequence: int
    frame: Frame
    ahead: Ahead | None = None


class Capture:
    """Iterates over a source's frames while a thread reads ahead. A context manager: leaving it ends the thread.

    A file waits for us, so under the policy ``wait`` its monotonic time is that of its hand-over, not of its wait in
    the queue; a camera's frame was captured when it was captured.
    """

    def __init__(self, source: Source, config: CaptureConfig, stop: threading.Event) -> None:
        self._source = source
        self._drop_oldest = config.policy == "latest" or (config.policy == "auto" and source.is_live)
        self._depth = config.depth
        self._stop = stop
        self._changed = threading.Condition()
        self._queue: collections.deque[Captured] = collections.deque()
        self._ended = False
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self.dropped: collections.Counter[str] = collections.Counter()
        self._thread = threading.Thread(target=self._read, name="edgeflame-capture", daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("source_does_not_stop", source=self._source.name, waited_s=_STOP_TIMEOUT_S)

    def __iter__(self) -> Iterator[Captured]:
        """Frames in order until the source ends or the stop event is set.

        Raises:
            EdgeFlameError: what the source raised.
        """
        while (captured := self._next()) is not None:
            if not self._drop_oldest and not self._source.is_live:
                frame = dataclasses.replace(captured.frame, captured_monotonic_s=time.monotonic())
                captured = dataclasses.replace(captured, frame=frame)
            yield captured

    def unread(self) -> list[Captured]:
        """After the end: frames that came and were not taken, in order."""
        with self._changed:
            return list(self._queue)

    def _next(self) -> Captured | None:
        with self._changed:
            while not self._queue:
                if self._stop.is_set() or self._closed.is_set():
                    return None
                if self._ended:
                    if self._failure is not None:
                        raise self._failure
                    return None
                self._changed.wait(_POLL_S)
            if self._stop.is_set():
                return None
            captured = self._queue.popleft()
            self._changed.notify_all()
            return captured

    def _read(self) -> None:
        try:
            sequence = 0
            for frame in self._source.frames(self._closed):
                self.dropped.update(frame.missed)
                sequence += sum(frame.missed.values())
                if not self._put(Captured(sequence=sequence, frame=frame)):
                    return
                sequence += 1
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the reader raises it
            self._failure = exc
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, captured: Captured) -> bool:
        with self._changed:
            while len(self._queue) >= self._depth and not self._closed.is_set():
                if self._drop_oldest:
                    self._queue.popleft()
                    self.dropped[SUPERSEDED] += 1
                else:
                    self._changed.wait()
            self._queue.append(captured)
            self._changed.notify_all()
            return not self._closed.is_set()
