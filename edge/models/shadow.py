"""A second model judges the same parts as the present one, on a thread of its own, and changes nothing.

The line hands parts over without waiting: while the second model is busy they are skipped, and counted. The thread is
niced and computes on one CPU core, so that the present model is never late because of it. Which model is the second is
nothing to it: a candidate before the switch, the model before afterwards.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np

from edge.capture import Captured
from edge.judge import Judge
from edge.models.comparison import Comparison
from edge.models.trial import Trial
from edge.overlay import overlay
from edge.results import Inspected
from edge.runtimes import Runtime
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.images import ImageU8, shrink, write_image
from edgeflame.releases.messages import Disagreement

log = EventLog("models")

QUEUE_PARTS = 2
"""Waiting for the second model; a part more is skipped. They hold whole camera images."""
NICENESS = 10
"""Of the thread: it takes what the line leaves."""
PICTURES = 12
PICTURE_SIDE = 640
TIMED_RUNS = 7

_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Second:
    """The second model.

    Attributes:
        judges: one for each camera, all on runtimes of the shadow's own.
        slowdown: its computing time over the present one's; None: not measured.
    """

    judges: Mapping[str, Judge]
    slowdown: float | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is."""

    disagreement: Disagreement
    problem: str | None = None
    """The second model cannot be tried: why."""


@final
class Shadow:
    """One shadow run; begins at once, and is to be closed.

    Args:
        open_second: makes the second model; called on the shadow's own thread.
        folder: for pictures and the report; None: none are kept.
        trial: told of every part that both have judged.
        wake: called when there is something new worth acting upon.
    """

    def __init__(
        self,
        open_second: Callable[[], Second],
        *,
        folder: Path | None = None,
        trial: Trial | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_second = open_second
        self._folder = folder
        self._trial = trial
        self._wake = wake
        self._queue: queue.Queue[tuple[Captured, Inspected] | None] = queue.Queue(QUEUE_PARTS)
        self._lock = threading.Lock()
        self._comparison = Comparison()
        self._num_skipped = 0
        self._problem: str | None = None
        self._is_ready = False
        self._closing = threading.Event()
        self._worst: list[tuple[float, int, str]] = []
        self._thread = threading.Thread(target=self._run, name="edgeflame-shadow", daemon=True)
        self._thread.start()

    def offer(self, captured: Captured, inspected: Inspected) -> None:
        """A part that the present model has judged; takes microseconds."""
        if self._closing.is_set() or captured.frame.image_bgr is None:
            return
        try:
            if not self._is_ready:
                raise queue.Full
            self._queue.put_nowait((captured, inspected))
        except queue.Full:
            self._num_skipped += 1

    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            return Progress(
                disagreement=self._comparison.disagreement(skipped=self._num_skipped),
                problem=self._problem,
            )

    def close(self, *, timeout_s: float = 1.0) -> None:
        """End it; a part in hand may still be computed, and counts no more."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(timeout_s)

    # The rest runs on the shadow's thread.

    def _run(self) -> None:
        # Linux knows priorities by thread. A machine that forbids it is one that shares nothing worth sharing.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            second = self._open_second()
            with self._lock:
                self._comparison.slowdown = second.slowdown
            self._is_ready = True
            while not self._closing.is_set():
                try:
                    item = self._queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                if item is None or self._closing.is_set():
                    break
                self._judge(second, *item)
        except EdgeFlameError as exc:
            self._give_up(str(exc))
        except Exception as exc:  # noqa: BLE001 - a thread's outermost frame: a model that breaks it is no good
            log.error("shadow_failed", reason=repr(exc))
            self._give_up(f"an unexpected error: {exc!r}")

    def _give_up(self, problem: str) -> None:
        with self._lock:
            self._problem = problem
        self._wake()

    def _judge(self, second: Second, captured: Captured, inspected: Inspected) -> None:
        present = inspected.result
        judge = second.judges.get(present.camera)
        if judge is None:
            return
        # Parts are skipped, so what is known of the camera from one part to the next is the present model's alone.
        other = judge.rehearse(captured)
        with self._lock:
            distance = self._comparison.add(present, other.result)
            # On trial is the present model; the second is the one before.
            alarm = None if self._trial is None else self._trial.compared(present, other.result)
        if distance is not None and distance > 0 and self._folder is not None:
            self._keep_picture(self._folder, distance, inspected, other)
        if alarm is not None or distance is None or self._comparison.parts % 10 == 0:
            self._wake()

    def _keep_picture(self, folder: Path, distance: float, present: Inspected, other: Inspected) -> None:
        if len(self._worst) == PICTURES and distance <= self._worst[0][0]:
            return
        result = present.result
        camera = "".join(sign if sign.isalnum() else "_" for sign in result.camera)
        name = f"{camera}-{result.sequence:08d}-{result.verdict}-{other.result.verdict}.png"
        pictures = [_picture(one) for one in (present, other)]
        if any(picture is None for picture in pictures):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / name, np.hstack([picture for picture in pictures if picture is not None]))
            heapq.heappush(self._worst, (distance, result.sequence, name))
            while len(self._worst) > PICTURES:
                (folder / heapq.heappop(self._worst)[2]).unlink(missing_ok=True)
        except (OSError, StorageError) as exc:
            # Evidence for people; the numbers decide.
            log.warning("shadow_picture_not_kept", reason=str(exc))


def write_report(folder: Path, disagreement: Disagreement) -> None:
    """What a shadow run came to, as JSON beside its pictures; not worth failing for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(disagreement), indent=2) + b"\n")
    except OSError as exc:
        log.warning("shadow_report_not_kept", reason=str(exc))


def slowdown_of(runtime: Runtime, present: Runtime) -> float:
    """How many times the present model's computing time for an image another takes.

    By the calling thread's own CPU time, both alternately: what else the machine does plays no part. Both runtimes
    compute on the calling thread alone.
    """
    ratios = []
    for index in range(TIMED_RUNS + 1):
        ours, theirs = _cpu_s(present), _cpu_s(runtime)
        if index:
            # The first is for the allocations.
            ratios.append(theirs / max(ours, 1e-9))
    return float(np.median(ratios))


def _cpu_s(runtime: Runtime) -> float:
    image = np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8)
    begun = time.thread_time()
    runtime.score(image)
    return time.thread_time() - begun


def _picture(inspected: Inspected) -> ImageU8 | None:
    """The present model's picture on the left, the other's on the right; both see the same area, or may not."""
    if inspected.image is None:
        return None
    picture = shrink(inspected.image, PICTURE_SIDE)
    if inspected.anomaly_map is not None:
        picture = shrink(overlay(picture, inspected.anomaly_map, inspected.result.threshold), PICTURE_SIDE)
    canvas = np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas
