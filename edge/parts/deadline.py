"""A verdict by its deadline, whatever the model does.

The model works on a thread of its own, and whoever waits for it waits no longer. :class:`Deadline` has the rules and is
pure; :class:`BoundedCall` has the thread, the queues and the words.

Theory of operation
-------------------
The line's thread has one part in hand at a time, and it alone decides: it waits for the model's answer or the part's
deadline, whichever comes first, and what it sees first is the verdict. The model works on a thread of its own, on one
image at a time, and cannot be interrupted, so an answer may come when its part has long been decided; such an answer
frees the model and does nothing else.

    in hand         the model       what happens
    --              free            ``take`` gives the image to the model
    --              busy            ``take`` waits: the model is still at an earlier part, decided without it
    waiting         its answer      to the earlier part: too late. The model is free and gets the part in hand
    being scored    its answer      before the deadline: the verdict. At it or after: late
    any             no answer       at the deadline: late

A part whose deadline has passed when it is taken is late without being scored: the model's time is for those that can
still be told in time.
"""

from __future__ import annotations

import enum
import itertools
import queue
import threading
import time
from collections.abc import Callable

from edge.frame import Captured
from edge.inspector import InspectorProtocol, make_unknown
from edge.result import Inspected, Reason
from edge.status import PartCounts
from edgeflame.log import EventLog


class DeadlineStep(str, enum.Enum):
    """What to do now."""

    SCORE = "score"
    """Give the part in hand to the model."""
    WAIT = "wait"
    """For the model's answer or the deadline."""
    DECIDE = "decide"
    """The answer that has come is the verdict on the part in hand, which is done with."""
    LATE = "late"
    """The part in hand is late, and done with."""


class Deadline:
    """Between one model and the parts that come one after the other; used by one thread.

    Keys name parts and are used once.
    """

    def __init__(self) -> None:
        self._in_hand: int | None = None
        self._due = 0.0
        self._at_model: int | None = None

    @property
    def at_model(self) -> int | None:
        """The part the model is working on, decided or not."""
        return self._at_model

    def take(self, key: int, due: float, now: float) -> DeadlineStep:
        """A part comes: ``SCORE``, ``WAIT`` or ``LATE``."""
        assert self._in_hand is None
        if now >= due:
            return DeadlineStep.LATE
        self._in_hand, self._due = key, due
        if self._at_model is not None:
            return DeadlineStep.WAIT
        self._at_model = key
        return DeadlineStep.SCORE

    def answered(self, key: int, now: float) -> DeadlineStep:
        """The model answers: ``DECIDE`` or ``LATE`` on the part in hand, ``SCORE`` it, or ``WAIT`` where none is."""
        assert self._at_model == key
        self._at_model = None
        if self._in_hand is None:
            return DeadlineStep.WAIT
        if now >= self._due:
            self._in_hand = None
            return DeadlineStep.LATE
        if self._in_hand == key:
            self._in_hand = None
            return DeadlineStep.DECIDE
        self._at_model = self._in_hand
        return DeadlineStep.SCORE

    def passed(self, now: float) -> DeadlineStep:
        """Time has passed without an answer: ``WAIT`` or ``LATE``."""
        if self._in_hand is None or now < self._due:
            return DeadlineStep.WAIT
        self._in_hand = None
        return DeadlineStep.LATE


log = EventLog("parts")


class BoundedCall:
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
        self._jobs: queue.SimpleQueue[tuple[int, InspectorProtocol, Captured] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Inspected | BaseException]] = queue.SimpleQueue()
        self._busy: tuple[str, float] | None = None
        self._counts = counts
        self._thread: threading.Thread | None = None

    def busy_s(self) -> float:
        """How long the model has been at one image; 0 where it is at none. From any thread."""
        busy = self._busy
        return 0.0 if busy is None else self._clock() - busy[1]

    def inspect(self, judge: InspectorProtocol, captured: Captured, due: float) -> Inspected:
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
        while step is not DeadlineStep.LATE:
            if step is DeadlineStep.SCORE:
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
            if step is DeadlineStep.DECIDE:
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

    def _give(self, key: int, judge: InspectorProtocol, captured: Captured) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"edgeflame-model-{self._camera}", daemon=True)
            self._thread.start()
        self._busy = (captured.frame.part_id, self._clock())
        self._jobs.put((key, judge, captured))

    def _answered(self, key: int) -> DeadlineStep:
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
        self, judge: InspectorProtocol, captured: Captured, answer: Inspected | BaseException | None, *, given: bool
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
        return make_unknown(captured, judge, camera=self._camera, reason=reason, detail=detail)

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
