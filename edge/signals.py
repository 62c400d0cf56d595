"""What the operating system tells a daemon: stop, read the configuration again; and the end when a stop hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import final

from edgeflame.console import EventLog
from edgeflame.errors import CrashLoopError

log = EventLog("inspect")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What has been asked for."""

    stop: threading.Event = field(default_factory=threading.Event)
    """SIGINT or SIGTERM; a second one interrupts at once."""
    reload: threading.Event = field(default_factory=threading.Event)
    """SIGHUP."""


@contextlib.contextmanager
def heed_signals() -> Iterator[Signals]:
    """Heed SIGINT, SIGTERM and SIGHUP for as long as the block runs.

    On a terminal SIGHUP says that the terminal has gone, and is left as it is.
    """
    signals = Signals()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if signals.stop.is_set():
            raise KeyboardInterrupt
        # Nothing else: the handler may run in the middle of a write to the terminal.
        signals.stop.set()

    def request_reload(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        signals.reload.set()

    handlers = {signal.SIGINT: request_stop, signal.SIGTERM: request_stop}
    if not (sys.stdin is not None and sys.stdin.isatty()):
        handlers[signal.SIGHUP] = request_reload
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@final
class LastResort:
    """Ends the process when it has not ended by itself in time; a context manager, which calls that off.

    Everything that can hang on the way out has a limit of its own. This is for what nobody thought of: a driver, a
    file system, a library. Results on the disk are safe from it.
    """

    def __init__(self) -> None:
        self._called_off = threading.Event()

    def __enter__(self) -> LastResort:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._called_off.set()

    def begin(self, limit_s: float) -> None:
        """From now on there is so much time."""
        threading.Thread(target=self._run, args=(limit_s,), name="edgeflame-last-resort", daemon=True).start()

    def _run(self, limit_s: float) -> None:
        if self._called_off.wait(limit_s):
            return
        log.error(
            "stop_forced",
            after_s=limit_s,
            hanging=", ".join(sorted(thread.name for thread in threading.enumerate() if thread.name != "MainThread")),
            meaning="results on the disk are safe and are delivered after the next start",
        )
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(CrashLoopError.exit_code)
