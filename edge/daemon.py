"""The inspection loop: source, inspector, sinks; and how it is stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from edge.capture import Capture, CaptureConfig
from edge.inspector import Inspector
from edge.sinks import Sink
from edge.sources import Source
from edge.summary import Summary, Tally
from edgeflame.console import EventLog

log = EventLog("inspect")


def run_inspection(
    source: Source,
    inspector: Inspector,
    sinks: Sequence[Sink],
    *,
    capture: CaptureConfig,
    limit: int | None = None,
    stop: threading.Event,
) -> Summary:
    """Inspect until the source ends, ``limit`` parts are done, or ``stop`` is set.

    The part in hand when the stop comes still gets its verdict.

    Raises:
        EdgeFlameError: the source cannot be opened, or a sink cannot keep a result.
    """
    inspector.warm_up()
    tally = Tally()
    with Capture(source, capture, stop) as frames:
        for captured in frames:
            inspected = inspector.inspect(captured)
            tally.add(inspected.result)
            for sink in sinks:
                sink.accept(inspected)
            if tally.parts == limit:
                break
    if stop.is_set():
        log.info("stopped_by_signal", parts=tally.parts)
    return tally.summary(dropped=frames.dropped)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal interrupts at once."""
    stop = threading.Event()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if stop.is_set():
            raise KeyboardInterrupt
        # Nothing else: the handler may run in the middle of a write to the terminal.
        stop.set()

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
