"""Capture ahead of scoring: a thread reads the source into a short queue, so that reading hides behind scoring.

Prefetching
-----------
Several frames are observed at the same time, and handed on one after the other in the order of capture.

One image keeps two cores less busy than two images do: between a graph's operators the cores wait for each other. So
when parts come faster than they are inspected, each core observes a frame of its own.

    Capture ──> prefetch thread ──┐
            └─> prefetch thread ──┴─> in the order of capture ──> camera worker ──> verdict, sinks

A prefetch thread that is free takes the next frame from the capture and observes it ahead of its turn: crop, resize,
image health, score. Whatever depends on the order of parts, and the verdict, is left to the camera worker. The capture
may still drop a frame that no thread has taken. If another inspector has been put in place meanwhile, it makes its own
observation of the frame.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import final

from edge.config.inspection import CaptureConfig
from edge.frame import Captured, Prefetched, Source
from edge.inspector import FrameObserver
from edgeflame.background import BackgroundThread
from edgeflame.log import EventLog

log = EventLog("capture")

SUPERSEDED = "superseded"
"""Why a live frame was dropped: a newer one came before its turn."""

_POLL_S = 0.2
"""How often a waiting reader checks whether it should stop, seconds; a frame wakes it at once."""

_STOP_TIMEOUT_S = 3.0
"""How long a stop waits for the source, seconds; a camera's driver may hang for ever."""


class Capture:
    """Iterates over a source's frames while a thread reads ahead. A context manager: leaving it ends the thread.

    A file waits for us, so with the policy ``wait`` its monotonic time is set when it leaves the queue; a live source's
    frames keep their time of capture.

    Args:
        source: the image source.
        config: how frames are queued.
        stop: ends the iteration.
        first: sequence number of the first frame.
    """

    def __init__(self, source: Source, config: CaptureConfig, stop: threading.Event, *, first: int = 0) -> None:
        self._source = source
        self._drop_oldest = config.policy == "latest" or (config.policy == "auto" and source.is_live)
        self._depth = config.depth
        self._stop = stop
        self._first = first
        self._changed = threading.Condition()
        self._queue: collections.deque[Captured] = collections.deque()
        self._ended = False
        self._failure: BaseException | None = None
        self.dropped: collections.Counter[str] = collections.Counter()
        self._thread = BackgroundThread("capture", self._read, wake=self._notify, join_s=_STOP_TIMEOUT_S)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._thread.close():
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
        """After the end: frames that were captured and not yielded, in order."""
        with self._changed:
            return list(self._queue)

    def _next(self) -> Captured | None:
        with self._changed:
            while not self._queue:
                if self._stop.is_set() or self._thread.stop.is_set():
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

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _read(self, closed: threading.Event) -> None:
        try:
            sequence = self._first
            for frame in self._source.frames(closed):
                self.dropped.update(frame.missed)
                sequence += sum(frame.missed.values())
                named = frame if frame.part_id else dataclasses.replace(frame, part_id=f"frame-{sequence:06d}")
                if not self._put(Captured(sequence=sequence, frame=named)):
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
            while len(self._queue) >= self._depth and not self._thread.stop.is_set():
                if self._drop_oldest:
                    self._queue.popleft()
                    self.dropped[SUPERSEDED] += 1
                else:
                    self._changed.wait()
            self._queue.append(captured)
            self._changed.notify_all()
            return not self._thread.stop.is_set()


pool_log = EventLog("line")


@final
class PrefetchPool:
    """Iterates over frames in the order of capture, each observed ahead of its turn.

    A context manager that opens and closes the capture and owns the threads.

    Args:
        capture: the frames.
        observer: called before each frame, returns its observer; None: the frame is not observed ahead of its turn.
        stop: ends the iteration; the capture's stop event.
        count: number of frames observed at the same time, at least 1.
    """

    def __init__(
        self, capture: Capture, observer: Callable[[], FrameObserver | None], stop: threading.Event, *, count: int
    ) -> None:
        self._capture = capture
        self._observer = observer
        self._stop = stop
        self._unread: list[Captured] = []
        self._frames = iter(capture)
        self._taking = threading.Lock()
        # Two frames for each thread, one in work and one that waits for its turn: no thread idles meanwhile.
        self._places = threading.Semaphore(2 * count)
        self._taken: queue.SimpleQueue[Captured | BaseException | None] = queue.SimpleQueue()
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._run, name=f"edgeflame-prefetch-{number}", daemon=True)
            for number in range(count)
        ]

    def __enter__(self) -> PrefetchPool:
        self._capture.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._places.release(len(self._threads))
        self._capture.__exit__(kind, value, traceback)
        until = time.monotonic() + _STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                pool_log.warning("prefetch_does_not_stop", waited_s=_STOP_TIMEOUT_S)

    def __iter__(self) -> Iterator[Captured]:
        """Frames in order, until the source ends or the stop event is set.

        Raises:
            EdgeFlameError: what the source raised.
        """
        while (item := self._taken.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if self._stop.is_set():
                self._unread.append(item)
                return
            yield item
            self._places.release()

    def unread(self) -> list[Captured]:
        """After the end: frames that were captured and not yielded, in order."""
        while not self._taken.empty():
            item = self._taken.get()
            if isinstance(item, Captured):
                self._unread.append(item)
        return [*self._unread, *self._capture.unread()]

    def _run(self) -> None:
        while True:
            self._places.acquire()
            with self._taking:
                taken = self._next_frame()
            if taken is None:
                return
            captured, observer = taken
            if captured.prefetched is None or observer is None:
                continue
            try:
                captured.prefetched.found.set_result(observer.observe(captured))
            except BaseException as exc:  # noqa: BLE001 - raised where the frame's turn comes
                captured.prefetched.found.set_exception(exc)

    def _next_frame(self) -> tuple[Captured, FrameObserver | None] | None:
        """The next frame, in its place in the order; None at the end."""
        if self._is_over:
            return None
        try:
            captured = next(self._frames)
        except StopIteration:
            self._end(None)
            return None
        except BaseException as exc:  # noqa: BLE001 - raised after the frames before it
            self._end(exc)
            return None
        observer = self._observer()
        if observer is not None:
            captured = dataclasses.replace(captured, prefetched=Prefetched(observer=observer, found=Future()))
        self._taken.put(captured)
        return captured, observer

    def _end(self, failure: BaseException | None) -> None:
        self._is_over = True
        self._taken.put(failure)
        # The other threads wait for a frame, or for a place.
        self._places.release(len(self._threads))
