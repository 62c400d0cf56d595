"""The parent's side of the worker process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from edgeflame.console import EventLog
from edgeflame.errors import MissingDependencyError
from trainer.agent.orders import FROM_WORKER, FromWorker, Order, Setup, encode_line

log = EventLog("site")

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Said:
    """The worker said something. ``worker`` tells it from a predecessor's last words."""

    worker: WorkerProcess
    message: FromWorker


@dataclass(frozen=True, kw_only=True)
class Died:
    """The worker process ended, by itself or not."""

    worker: WorkerProcess
    exit_code: int


class WorkerProcess:
    """A running worker. It ends when this process does: its standard input is then closed.

    Args:
        command: what to start.
        setup: its first line.
        sink: gets :class:`Said` and finally :class:`Died`, on a thread of its own.

    Raises:
        MissingDependencyError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], setup: Setup, sink: Callable[[Said | Died], None]) -> None:
        self.setup = setup
        self._sink = sink
        try:
            self._process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as exc:
            msg = f"cannot start the worker {command[0]}: {exc.strerror}"
            raise MissingDependencyError(msg) from exc
        self._write(encode_line(setup))
        self._reader = threading.Thread(target=self._read, name="edgeflame-worker", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, order: Order) -> None:
        """Give an order; the one before must be answered."""
        self._write(encode_line(order))

    def freeze(self) -> None:
        """Stop it where it is; it computes nothing and keeps its memory."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on from where it was stopped."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()
        self._reader.join()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # If it has died, Died says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        while line := self._process.stdout.readline(MAX_LINE_BYTES):
            try:
                message = FROM_WORKER.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                # Something printed before the worker took its standard output for itself.
                log.warning("worker_printed", text=line[:200].decode("utf-8", "replace").strip())
                continue
            self._sink(Said(worker=self, message=message))
        exit_code = self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._sink(Died(worker=self, exit_code=exit_code))
