"""Background work: threads with an orderly end, child processes that never outlive their parent, and how long to wait
before something is tried again.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import final

from edgeflame.errors import EdgeFlameError
from edgeflame.log import EventLog

log = EventLog("background")

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(signum: signal.Signals = signal.SIGKILL, *, parent: int | None = None) -> None:
    """Called in a child: have the kernel send it a signal when its parent ends, however that ends. Linux only;
    elsewhere it does nothing.

    Args:
        signum: the signal.
        parent: the parent's process number. With it the signal comes at once where the parent has ended before this
            call; children that have another way to notice that, such as a pipe, can do without.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signum)


@final
class BackgroundThread:
    """A named thread that ends with its owner; start it with :meth:`start`, or use it as a context manager.

    An error that ends the thread is kept in ``error``, for :meth:`raise_error`; an unexpected one is a defect: it
    is logged as well, and goes on to ``threading.excepthook``, which shows where it arose.

    Args:
        name: of the thread; ``edgeflame-`` is put before it.
        target: the work. It gets ``stop``, and returns soon after that is set.
        wake: called after ``stop`` is set, on the thread that sets it, to end a wait of the target for something else:
            it notifies a condition, say, or puts a sentinel into a queue.
        join_s: how long :meth:`close` waits for the end, seconds. The thread is a daemon: one that takes longer does
            not keep the process alive.
    """

    def __init__(
        self,
        name: str,
        target: Callable[[threading.Event], None],
        *,
        wake: Callable[[], None] | None = None,
        join_s: float = 5.0,
    ) -> None:
        self.name = f"edgeflame-{name}"
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._target = target
        self._wake = wake
        self._join_s = join_s
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the thread to end, without waiting for it."""
        self.stop.set()
        if self._wake is not None:
            self._wake()

    def close(self, join_s: float | None = None) -> bool:
        """Ask the thread to end, and wait ``join_s`` seconds at most; returns whether it has ended, or never began."""
        self.request_stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(self._join_s if join_s is None else max(0.0, join_s))
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        """Raise what ended the thread, if that was an error."""
        if self.error is not None:
            raise self.error

    def __enter__(self) -> BackgroundThread:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.raise_error()

    def _run(self) -> None:
        try:
            self._target(self.stop)
        except EdgeFlameError as exc:
            self.error = exc
        except Exception as exc:
            self.error = exc
            log.error("thread_failed", thread=self.name, reason=repr(exc))
            raise


@final
class Backoff:
    """How long to wait before the next attempt: twice as long after each, up to a limit.

    Args:
        first_s: after the first failure, seconds.
        max_s: at most.
        jitter: a delay is shortened at random by up to this share of it, 0 to 1, so that peers that failed together do
            not come back together.
    """

    def __init__(self, first_s: float, max_s: float, *, jitter: float = 0.5) -> None:
        self._first_s, self._max_s, self._jitter = first_s, max_s, jitter
        self.num_failures = 0
        """Since the start, or the last :meth:`reset`."""

    def next_delay(self) -> float:
        """There was a failure: seconds to wait now."""
        delay_s: float = min(self._first_s * 2 ** min(self.num_failures, 16), self._max_s)
        self.num_failures += 1
        return delay_s * random.uniform(1 - self._jitter, 1.0)

    def reset(self) -> None:
        """It worked: begin with the first delay again."""
        self.num_failures = 0


FIRST_RETRY_S = 5.0
MAX_RETRY_S = 30.0


@final
class RetryTimer:
    """When to send again what was not answered: after ``FIRST_RETRY_S`` without progress, then after twice as long
    each time, ``MAX_RETRY_S`` at most.

    Progress shortens the wait again, but not below twice the pause before it: on a link so slow that a chunk takes
    eight seconds, nothing is to be sent again every five.

    Args:
        now: monotonic clock, seconds.
    """

    def __init__(self, now: float) -> None:
        self._progress_at = now
        self._waiting_since = now
        self._wait_s = FIRST_RETRY_S

    def progressed(self, now: float) -> None:
        """There was progress."""
        self._wait_s = min(max(FIRST_RETRY_S, 2 * (now - self._progress_at)), MAX_RETRY_S)
        self._progress_at = self._waiting_since = now

    def sent(self, now: float) -> None:
        """It was sent just now; wait anew."""
        self._waiting_since = now

    def is_due(self, now: float) -> bool:
        """Whether to send it again; if so, the next wait, a longer one, begins."""
        if now - self._waiting_since < self._wait_s:
            return False
        self._waiting_since = now
        self._wait_s = min(2 * self._wait_s, MAX_RETRY_S)
        return True
