"""Child processes of commands: starting other programs of ours, watching them, and stopping them whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import edgeflame
from edgeflame.background import die_with_parent
from edgeflame.cpus import usable_cpus
from edgeflame.errors import EdgeFlameError
from edgeflame.log import Progress, no_progress

STOP_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.1
_STOPPING = (signal.SIGINT, signal.SIGTERM)

_RUN = (
    "import sys; sys.path[:] = [*filter(None, sys.path), {root!r}]; "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def program(module: str, *arguments: object) -> list[str]:
    """The command line that runs a module of ours with the Python that runs us.

    It is ``python -m MODULE``, but does not look for modules in the working directory: that is the user's, and may hold
    files of the same names as our packages.
    """
    root = Path(edgeflame.__file__).resolve().parent.parent
    return [sys.executable, "-c", _RUN.format(root=str(root), module=module), *map(str, arguments)]


class ChildFailedError(EdgeFlameError):
    """A program that we ran failed; the exit code is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # this one error speaks for another process


@dataclass(frozen=True, kw_only=True)
class ChildProcess:
    """A running program of ours.

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

    def has_ended(self) -> bool:
        """Whether it has ended with exit code 0.

        Raises:
            ChildFailedError: it ended with another.
        """
        code = self.process.poll()
        if code:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            last = lines[-1].removeprefix("edgeflame: ") if lines else f"exit code {code}"
            message = f"{self.name}: {last} (whole log: {self.log})"
            raise ChildFailedError(message, code if code > 0 else EdgeFlameError.exit_code)
        return code is not None


class ChildProcesses:
    """Context manager of child processes; leaving it stops those that still run, also on Ctrl-C."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[ChildProcess] = []

    def __enter__(self) -> ChildProcesses:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask those that still run to end, and kill those that have not after ``STOP_TIMEOUT_S``."""
        running = [child.process for child in self._children if child.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, command_line: Sequence[str], *, num_threads: int) -> ChildProcess:
        """Start a program.

        Args:
            name: names the log files and the messages about it.
            command_line: as :func:`program` makes it.
            num_threads: threads its numerical libraries may use.
        """
        log, output = self._logs / f"{name}.log", self._logs / f"{name}.out"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
        # Python ignores what is raised in its hooks around a fork, a Ctrl-C that comes just then included.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            with log.open("wb") as log_stream, output.open("wb") as output_stream:
                process = subprocess.Popen(
                    command_line,
                    stdin=subprocess.DEVNULL,
                    stdout=output_stream,
                    stderr=log_stream,
                    env={**os.environ, **threads},
                    # Not reached by the terminal's Ctrl-C: we stop our children ourselves, in order.
                    start_new_session=True,
                    preexec_fn=partial(_prepare_child, os.getpid()),  # noqa: PLW1509 - system calls, no locks
                )
            child = ChildProcess(name=name, process=process, log=log, output=output)
            self._children.append(child)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return child

    def run_all(
        self,
        command_lines: Mapping[str, Sequence[str]],
        progress: Progress = no_progress,
        *,
        parallel: int | None = None,
    ) -> dict[str, Path]:
        """Run programs to their end, ``parallel`` of them at a time.

        Args:
            command_lines: by name.
            progress: counts those that have ended.
            parallel: how many at a time; None for one a core.

        Returns:
            The file of each one's standard output, by name.

        Raises:
            ChildFailedError: one of them failed; the others are stopped on leaving the context.
        """
        cores = usable_cpus()
        at_a_time = parallel or min(len(command_lines), cores)
        waiting = list(command_lines.items())
        running: list[ChildProcess] = []
        outputs: dict[str, Path] = {}
        progress(0, len(command_lines))
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(self.start(*waiting.pop(0), num_threads=max(1, cores // at_a_time)))
            ended = [child for child in running if child.has_ended()]
            for child in ended:
                running.remove(child)
                outputs[child.name] = child.output
                progress(len(outputs), len(command_lines), child.name)
            if not ended:
                time.sleep(POLL_INTERVAL_S)
        return outputs


def _prepare_child(parent: int) -> None:
    """In the child, before the program."""
    # Our handler would only note a signal that comes until the program is there, and the note would be lost.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGTERM, parent=parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
