"""The cameras' loops on their threads, and the main thread that waits for them and for signals."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import final

from edge.line import Line
from edge.results import Inspected
from edge.service import Heart
from edge.signals import Signals
from edge.sinks import Sink
from edge.summary import Tally
from edgeflame.console import EventLog
from edgeflame.errors import DataError, EdgeFlameError

log = EventLog("inspect")

_POLL_S = 0.2
"""How often the main thread looks whether it is to stop; a line that ends wakes it at once."""

LINE_STOP_S = 2.0
"""How long a stop waits for the parts in hand; a judge or a driver that takes longer hangs."""


@final
class Runner:
    """Each line on a thread of its own, until all have ended or are to.

    Args:
        lines: which.
        outlet: takes every verdict.
        tally: counts it.
        limit: of parts.
    """

    def __init__(self, lines: Sequence[Line], outlet: Sink, tally: Tally, limit: int | None) -> None:
        self._outlet, self._tally, self._limit = outlet, tally, limit
        self._halt = threading.Event()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._run_line, args=(line, len(lines) == 1), name=f"edgeflame-{line.name}", daemon=True
            )
            for line in lines
        ]

    def run(self, signals: Signals, heart: Heart, *, reload: Callable[[], object], on_stop: Callable[[], None]) -> None:
        """Run them, and wait.

        Args:
            signals: end it, or have the configuration read again.
            heart: is told that we move.
            reload: reads the configuration again.
            on_stop: called when a signal says stop.

        Raises:
            EdgeFlameError: a line's error. One that can only be its own waits until the others have ended.
        """
        for thread in self._threads:
            thread.start()
        running, failures = len(self._threads), []
        try:
            while running:
                heart.beat()
                with contextlib.suppress(queue.Empty):
                    failure = self._done.get(timeout=_POLL_S)
                    running -= 1
                    if failure is not None:
                        failures.append(failure)
                        if not isinstance(failure, DataError):
                            # Not this camera's alone: a disk, a defect.
                            self._halt.set()
                        elif running:
                            log.error("camera_ended", reason=str(failure))
                if signals.reload.is_set():
                    signals.reload.clear()
                    threading.Thread(target=_reload, args=(heart, reload), name="edgeflame-reload", daemon=True).start()
                if signals.stop.is_set():
                    on_stop()
                    break
        finally:
            self._halt.set()
            self._join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (failure := self._done.get_nowait()) is not None:
                    failures.append(failure)
        if failures:
            raise failures[0]

    def _join(self) -> None:
        until = time.monotonic() + LINE_STOP_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                log.error("camera_does_not_stop", thread=thread.name, waited_s=LINE_STOP_S)

    def _run_line(self, line: Line, is_alone: bool) -> None:
        try:
            line.run(self._accept, self._halt, is_alone=is_alone)
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the main thread raises it
            self._done.put(exc)
        else:
            self._done.put(None)

    def _accept(self, inspected: Inspected) -> None:
        self._outlet.accept(inspected)
        if not inspected.result.golden and self._tally.add(inspected.result) == self._limit:
            self._halt.set()


def _reload(heart: Heart, reload: Callable[[], object]) -> None:
    """On a thread of its own: reading models takes seconds, in which a stop must be heard."""
    # Whatever was wrong is in the log.
    with heart.reloading(), contextlib.suppress(EdgeFlameError):
        reload()
