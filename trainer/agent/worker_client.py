"""The parent's side of the worker process.

The supervisor starts a worker when one is needed, and restarts it a bounded number of times when it dies.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from edgeflame import errors
from edgeflame.background import BackgroundThread
from edgeflame.errors import EdgeFlameError, FederationError, MissingDependencyError
from edgeflame.log import EventLog
from trainer.agent.tasks import (
    FROM_WORKER,
    FromWorker,
    Task,
    TaskError,
    TaskProgress,
    TaskResult,
    WorkerReady,
    WorkerSetup,
    encode_line,
)

log = EventLog("site")

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WorkerMessage:
    """A message from the worker. ``worker`` tells it from one that an earlier worker sent before it ended."""

    worker: WorkerProcess
    message: FromWorker


@dataclass(frozen=True, kw_only=True)
class WorkerExited:
    """The worker process ended, by itself or not."""

    worker: WorkerProcess
    exit_code: int


class WorkerProcess:
    """A running worker. It ends when this process does: its standard input is then closed.

    Args:
        command: what to start.
        setup: its first line.
        sink: gets :class:`WorkerMessage` and finally :class:`WorkerExited`, on a thread of its own.

    Raises:
        MissingDependencyError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], setup: WorkerSetup, sink: Callable[[WorkerMessage | WorkerExited], None]
    ) -> None:
        self.setup = setup
        self._sink = sink
        try:
            self._process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as exc:
            raise MissingDependencyError(f"cannot start the worker {command[0]}: {exc.strerror}") from exc
        self._write(encode_line(setup))
        self._reader = BackgroundThread("worker", lambda _: self._read())
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_task(self, task: Task) -> None:
        """Send a task; the one before must be done."""
        self._write(encode_line(task))

    def suspend(self) -> None:
        """Stop it where it is (SIGSTOP); it computes nothing and keeps its memory."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue from where it was suspended."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it now, whatever it is doing."""
        self._process.kill()
        self._reader.close()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # If it has died, WorkerExited says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        while line := self._process.stdout.readline(MAX_LINE_BYTES):
            try:
                message = FROM_WORKER.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                # Something printed before the worker took its standard output for itself.
                log.warning("worker_printed", text=line[:200].decode("utf-8", "replace").strip())
                continue
            self._sink(WorkerMessage(worker=self, message=message))
        exit_code = self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._sink(WorkerExited(worker=self, exit_code=exit_code))


MAX_CRASHES = 3
"""Deaths of the worker during one task after which the task is given up."""


class WorkerSupervisor:
    """Runs one task at a time in a worker process, which it starts when one is needed.

    Args:
        command: the worker's command line.
        sink: gets the worker's events, on a thread of its own; hand each of them to :meth:`on_event`.

    Attributes:
        progress: of the task.
    """

    def __init__(self, command: Sequence[str], sink: Callable[[WorkerMessage | WorkerExited], None]) -> None:
        self._command = command
        self._sink = sink
        self._worker: WorkerProcess | None = None
        self._is_ready = False
        self._task: Task | None = None
        self._crashes = 0
        self._is_suspended = False
        self.progress = TaskProgress(done=0, total=0)

    @property
    def is_busy(self) -> bool:
        return self._task is not None

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return None if self._worker is None else self._worker.pid

    def start_task(self, setup: WorkerSetup, task: Task) -> None:
        """Start a task; one that is still running is abandoned, and its process with it."""
        if self._worker is not None and (self.is_busy or self._worker.setup != setup):
            self.stop()
        self._task = task
        self._crashes = 0
        self.progress = TaskProgress(done=0, total=0)
        if self._worker is None:
            self._start(setup)
        elif self._is_ready:
            self._worker.send_task(task)

    def suspend(self) -> None:
        """Stop computing at once; the task is kept."""
        if not self._is_suspended:
            self._is_suspended = True
            if self._worker is not None:
                self._worker.suspend()

    def resume(self) -> None:
        """Continue a suspended task."""
        if self._is_suspended:
            self._is_suspended = False
            if self._worker is not None:
                self._worker.resume()

    def stop(self) -> None:
        """End the worker, and abandon its task."""
        if self._worker is not None:
            self._worker.kill()
        self._worker = None
        self._task = None

    def on_event(self, event: WorkerMessage | WorkerExited) -> TaskResult | EdgeFlameError | None:
        """The task's result or the error it failed with, if the event is that; None otherwise."""
        worker = self._worker
        if worker is None or event.worker is not worker:
            return None
        if isinstance(event, WorkerExited):
            return self._on_death(worker, event.exit_code)
        match event.message:
            case WorkerReady():
                self._is_ready = True
                if self._task is not None:
                    worker.send_task(self._task)
            case TaskProgress():
                self.progress = event.message
            case TaskResult():
                self._task = None
                return event.message
            case TaskError(error=name, message=message):
                self._task = None
                kind = getattr(errors, name, FederationError)
                return kind(message) if issubclass(kind, EdgeFlameError) else FederationError(message)
        return None

    def _start(self, setup: WorkerSetup) -> None:
        self._is_ready = False
        self._worker = WorkerProcess(self._command, setup, self._sink)
        if self._is_suspended:
            self._worker.suspend()
        log.debug("worker_started", pid=self._worker.pid)

    def _on_death(self, worker: WorkerProcess, exit_code: int) -> EdgeFlameError | None:
        self._worker = None
        if self._task is None:
            # Idle, or after it reported an error: the next task starts another.
            return None
        self._crashes += 1
        how = _describe_exit(exit_code)
        log.warning("worker_died", how=how, crashes=self._crashes, allowed=MAX_CRASHES)
        if self._crashes >= MAX_CRASHES:
            self._task = None
            msg = f"the worker process died {self._crashes} times at the same task, last {how}"
            return FederationError(msg)
        self._start(worker.setup)
        return None


def _describe_exit(exit_code: int) -> str:
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
