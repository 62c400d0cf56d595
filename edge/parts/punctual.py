"""A verdict by its deadline: the model works on a thread of its own, and whoever waits for it waits no longer.

The rules are those of :mod:`edge.parts.deadline`; here are the thread, the queues and the words.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable

from edge.capture import Captured
from edge.judge import Judge, not_judged
from edge.parts.counts import PartCounts
from edge.parts.deadline import Deadline, Step
from edge.results import Inspected
from edge.verdict import Reason
from edgeflame.console import EventLog

log = EventLog("parts")


class Punctual:
    """Asks a judge, and answers in its place at the deadline. Used by one thread, and closed by it.

    An answer that came at the deadline or after it is given as it is; nobody may take it for a verdict.

    Args:
        camera: for results and messages.
        counts: of parts.
        clock: monotonic, seconds.
    """

    def __init__(self, *, camera: str, counts: PartCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._camera = camera
        self._clock = clock
        self._deadline = Deadline()
        self._keys = itertools.count()
        self._jobs: queue.SimpleQueue[tuple[int, Judge, Captured] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Inspected | BaseException]] = queue.SimpleQueue()
        self._busy: tuple[str, float] | None = None
        self._counts = counts
        self._thread: threading.Thread | None = None

    def busy_s(self) -> float:
        """How long the model has been at one image; 0 where it is at none. From any thread."""
        busy = self._busy
        return 0.0 if busy is None else self._clock() - busy[1]

    def inspect(self, judge: Judge, captured: Captured, due: float) -> Inspected:
        """Judge one frame, or say that it is late.

        Args:
            judge: does the work, on a thread of its own.
            captured: the frame.
            due: the deadline, on the clock.

        Raises:
            Exception: what the judge raised, in time.
        """
        self._collect()
        key = next(self._keys)
        step = self._deadline.take(key, due, self._clock())
        answer: Inspected | BaseException | None = None
        given = False
        while step is not Step.LATE:
            if step is Step.SCORE:
                self._give(key, judge, captured)
                given = True
            try:
                answering, answered = self._answers.get(timeout=max(0.0, due - self._clock()))
            except queue.Empty:
                step = self._deadline.passed(self._clock())
                continue
            step = self._answered(answering)
            if answering == key:
                answer = answered
            else:
                self._too_late(answered)
            if step is Step.DECIDE:
                assert answer is not None
                if isinstance(answer, BaseException):
                    raise answer
                return answer
        return self._late(judge, captured, answer, given=given)

    def close(self) -> None:
        """Let the thread go; one that hangs in the model is left behind."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(1.0)

    def _give(self, key: int, judge: Judge, captured: Captured) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"edgeflame-model-{self._camera}", daemon=True)
            self._thread.start()
        self._busy = (captured.frame.part_id, self._clock())
        self._jobs.put((key, judge, captured))

    def _answered(self, key: int) -> Step:
        return self._deadline.answered(key, self._clock())

    def _collect(self) -> None:
        """Answers that came while no part was in hand."""
        while True:
            try:
                key, answer = self._answers.get_nowait()
            except queue.Empty:
                return
            self._answered(key)
            self._too_late(answer)

    def _too_late(self, answer: Inspected | BaseException) -> None:
        """An answer for a part that was decided without it: noted, and no more."""
        self._counts.late_answers += 1
        if isinstance(answer, BaseException):
            log.error("late_answer", camera=self._camera, failed=repr(answer))
            return
        result = answer.result
        log.warning(
            "late_answer",
            camera=self._camera,
            part=result.part_id,
            would_have_been=result.verdict,
            score=result.score,
            latency_ms=result.latency_ms,
        )

    def _late(
        self, judge: Judge, captured: Captured, answer: Inspected | BaseException | None, *, given: bool
    ) -> Inspected:
        if isinstance(answer, Inspected):
            # Worth to be known; that it is late is said where all late results are.
            self._counts.late_answers += 1
            return answer
        reason, busy = Reason.LATE, self._busy
        if answer is not None:
            self._counts.late_answers += 1
            detail = f"the model failed after the deadline: {answer!r}"
        elif given:
            detail = "the model has not answered by then"
        elif busy is None:
            detail = "its turn came after the deadline"
        else:
            reason = Reason.MODEL_NOT_READY
            detail = f"the model has been busy with part {busy[0]} for {1000 * (self._clock() - busy[1]):.0f} ms"
        return not_judged(captured, judge, camera=self._camera, reason=reason, detail=detail)

    def _work(self) -> None:
        """The model's thread."""
        while (job := self._jobs.get()) is not None:
            key, judge, captured = job
            try:
                answer: Inspected | BaseException = judge.inspect(captured)
            except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: whoever waits raises it
                answer = exc
            self._busy = None
            self._answers.put((key, answer))
