"""A verdict by its deadline, whatever the model does.

Theory of operation
-------------------
The model works on a thread of its own, on one image at a time, and cannot be interrupted. The camera worker's thread
has one part at a time, and it alone decides: it waits for the model's answer or the part's deadline, whichever comes
first.

    model                   what happens to the part
    busy with an earlier    waits for the model; at the deadline: late, and the model was not ready
    free                    gets the image, unless the deadline has passed already: then late without being scored
    answers in time         the answer counts
    answers too late        late; the answer is shown as what it would have been, and frees the model
    does not answer         late at the deadline; the answer, if it ever comes, is logged and frees the model
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import final

from edge.frame import Captured
from edge.inspector import InspectorProtocol
from edge.result import Reason
from edge.status import PartCounts
from edge.verdict import Observation, make_result, unscored
from edgeflame.background import BackgroundThread
from edgeflame.log import EventLog

log = EventLog("parts")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    inspector: InspectorProtocol
    captured: Captured
    since_s: float
    answer: Future[Observation] = field(default_factory=Future)


@final
class BoundedCall:
    """Runs an inspector with a limit: returns at the deadline at the latest. One thread uses it and closes it.

    It is no ``ThreadPoolExecutor``, which waits for its threads when the process ends: a hung model would block that.

    Args:
        camera: the camera's name, for results and messages.
        counts: late answers are counted here.
        clock: monotonic, seconds.
    """

    def __init__(self, *, camera: str, counts: PartCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._camera = camera
        self._counts = counts
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._running: _Job | None = None
        self._thread: BackgroundThread | None = None

    def busy_s(self) -> float:
        """How long the model has been busy with one image, seconds; 0 if it is not busy. Any thread may call it."""
        job = self._running
        return 0.0 if job is None or job.answer.done() else self._clock() - job.since_s

    def inspect(self, inspector: InspectorProtocol, captured: Captured, due_s: float) -> Observation:
        """The inspector's observation of a frame, or one without a score if the deadline has passed.

        Args:
            inspector: called on the model's thread.
            captured: the frame.
            due_s: the deadline, seconds on the clock.

        Raises:
            Exception: the inspector raised it before the deadline.
        """
        before = self._running
        if before is not None and not self._wait(before, due_s):
            busy = f"{before.captured.frame.part_id} for {1000 * (self._clock() - before.since_s):.0f} ms"
            return unscored(captured, Reason.MODEL_NOT_READY, f"the model has been busy with part {busy}")
        if self._clock() >= due_s:
            return unscored(captured, Reason.LATE, "its turn came after the deadline")
        job = self._submit(inspector, captured)
        if not self._wait(job, due_s):
            job.answer.add_done_callback(lambda _: self._note_late_answer(job))
            return unscored(captured, Reason.LATE, "the model has not answered by then")
        if self._clock() >= due_s:
            # The observation is returned all the same: the result then says what it would have been.
            self._counts.late_answers += 1
            if (failure := job.answer.exception()) is not None:
                return unscored(captured, Reason.LATE, f"the model failed after the deadline: {failure!r}")
        return job.answer.result()

    def close(self) -> None:
        """End the thread; one that hangs in the model is left behind."""
        if self._thread is not None:
            self._thread.close()

    def _wait(self, job: _Job, due_s: float) -> bool:
        """Wait until the job is done or the deadline has passed; returns whether it is done."""
        while not job.answer.done() and (left_s := due_s - self._clock()) > 0:
            wait([job.answer], timeout=left_s)
        return job.answer.done()

    def _submit(self, inspector: InspectorProtocol, captured: Captured) -> _Job:
        if self._thread is None:
            self._thread = BackgroundThread(
                f"model-{self._camera}", self._work, wake=lambda: self._jobs.put(None), join_s=1.0
            )
            self._thread.start()
        self._running = job = _Job(inspector=inspector, captured=captured, since_s=self._clock())
        self._jobs.put(job)
        return job

    def _work(self, _: threading.Event) -> None:
        """The model's thread."""
        while (job := self._jobs.get()) is not None:
            try:
                job.answer.set_result(job.inspector.inspect(job.captured))
            except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: whoever waits raises it
                job.answer.set_exception(exc)

    def _note_late_answer(self, job: _Job) -> None:
        """Count and log an answer that came after the part's deadline."""
        self._counts.late_answers += 1
        if (failure := job.answer.exception()) is not None:
            log.error("late_answer", camera=self._camera, failed=repr(failure))
            return
        inspector = job.inspector
        result = make_result(
            job.captured,
            job.answer.result(),
            camera=self._camera,
            model=inspector.model_id,
            threshold=inspector.threshold,
            review_band=inspector.review_band,
            now_s=self._clock(),
        )
        log.warning(
            "late_answer",
            camera=self._camera,
            part=result.part_id,
            would_have_been=result.verdict,
            score=result.score,
            latency_ms=result.latency_ms,
        )
