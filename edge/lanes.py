"""Parts looked at side by side, and told one after the other.

Two cores are kept less busy by one image than by two: between a graph's operators they wait for each other. So when
parts come faster than they are judged, each core looks at a part of its own (a *lane*).

    Capture ──> lane ──┐
            └─> lane ──┴─> in the order of capture ──> the line's loop ──> verdict, sinks

A lane that is free takes the next frame from the capture and looks at it ahead of its turn: crop, resize, image
health, score. What depends on the order of parts, and the verdict, is left to the line's loop. A frame that no lane
has taken is still the capture's to drop. What was found ahead is an offer: a judge put in place meanwhile takes no
other judge's word, and looks for itself.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol, final

from edge.capture import Ahead, Capture, Captured
from edgeflame.console import EventLog

log = EventLog("line")

_STOP_TIMEOUT_S = 3.0
"""How long the end waits for the lanes; a runtime may hang for ever."""


class Looker(Protocol):
    """Looks at frames ahead of their turn."""

    @property
    def lanes(self) -> int:
        """How many side by side are worth it."""
        ...

    def look(self, captured: Captured) -> Any:
        """What can be found out about a frame by itself; on any thread, several at once."""
        ...


@final
class Lanes:
    """Frames in the order of capture, with what was found out about them ahead of their turn.

    A context manager that opens and closes the capture and owns the lanes.

    Args:
        capture: the frames.
        looker: who looks, asked for every frame; None: nobody, ahead of its turn.
        stop: ends the iteration, as it does the capture's.
        count: frames looked at side by side, at least 1.
    """

    def __init__(
        self, capture: Capture, looker: Callable[[], Looker | None], stop: threading.Event, *, count: int
    ) -> None:
        self._capture = capture
        self._looker = looker
        self._stop = stop
        self._unread: list[Captured] = []
        self._frames = iter(capture)
        self._taking = threading.Lock()
        # For each lane a frame that it looks at and one that waits for its turn: none rests while the line hands on.
        self._places = threading.Semaphore(2 * count)
        self._taken: queue.SimpleQueue[Captured | BaseException | None] = queue.SimpleQueue()
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._run, name=f"edgeflame-lane-{number}", daemon=True) for number in range(count)
        ]

    def __enter__(self) -> Lanes:
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
                log.warning("lane_does_not_stop", waited_s=_STOP_TIMEOUT_S)

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
        """After the end: frames that came and were not given out, in order."""
        while not self._taken.empty():
            item = self._taken.get()
            if isinstance(item, Captured):
                self._unread.append(item)
        return [*self._unread, *self._capture.unread()]

    def _run(self) -> None:
        while True:
            self._places.acquire()
            with self._taking:
                taken = self._take()
            if taken is None:
                return
            captured, looker = taken
            if captured.ahead is None or looker is None:
                continue
            try:
                captured.ahead.found.set_result(looker.look(captured))
            except BaseException as exc:  # noqa: BLE001 - raised where the frame's turn comes
                captured.ahead.found.set_exception(exc)

    def _take(self) -> tuple[Captured, Looker | None] | None:
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
        looker = self._looker()
        if looker is not None:
            captured = dataclasses.replace(captured, ahead=Ahead(looker=looker, found=Future()))
        self._taken.put(captured)
        return captured, looker

    def _end(self, failure: BaseException | None) -> None:
        self._is_over = True
        self._taken.put(failure)
        # The other lanes wait for a frame, or for a place.
        self._places.release(len(self._threads))
