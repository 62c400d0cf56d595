"""The daemon under a supervisor: systemd's notifications and watchdog, signals, and the forced exit when a stop hangs.

Source: sd_notify(3) and sd_watchdog_enabled(3). Without ``NOTIFY_SOCKET`` in the environment nothing is sent.

The watchdog is fed only while nothing hangs. A camera worker that has been busy with one part for too long, a disk that
does not answer, or a main thread that stands still is each a reason for the supervisor to start the daemon afresh.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import final

from edgeflame.background import BackgroundThread
from edgeflame.errors import CrashLoopError
from edgeflame.log import EventLog, printable

log = EventLog("service")

STATUS_EVERY_S = 5.0
"""Longest time between two notifications, seconds."""


@final
class SystemdNotifier:
    """Notifies the supervisor; does nothing if there is none.

    Args:
        environment: the process's environment variables; None: ``os.environ``.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            # Linux's abstract names begin with a zero byte.
            self._address = "\0" + self._address[1:]
        self.watchdog_s = _watchdog_s(environment)
        """The supervisor's limit between two watchdog notifications, seconds; None: it expects none."""

    def notify(self, **states: str | int) -> None:
        """Send states, ``notify(READY=1)`` for instance; what does not arrive is not sent again."""
        if not self._address:
            return
        message = "\n".join(f"{name}={printable(str(value))}" for name, value in states.items())
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as out:
            out.setblocking(False)
            out.sendto(message.encode(), self._address)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    wanted, whom = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not wanted.isdecimal() or int(wanted) == 0 or (whom and whom != str(os.getpid())):
        return None
    return int(wanted) / 1e6


@final
class Watchdog:
    """Feeds the supervisor's watchdog and reports the status, on a thread of its own; a context manager.

    Args:
        notifier: notifies the supervisor.
        busy_s: for each component by name, returns how long it has been busy with its present task, seconds.
        status: returns one line for people.
    """

    def __init__(
        self, notifier: SystemdNotifier, *, busy_s: Mapping[str, Callable[[], float]], status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._busy_s = {**busy_s, "main": self._main_busy_s}
        self._status = status
        watchdog_s = notifier.watchdog_s
        self._interval_s = STATUS_EVERY_S if watchdog_s is None else min(STATUS_EVERY_S, watchdog_s / 3)
        self._limit_s = None if watchdog_s is None else watchdog_s / 2
        self._beat_at = time.monotonic()
        self._hanging: tuple[str, ...] = ()
        self._thread = BackgroundThread("watchdog", self._run, join_s=1.0)

    def __enter__(self) -> Watchdog:
        self._notifier.notify(READY=1, STATUS=self._status())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # From here on the supervisor's own limit for stopping counts, and not the watchdog.
        self._notifier.notify(STOPPING=1, STATUS="stopping")
        self._thread.close()

    def heartbeat(self) -> None:
        """Called by the main thread to show that it does not hang."""
        self._beat_at = time.monotonic()

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Report to the supervisor that the configuration is being read again, while the block runs."""
        self._notifier.notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            yield
        finally:
            self._notifier.notify(READY=1, STATUS=self._status())

    def _main_busy_s(self) -> float:
        return time.monotonic() - self._beat_at

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s):
            hanging = () if self._limit_s is None else self._hangs(self._limit_s)
            if hanging:
                if hanging != self._hanging:
                    log.error("hangs", parts=", ".join(hanging), meaning="the watchdog is not fed any more")
                self._notifier.notify(STATUS=f"hangs: {', '.join(hanging)}")
            else:
                self._notifier.notify(WATCHDOG=1, STATUS=self._status())
            self._hanging = hanging

    def _hangs(self, limit_s: float) -> tuple[str, ...]:
        return tuple(name for name, busy_s in self._busy_s.items() if busy_s() > limit_s)


exit_log = EventLog("inspect")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Requests made by signals."""

    stop: threading.Event = field(default_factory=threading.Event)
    """SIGINT or SIGTERM; a second one interrupts at once."""
    reload: threading.Event = field(default_factory=threading.Event)
    """SIGHUP."""


@contextlib.contextmanager
def handle_signals() -> Iterator[Signals]:
    """Handle SIGINT, SIGTERM and SIGHUP for as long as the block runs.

    On a terminal SIGHUP means that the terminal has gone, and keeps its default action.
    """
    signals = Signals()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if signals.stop.is_set():
            raise KeyboardInterrupt
        # Nothing is logged here: the handler may run in the middle of a write to the terminal.
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
class ForcedExit:
    """Ends the process if a stop hangs; a context manager: leaving it calls the forced exit off.

    Everything that is known to hang has a limit of its own. This is for the rest: a driver, a file system, a library.
    Results on the disk are not affected.
    """

    def __init__(self) -> None:
        self._thread: BackgroundThread | None = None

    def __enter__(self) -> ForcedExit:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._thread is not None:
            self._thread.request_stop()

    def arm(self, limit_s: float) -> None:
        """End the process in ``limit_s`` seconds unless the context has been left by then."""
        self._thread = BackgroundThread("forced-exit", lambda called_off: _force_exit(limit_s, called_off))
        self._thread.start()


def _force_exit(limit_s: float, called_off: threading.Event) -> None:
    if called_off.wait(limit_s):
        return
    exit_log.error(
        "stop_forced",
        after_s=limit_s,
        hanging=", ".join(sorted(thread.name for thread in threading.enumerate() if thread.name != "MainThread")),
        meaning="results on the disk are safe and are delivered after the next start",
    )
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(CrashLoopError.exit_code)
