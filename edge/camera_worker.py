"""The camera worker: one camera's loop that captures, inspects and hands on parts, and what may be changed meanwhile.

Theory of operation
-------------------
The loop runs on a thread of its own, in :meth:`CameraWorker.run`. Other threads change it through the methods that
stand before it; these wait for the frame being inspected and take effect before the next one (:class:`FrameLock`).

A camera that cannot be opened, be it at the start, or whose capture fails, is tried again with growing pauses. Each
outage gives one part with the verdict ``unknown``. If an inspector fails unexpectedly, the part gets the verdict
``unknown`` and the daemon goes on; if that happens too often (:class:`RestartBudget`), :class:`CrashLoopError` ends the
daemon, for its supervisor to start it afresh.

The golden part of a self-test is the first part whose picture was taken after the request: frames that were waiting
at that moment show earlier parts. It does not count as production.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, final

from msgspec import structs

from edge.camera_requests import PATIENCE_S, FrameLock, GoldenRequests, RestartBudget
from edge.capture import Capture, PrefetchPool
from edge.config.inspection import CaptureConfig, PartsConfig, TriggerConfig
from edge.frame import Captured, Source, make_frame
from edge.inspector import InspectorProtocol
from edge.parts.tracker import PartTracker
from edge.result import Inspected, Reason, Result
from edge.status import CameraStatus
from edge.verdict import unscored
from edgeflame.background import Backoff
from edgeflame.errors import (
    ConfigError,
    CrashLoopError,
    EdgeFlameError,
    MissingDependencyError,
    StorageError,
    UsageError,
)
from edgeflame.log import EventLog
from edgeflame.masking import without_secrets

log = EventLog("line")


class PartListener(Protocol):
    """Gets every part after its verdict has been handed on: released models under trial, the drift watcher.

    It must not delay the camera: whatever takes longer than microseconds belongs on a thread of the listener's own.
    """

    def on_part(self, captured: Captured, inspected: Inspected) -> None:
        """One part, on the camera's thread."""
        ...


PAUSED = "paused"
"""Why a live frame was dropped: the camera was paused."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
"""Pause between attempts to reopen a camera, seconds: doubles from the first to the longest."""

_HOPELESS = (ConfigError, UsageError, MissingDependencyError)
"""Errors that another attempt cannot cure."""


@final
class CameraWorker:
    """Captures and inspects the parts of one camera.

    Args:
        name: the camera's name.
        open_source: opens the image source; called again for each attempt after a failure.
        inspector: inspects the frames.
        capture: how frames are queued.
        listeners: get every part after its verdict.
        tracker: follows the parts' numbers and deadlines; left out, parts have neither.
        waits: whether the source is a folder in which files arrive.
        clock: monotonic, seconds.

    Raises:
        EdgeFlameError: there is no such source.
    """

    def __init__(
        self,
        name: str,
        open_source: Callable[[], Source],
        inspector: InspectorProtocol,
        capture: CaptureConfig,
        *,
        listeners: Sequence[PartListener] = (),
        tracker: PartTracker | None = None,
        waits: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._waits = waits
        self._open_source = open_source
        self._source = open_source()
        self._inspector = inspector
        self._threshold_set = False
        self._config = capture
        self._listeners = tuple(listeners)
        self._tracker = PartTracker(name, TriggerConfig(), PartsConfig()) if tracker is None else tracker
        self._clock = clock
        self._frame_lock = FrameLock(name)
        self._resumed = threading.Event()
        self._resumed.set()
        self._snapshots: queue.SimpleQueue[queue.SimpleQueue[Inspected]] = queue.SimpleQueue()
        self._goldens = GoldenRequests(clock)
        self._capture: Capture | None = None
        self._unread: list[Captured] = []
        self._dropped: collections.Counter[str] = collections.Counter()
        self._crashes = RestartBudget(name, clock)
        self._next_sequence = 0
        self._ended = False
        self._problem: str | None = None
        self._busy_since: float | None = None
        self.parts = 0
        """Number of parts inspected since the start, without golden ones."""

    # Any thread may call these.

    @property
    def inspector(self) -> InspectorProtocol:
        """The inspector in use now."""
        return self._inspector

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest picture in a file that is decoded."""
        return self._config.max_pixels

    @property
    def is_live(self) -> bool:
        """Whether the images come from a camera or stream, which does not wait for us."""
        return self._source.is_live

    @property
    def is_endless(self) -> bool:
        """Whether its source ends only when it is stopped."""
        return self._source.is_endless

    @property
    def is_paused(self) -> bool:
        return not self._resumed.is_set()

    @property
    def dropped(self) -> collections.Counter[str]:
        """Number of frames dropped without inspection so far, by reason."""
        capture = self._capture
        return self._dropped + self._tracker.dropped + (capture.dropped if capture else collections.Counter())

    @property
    def busy_s(self) -> float:
        """How long the present frame has been in work, seconds; 0 between frames, unless the model is still busy with
        a frame whose deadline has passed.
        """
        since = self._busy_since
        own = 0.0 if since is None else max(0.0, self._clock() - since)
        return max(own, self._tracker.busy_s())

    def status(self) -> CameraStatus:
        """The camera's status now."""
        inspector, busy_s = self._inspector, self.busy_s
        hangs = f"one part has been in hand for {busy_s:.0f} s" if busy_s > PATIENCE_S else None
        return CameraStatus(
            camera=self.name,
            source=self._source.name,
            product=inspector.product,
            model=inspector.model_id,
            provider=inspector.provider,
            threshold=inspector.threshold,
            threshold_set=self._threshold_set,
            paused=self.is_paused,
            ended=self._ended,
            waits=self._waits,
            trial=inspector.is_trial,
            problem=hangs or self._tracker.problem() or self._problem,
            parts=self.parts,
            dropped=dict(self.dropped),
            counts=copy.copy(self._tracker.counts),
            trigger_up=self._tracker.trigger_up,
        )

    @property
    def has_sequence(self) -> bool:
        """Whether its parts have numbers or names that mean something."""
        return self._tracker.has_sequence

    def restore(self, past: Iterable[Result]) -> None:
        """Restore what is known of parts' numbers and names from earlier results, oldest first."""
        self._tracker.restore(past)

    def pause(self) -> None:
        """Inspect no more frames. A live camera's are dropped and counted; files and triggered parts wait."""
        self._resumed.clear()

    def resume(self) -> None:
        """Inspect again after :meth:`pause`."""
        self._resumed.set()

    def set_threshold(self, value: float | None) -> None:
        """Set the threshold from the next frame on.

        Args:
            value: raw distance; None: the inspector's own.

        Raises:
            RuntimeUnavailableError: the frame being inspected does not come to an end.
        """
        with self._frame_lock.between_frames():
            self._inspector.set_threshold(value)
            self._threshold_set = value is not None

    def replace_inspector(self, inspector: InspectorProtocol, *, threshold: float | None = None) -> InspectorProtocol:
        """Use another inspector from the next frame on; returns the one before. No frame is lost between them.

        Args:
            inspector: the new one.
            threshold: raw distance in place of the new inspector's own; None: its own.

        Raises:
            RuntimeUnavailableError: the frame being inspected does not come to an end.
        """
        with self._frame_lock.between_frames():
            if threshold is not None:
                inspector.set_threshold(threshold)
            before, self._inspector, self._threshold_set = self._inspector, inspector, threshold is not None
        return before

    def add_listener(self, listener: PartListener) -> None:
        """Call a listener for every part from the next one on."""
        self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: PartListener) -> None:
        """Stop calling a listener; does nothing if it is not registered."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)

    def snapshot(self, timeout_s: float) -> Inspected | None:
        """The next inspected part, with its evidence; None if none came in time."""
        answer: queue.SimpleQueue[Inspected] = queue.SimpleQueue()
        self._snapshots.put(answer)
        try:
            return answer.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def next_golden_part(self, timeout_s: float) -> Inspected | None:
        """The next part, marked as golden; None if none came in time, and then no later part is marked."""
        return self._goldens.wait_for_one(timeout_s)

    def inspect_photograph(self, captured: Captured) -> Inspected:
        """Inspect a photograph between two frames; its result goes to the caller alone.

        Raises:
            RuntimeUnavailableError: the frame being inspected does not come to an end.
        """
        with self._frame_lock.between_frames():
            return self._inspector.inspect_photograph(captured)

    # The loop.

    def run(self, accept: Callable[[Inspected], None], halt: threading.Event) -> None:
        """Inspect until the source ends or ``halt`` is set; a part being inspected still gets its verdict.

        Args:
            accept: called with every result; an exception of it ends the run.
            halt: ends the run.

        Raises:
            EdgeFlameError: a source that has an end cannot be read, or one without for want of something installed;
                ``accept`` raised it, or there were too many unexpected errors.
        """
        try:
            self._run(accept, halt)
        except CrashLoopError:
            self._report_unread(accept)
            raise
        else:
            self._report_unread(accept)
        finally:
            self._tracker.close()

    def _run(self, accept: Callable[[Inspected], None], halt: threading.Event) -> None:
        backoff, is_out = Backoff(FIRST_DELAY_S, LONGEST_DELAY_S, jitter=0.0), False
        while not halt.is_set():
            first = self._next_sequence
            try:
                self._run_once(accept, halt)
            except _NotTakenError as exc:
                raise exc.cause from None
            except (StorageError, CrashLoopError, *_HOPELESS):
                raise
            except EdgeFlameError as exc:
                if not self.is_endless:
                    self._problem = str(exc)
                    raise
                reason = str(exc)
            except Exception as exc:
                self._crashes.record(exc)
                if not self.is_endless:
                    # Read from its beginning again, the source would give its parts a second time.
                    raise CrashLoopError(
                        f"camera {self.name}: the source failed unexpectedly: {without_secrets(repr(exc))}"
                    ) from exc
                reason = f"an unexpected error: {without_secrets(repr(exc))}"
            else:
                if halt.is_set() or not self.is_endless:
                    self._ended = not halt.is_set()
                    return
                reason = "the source ended, which it never should"
            if self._next_sequence > first:
                backoff.reset()
                is_out = False
            self._problem = reason
            if not is_out:
                is_out = True
                try:
                    self._report_outage(reason, accept)
                except _NotTakenError as exc:
                    raise exc.cause from None
            delay_s = backoff.next_delay()
            log.warning("camera_lost", camera=self.name, reason=reason, retry_in_s=delay_s)
            halt.wait(delay_s)
            self._try_to_reopen()

    def _run_once(self, accept: Callable[[Inspected], None], halt: threading.Event) -> None:
        self._capture = Capture(self._source, self._config, halt, first=self._next_sequence)
        ahead = self._prefetching(self._capture, halt)
        try:
            with ahead as frames:
                for captured in frames:
                    self._next_sequence = captured.sequence + 1
                    wanted = captured if self._resumed.is_set() else self._wait_while_paused(captured, halt)
                    if wanted is not None:
                        self._process(wanted, accept)
        finally:
            self._dropped += self._capture.dropped
            self._unread += self._tracker.unfinished(ahead.unread())
            self._capture = None

    def _report_unread(self, accept: Callable[[Inspected], None]) -> None:
        """Give parts that were announced before the end, and not inspected any more, the verdict ``unknown``."""
        unread, self._unread = self._unread, []
        for captured in unread:
            placed = dataclasses.replace(captured, sequence=self._next_sequence)
            self._next_sequence += 1
            detail = "the inspection was stopped before its turn"
            self.parts += 1
            accept(self._tracker.finish(self._inspector, placed, unscored(placed, Reason.NOT_SCORED, detail)))

    def _prefetching(self, capture: Capture, halt: threading.Event) -> PrefetchPool | Capture:
        """The capture's frames, observed ahead of their turn if the inspector offers that."""
        observer = self._inspector.observer
        # A model that hangs would block the prefetching, and the parts behind it would miss their deadlines.
        if observer is None or self._tracker.has_deadline:
            return capture
        return PrefetchPool(
            capture,
            lambda: self._inspector.observer if self._resumed.is_set() else None,
            halt,
            count=observer.num_parallel,
        )

    def _wait_while_paused(self, captured: Captured, halt: threading.Event) -> Captured | None:
        """Handle a frame that came during a pause: a live camera's is dropped (None), any other waits for its end.

        A part that was announced is not dropped; it waits until its deadline.
        """
        is_announced = captured.frame.trigger is not None
        if self.is_live and not is_announced:
            self._dropped[PAUSED] += 1
            return None
        due = self._tracker.due_s(captured) if is_announced else None
        while not self._resumed.wait(0.2 if due is None else max(0.0, min(0.2, due - self._clock()))):
            if halt.is_set():
                return captured if is_announced else None
            if due is not None and self._clock() >= due:
                break
        if is_announced:
            return captured
        # A file waits for us: its latency begins now.
        return dataclasses.replace(
            captured, frame=dataclasses.replace(captured.frame, captured_monotonic_s=self._clock())
        )

    def _process(self, captured: Captured, accept: Callable[[Inspected], None]) -> None:
        self._busy_since = self._clock()
        try:
            with self._frame_lock.hold_frame():
                inspected = self._goldens.mark_if_golden(self._marked(self._inspect(captured)), captured)
            self.parts += not inspected.result.golden
            if captured.frame.image_bgr is not None:
                self._problem = None
            elif captured.frame.error is not None and self.is_live and captured.frame.fault in (None, Reason.NO_IMAGE):
                self._problem = captured.frame.error
            try:
                accept(inspected)
            except Exception as exc:
                raise _NotTakenError(exc) from exc
        finally:
            self._busy_since = None
        while not self._snapshots.empty():
            self._snapshots.get().put(inspected)
        for listener in self._listeners:
            try:
                listener.on_part(captured, inspected)
            except Exception as exc:  # noqa: BLE001 - a listener must not break the line
                log.error("watcher_failed", camera=self.name, watcher=type(listener).__name__, reason=repr(exc))
                self.remove_listener(listener)
        self._tracker.raise_if_hung()

    def _inspect(self, captured: Captured) -> Inspected:
        try:
            observation = self._tracker.inspect(self._inspector, captured)
        except Exception as exc:  # noqa: BLE001 - the outermost frame of a camera's loop
            self._crashes.record(exc)
            observation = unscored(captured, Reason.RUNTIME_FAILED, f"an unexpected error: {exc!r}")
        return self._tracker.finish(self._inspector, captured, observation)

    def _marked(self, inspected: Inspected) -> Inspected:
        """The part, marked as a trial's if a model on trial looked at it alone."""
        if not self._inspector.is_trial:
            return inspected
        return dataclasses.replace(inspected, result=structs.replace(inspected.result, trial=True))

    def _report_outage(self, reason: str, accept: Callable[[Inspected], None]) -> None:
        """Report an outage as one part with the verdict ``unknown``: parts that were not seen never pass."""
        frame = make_frame(
            part_id=f"outage-{self._next_sequence:06d}",
            source=self._source.name,
            error=f"parts may pass unseen: {reason}",
        )
        # A fault without a trigger: the tracker does not take it for a part, nor count a missing number.
        frame = dataclasses.replace(frame, fault=Reason.UNREADABLE)
        captured = Captured(sequence=self._next_sequence, frame=frame)
        self._next_sequence += 1
        self._process(captured, accept)
        self._problem = reason

    def _try_to_reopen(self) -> None:
        """Open the source anew; if that fails, the old one is read again, and its error gives the reason."""
        with contextlib.suppress(EdgeFlameError):
            self._source = self._open_source()


class _NotTakenError(Exception):
    """A result could not be handed on; wraps the error so that it is not taken for the camera's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
