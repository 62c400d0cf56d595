"""The worker process: does tasks from its standard input, one after another, with one :class:`SiteTrainer`."""

from __future__ import annotations

import math
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from edgeflame.background import BackgroundThread, die_with_parent
from edgeflame.errors import EdgeFlameError
from edgeflame.log import Progress
from trainer.agent.tasks import (
    TO_WORKER,
    FinishTask,
    FromWorker,
    InitialTask,
    SiteTrainer,
    StatisticsTask,
    Task,
    TaskError,
    TaskProgress,
    TaskResult,
    TrainTask,
    WorkerReady,
    WorkerSetup,
    encode_line,
)

V = TypeVar("V", bound=float | str)

PROGRESS_INTERVAL_S = 0.2
"""Progress is reported no more often than this; the parent forwards it once a second."""


def run_worker(build: Callable[[WorkerSetup], SiteTrainer]) -> NoReturn:
    """Do tasks until standard input ends; then, or when the parent dies, the process exits at once.

    Args:
        build: makes the trainer; its errors are reported like those of a task.
    """
    # Ctrl-C goes to the whole terminal; it is the parent that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The end of standard input tells a running worker that its parent died; one that is stopped would not notice.
    die_with_parent()
    # Libraries print; what they print must not end up between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    BackgroundThread("tasks", lambda _: _read_lines(sys.stdin.buffer, lines)).start()
    try:
        _serve(build, lines, out)
    except BaseException:  # noqa: BLE001 - the outermost loop of this process
        traceback.print_exc()
    finally:
        # Not through the interpreter's own end, which trips over a thread that reads standard input.
        os._exit(1)


def _serve(build: Callable[[WorkerSetup], SiteTrainer], lines: queue.SimpleQueue[bytes], out: BinaryIO) -> None:
    try:
        setup = TO_WORKER.decode(lines.get())
        assert isinstance(setup, WorkerSetup)
        trainer = build(setup)
    except EdgeFlameError as exc:
        _send(out, TaskError(error=type(exc).__name__, message=str(exc)))
        return
    _send(out, WorkerReady())
    while True:
        task = TO_WORKER.decode(lines.get())
        assert not isinstance(task, WorkerSetup)
        try:
            answer: FromWorker = execute_task(trainer, task, _ProgressReporter(out))
        except EdgeFlameError as exc:
            answer = TaskError(error=type(exc).__name__, message=str(exc))
        _send(out, answer)


def execute_task(trainer: SiteTrainer, task: Task, report: Progress) -> TaskResult:
    """Have a trainer do a task; figures that are not finite are left out of the result."""
    match task:
        case InitialTask():
            trainer.write_initial_model(task)
            return TaskResult()
        case TrainTask():
            result = trainer.train(task, report)
        case StatisticsTask():
            result = trainer.compute_statistics(task, report)
        case FinishTask():
            result = trainer.finish(task, report)
    return msgspec.structs.replace(result, metrics=_finite(result.metrics), summary=_finite(result.summary))


class _ProgressReporter:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._last = 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL_S or done >= total:
            self._last = now
            _send(self._out, TaskProgress(done=done, total=total, note=note))


def _finite(values: dict[str, V]) -> dict[str, V]:
    # JSON has no NaN.
    return {key: value for key, value in values.items() if isinstance(value, str) or math.isfinite(value)}


def _send(out: BinaryIO, message: FromWorker) -> None:
    try:
        out.write(encode_line(message))
    except BrokenPipeError:
        # The parent is gone: nobody needs the result.
        os._exit(0)


def _read_lines(stream: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    # Also in the middle of a task: a worker must never outlive its parent.
    os._exit(0)
