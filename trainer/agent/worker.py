"""The worker process: executes orders from its standard input, one after another, with one :class:`SiteTrainer`."""

from __future__ import annotations

import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from edgeflame.background import die_with_parent
from edgeflame.errors import EdgeFlameError
from edgeflame.log import Progress
from trainer.agent.tasks import (
    TO_WORKER,
    FinishOrder,
    FinishTask,
    FromWorker,
    InitialOrder,
    Order,
    SiteTrainer,
    StatisticsOrder,
    StatisticsTask,
    TaskDone,
    TaskError,
    TaskProgress,
    TrainOrder,
    TrainTask,
    WorkerReady,
    WorkerSetup,
    encode_line,
)

V = TypeVar("V", bound=float | str)

PROGRESS_INTERVAL_S = 0.2
"""Progress is reported no more often than this; the parent forwards it once a second."""


def run_worker(build: Callable[[WorkerSetup], SiteTrainer]) -> NoReturn:
    """Serve orders until standard input ends; then, or when the parent dies, the process exits at once.

    Args:
        build: makes the work; its errors are reported like those of the work.
    """
    # Ctrl-C goes to the whole terminal; it is the parent that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The end of standard input tells a running worker that its parent died; one that is stopped would not notice.
    die_with_parent()
    # Libraries print; what they print must not end up between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(sys.stdin.buffer, orders), name="edgeflame-orders", daemon=True).start()
    try:
        _execute_orders(build, orders, out)
    except BaseException:  # noqa: BLE001 - the outermost loop of this process
        traceback.print_exc()
    finally:
        # Not through the interpreter's own end, which trips over a thread that reads standard input.
        os._exit(1)


def _execute_orders(
    build: Callable[[WorkerSetup], SiteTrainer], orders: queue.SimpleQueue[bytes], out: BinaryIO
) -> None:
    try:
        setup = TO_WORKER.decode(orders.get())
        assert isinstance(setup, WorkerSetup)
        work = build(setup)
    except EdgeFlameError as exc:
        _send(out, TaskError(error=type(exc).__name__, message=str(exc)))
        return
    _send(out, WorkerReady())
    while True:
        order = TO_WORKER.decode(orders.get())
        assert not isinstance(order, WorkerSetup)
        try:
            answer: FromWorker = execute_order(work, order, _ProgressReporter(out))
        except EdgeFlameError as exc:
            answer = TaskError(error=type(exc).__name__, message=str(exc))
        _send(out, answer)


def execute_order(work: SiteTrainer, order: Order, report: Progress) -> TaskDone:
    """Let the work do what an order says."""
    match order:
        case InitialOrder():
            work.write_initial_model(Path(order.out))
            return TaskDone()
        case TrainOrder():
            outcome = work.train(
                TrainTask(
                    round=order.round,
                    base=Path(order.base),
                    history=None if order.history is None else Path(order.history),
                    out=Path(order.out),
                    seed=order.seed,
                    private=None if order.private is None else Path(order.private),
                    private_out=None if order.private_out is None else Path(order.private_out),
                ),
                report,
            )
            return TaskDone(
                num_samples=outcome.num_samples, num_steps=outcome.num_steps, metrics=_finite(outcome.metrics)
            )
        case StatisticsOrder():
            shared = work.gather(
                StatisticsTask(
                    model=Path(order.model),
                    model_sha256=order.model_sha256,
                    wanted=order.wanted,
                    out=Path(order.out),
                ),
                report,
            )
            return TaskDone(num_samples=shared.num_samples, metrics=_finite(shared.metrics))
        case FinishOrder():
            finish = work.finish(
                FinishTask(
                    model=Path(order.model),
                    out_dir=Path(order.out_dir),
                    ledger=order.ledger,
                    private=None if order.private is None else Path(order.private),
                    statistics=None if order.statistics is None else Path(order.statistics),
                ),
                report,
            )
            return TaskDone(
                package=None if finish.package is None else str(finish.package),
                statistics=None if finish.statistics is None else str(finish.statistics),
                summary=_finite(finish.summary),
            )


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
    # JSON has no NaN; a figure that is none says nothing either.
    return {key: value for key, value in values.items() if isinstance(value, str) or math.isfinite(value)}


def _send(out: BinaryIO, message: FromWorker) -> None:
    try:
        out.write(encode_line(message))
    except BrokenPipeError:
        # The parent is gone; nobody is left to work for.
        os._exit(0)


def _read_lines(stream: BinaryIO, orders: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        orders.put(line)
    # Also in the middle of a task: a worker must never outlive its parent.
    os._exit(0)
