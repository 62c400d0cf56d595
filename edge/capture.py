"""Capture ahead of scoring: a thread reads the source into a short queue, so that reading hides behind scoring.

Prefetching
-----------
Frames are observed ahead of their turn (crop, resize, image health, score) and handed on one after the other in the
order of capture. Whatever depends on the order of parts, and the verdict, is left to the camera worker.

    Capture ──> prefetch thread ──┐
            └─> its helpers ──────┴─> in the order of capture ──> camera worker ──> verdict, sinks

One frame has its verdict soonest if all cores work on it. But between a graph's operators they wait for each other, so
that several frames side by side, each on a core of its own, are done sooner than one after the other. So one thread
takes the frames, and the others help it once frames come faster than it takes them: from a full queue on, until the
queue has been empty.

The capture may drop a frame that no thread has taken. If another inspector has been put in place meanwhile, it makes
its own observation of the frame.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, final

from edge.config.inspection import CaptureConfig
from edge.frame import Captured, Prefetched, Source
from edge.inspector import FrameObserver
from edge.result import Hop
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
        self._is_behind = False
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
            yield captured

    @property
    def is_behind(self) -> bool:
        """Whether frames come faster than they are taken: the queue was full, and has not been empty since."""
        return self._is_behind

    def wait_behind(self) -> bool:
        """Wait until frames come faster than they are taken; False if that cannot happen any more."""
        with self._changed:
            while not (self._is_behind and self._queue):
                if self._stop.is_set() or self._thread.stop.is_set() or self._ended:
                    return False
                self._changed.wait(_POLL_S)
            return True

    def next_if_behind(self) -> Captured | None:
        """The next frame at once; None if frames do not come faster than they are taken."""
        with self._changed:
            return self._take() if self._is_behind and self._queue and not self._stop.is_set() else None

    def unread(self) -> list[Captured]:
        """After the end: frames that were captured and not yielded, in order."""
        with self._changed:
            return list(self._queue)

    def _next(self) -> Captured | None:
        with self._changed:
            while not self._queue:
                self._is_behind = False
                if self._stop.is_set() or self._thread.stop.is_set():
                    return None
                if self._ended:
                    if self._failure is not None:
                        raise self._failure
                    return None
                self._changed.wait(_POLL_S)
            return None if self._stop.is_set() else self._take()

    def _take(self) -> Captured:
        captured = self._queue.popleft()
        captured.frame.passes(Hop.TAKEN)
        self._changed.notify_all()
        if self._drop_oldest or self._source.is_live:
            return captured
        frame = dataclasses.replace(captured.frame, captured_monotonic_s=time.monotonic())
        return dataclasses.replace(captured, frame=frame)

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
            captured.frame.passes(Hop.QUEUED)
            self._queue.append(captured)
            self._is_behind = self._is_behind or len(self._queue) >= self._depth
            self._changed.notify_all()
            return not self._thread.stop.is_set()


pool_log = EventLog("line")


class _Taken(NamedTuple):
    """A frame that a thread has taken to observe it."""

    captured: Captured
    observer: FrameObserver
    found: Future[Any]
    """Where the observation belongs."""
    beside_others: bool


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
        self._threads = [BackgroundThread(f"prefetch-{number}", partial(self._run, number)) for number in range(count)]

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
            if not thread.close(until - time.monotonic()):
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

    def _run(self, number: int, _: threading.Event) -> None:
        while True:
            self._places.acquire()
            taken = self._next_frame() if number == 0 else self._next_frame_if_behind()
            if taken is None:
                return
            captured, observer, found, beside_others = taken
            try:
                found.set_result(observer.observe(captured, beside_others=beside_others))
            except BaseException as exc:  # noqa: BLE001 - raised where the frame's turn comes
                found.set_exception(exc)

    def _next_frame(self) -> _Taken | None:
        """The next frame to observe; None at the end."""
        while not self._is_over:
            with self._taking:
                try:
                    captured = next(self._frames)
                except StopIteration:
                    self._end(None)
                    return None
                except BaseException as exc:  # noqa: BLE001 - raised after the frames before it
                    self._end(exc)
                    return None
                taken = self._hand_on(captured, beside_others=self._capture.is_behind)
            if taken is not None:
                return taken
            self._places.acquire()
        return None

    def _next_frame_if_behind(self) -> _Taken | None:
        """The next frame to observe beside others, once there is need for that; None at the end."""
        while not self._is_over and self._capture.wait_behind():
            with self._taking:
                captured = self._capture.next_if_behind()
                taken = None if captured is None else self._hand_on(captured, beside_others=True)
            if taken is not None:
                return taken
            if captured is not None:
                self._places.acquire()
        return None

    def _hand_on(self, captured: Captured, *, beside_others: bool) -> _Taken | None:
        """Put a frame in its place in the order; None if nothing observes it."""
        observer = self._observer()
        if observer is None:
            self._taken.put(captured)
            return None
        found: Future[Any] = Future()
        self._taken.put(dataclasses.replace(captured, prefetched=Prefetched(observer=observer, found=found)))
        return _Taken(captured, observer, found, beside_others)

    def _end(self, failure: BaseException | None) -> None:
        self._is_over = True
        self._taken.put(failure)
        # The other threads wait for a frame, or for a place.
        self._places.release(len(self._threads))
