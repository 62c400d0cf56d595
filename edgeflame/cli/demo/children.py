"""The demo's child processes: started with a log file each, watched, and stopped whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from edgeflame.errors import EdgeFlameError
from edgeflame.processes import die_with_parent

EDGEFLAME = ("edgeflame", "--log-format", "json")
STOP_TIMEOUT_S = 5.0
_STOPPING = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL_S = 0.1


class ChildFailedError(EdgeFlameError):
    """A command the demo ran failed; the exit code is the command's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # this one error speaks for another process


@dataclass(frozen=True, kw_only=True)
class Child:
    """A running ``edgeflame`` command.

    Attributes:
        name: what messages call it.
        process: its handle.
        log: where its standard error goes (JSON lines).
        output: where its standard output goes.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    output: Path

    def check(self) -> bool:
        """Whether it has ended, well.

        Raises:
            ChildFailedError: it ended badly.
        """
        code = self.process.poll()
        if code is None:
            return False
        if code:
            raise ChildFailedError(self._failure(code), code if code > 0 else EdgeFlameError.exit_code)
        return True

    def _failure(self, code: int) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("edgeflame: ") if lines else f"exit code {code}"
        return f"{self.name}: {last} (whole log: {self.log})"


class Children:
    """Context manager of child processes; leaving it stops those that still run, also on Ctrl-C."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, *arguments: str, num_threads: int, program: Sequence[str] = EDGEFLAME) -> Child:
        """Start ``edgeflame ARGUMENTS`` with JSON logs, or another program of ours.

        Args:
            name: names the log files and the messages about it.
            arguments: the command and its arguments.
            num_threads: threads its numerical libraries may use.
            program: the Python module to run, and its first arguments.
        """
        log, output = self._logs / f"{name}.log", self._logs / f"{name}.out"
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(num_threads)
        with log.open("wb") as log_stream, output.open("wb") as output_stream:
            process = _spawn((*program, *arguments), environment, log_stream, output_stream)
        child = Child(name=name, process=process, log=log, output=output)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise :class:`ChildFailedError` if any child ended badly."""
        for child in self._children:
            child.check()

    def stop(self, children: Sequence[Child] | None = None) -> None:
        """Ask the given children (default all) to end, then make them."""
        stopping = [child for child in (children or self._children) if child.process.poll() is None]
        for child in stopping:
            child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in stopping:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children = [child for child in self._children if child not in stopping]

    def run_all(
        self, jobs: Sequence[tuple[str, Sequence[str]]], *, parallel: int, program: Sequence[str] = EDGEFLAME
    ) -> Iterator[Child]:
        """Run jobs ``(name, arguments)`` to their end, so many at a time; yields each as it ends.

        Raises:
            ChildFailedError: one of them failed; the others are stopped on leaving the context.
        """
        num_threads = max(1, (os.cpu_count() or 1) // parallel)
        waiting = list(reversed(jobs))
        running: list[Child] = []
        while waiting or running:
            while waiting and len(running) < parallel:
                name, arguments = waiting.pop()
                running.append(self.start(name, *arguments, num_threads=num_threads, program=program))
            ended = [child for child in running if child.check()]
            running = [child for child in running if child not in ended]
            yield from ended
            if not ended:
                time.sleep(POLL_INTERVAL_S)


def _spawn(
    arguments: Sequence[str], environment: dict[str, str], log: IO[bytes], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    # Python ignores what is raised in its hooks around a fork, a Ctrl-C that comes just then included.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            env=environment,
            # Not reached by the terminal's Ctrl-C: the demo stops its children itself, in order.
            start_new_session=True,
            preexec_fn=_begin,  # noqa: PLW1509 - two system calls, no locks
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _begin() -> None:
    """In the child, before the program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    die_with_parent(signal.SIGTERM)
