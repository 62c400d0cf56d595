"""The worker process kept at work: started when needed, restarted a bounded number of times when it dies."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from edgeflame import errors
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, FederationError
from trainer.agent.orders import Done, Order, Problem, Ready, Setup, Step
from trainer.agent.process import Died, Said, WorkerProcess

log = EventLog("site")

MAX_CRASHES = 3
"""Deaths of the worker during one order after which the order is given up."""


class Labour:
    """Carries out one order at a time.

    Args:
        command: the worker's command line.
        sink: as for :class:`WorkerProcess`; what it gets is to be handed to :meth:`on_event`.
    """

    def __init__(self, command: Sequence[str], sink: Callable[[Said | Died], None]) -> None:
        self._command = command
        self._sink = sink
        self._worker: WorkerProcess | None = None
        self._is_ready = False
        self._order: Order | None = None
        self._crashes = 0
        self._frozen = False
        self.step = Step(done=0, total=0)

    @property
    def is_busy(self) -> bool:
        return self._order is not None

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return None if self._worker is None else self._worker.pid

    def begin(self, setup: Setup, order: Order) -> None:
        """Give an order; one at hand is abandoned, with the process that was at it."""
        if self._worker is not None and (self.is_busy or self._worker.setup != setup):
            self.stop()
        self._order = order
        self._crashes = 0
        self.step = Step(done=0, total=0)
        if self._worker is None:
            self._start(setup)
        elif self._is_ready:
            self._worker.order(order)

    def freeze(self) -> None:
        """Stop computing at once; the order at hand is kept."""
        if not self._frozen:
            self._frozen = True
            if self._worker is not None:
                self._worker.freeze()

    def thaw(self) -> None:
        """Go on where it was stopped."""
        if self._frozen:
            self._frozen = False
            if self._worker is not None:
                self._worker.thaw()

    def stop(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
        self._worker = None
        self._order = None

    def on_event(self, event: Said | Died) -> Done | EdgeFlameError | None:
        """What an event means: the order is done, or cannot be, or neither yet."""
        worker = self._worker
        if worker is None or event.worker is not worker:
            return None
        if isinstance(event, Died):
            return self._on_death(worker, event.exit_code)
        match event.message:
            case Ready():
                self._is_ready = True
                if self._order is not None:
                    worker.order(self._order)
            case Step():
                self.step = event.message
            case Done():
                self._order = None
                return event.message
            case Problem(error=name, message=message):
                self._order = None
                kind = getattr(errors, name, FederationError)
                return kind(message) if issubclass(kind, EdgeFlameError) else FederationError(message)
        return None

    def _start(self, setup: Setup) -> None:
        self._is_ready = False
        self._worker = WorkerProcess(self._command, setup, self._sink)
        if self._frozen:
            self._worker.freeze()
        log.debug("worker_started", pid=self._worker.pid)

    def _on_death(self, worker: WorkerProcess, exit_code: int) -> EdgeFlameError | None:
        self._worker = None
        if self._order is None:
            # Idle, or after it reported a problem: the next order starts another.
            return None
        self._crashes += 1
        how = _how(exit_code)
        log.warning("worker_died", how=how, crashes=self._crashes, allowed=MAX_CRASHES)
        if self._crashes >= MAX_CRASHES:
            self._order = None
            msg = f"the worker process died {self._crashes} times at the same task, last {how}"
            return FederationError(msg)
        self._start(worker.setup)
        return None


def _how(exit_code: int) -> str:
    """What an exit code says, in words: the reader should not have to know that -9 is what the kernel does when
    memory runs out.
    """
    if exit_code >= 0:
        return f"with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; out of memory? The kernel's log tells" if -exit_code == signal.SIGKILL else ""
    return f"by {name}{hint}"
