"""A camera whose parts are announced: a source that gives one frame for each trigger, and none without."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

from edge.parts.counts import PartCounts
from edge.parts.matching import Match, Matcher, Window
from edge.parts.trigger import Trigger, TriggerSource
from edge.sources import Frame, Source
from edgeflame.console import EventLog

log = EventLog("trigger")

_POLL_S = 0.2
"""How often a waiting reader looks whether it should stop; what comes wakes it at once."""

_STOP_TIMEOUT_S = 3.0


class TriggeredSource:
    """Frames of a live source, one a trigger.

    A part without an image gets a frame without one, with the reason; the camera's other frames are dropped and
    counted. Reading, triggers and the caller are three threads, joined by one lock around a pure matcher.

    Args:
        source: a camera or stream.
        trigger: says when a part is there.
        window: when an image is an image of a part.
        counts: of parts.
        dropped: counts the camera's frames that are never looked at, by reason.
    """

    is_live = True
    is_endless = True
    num_frames: int | None = None

    def __init__(
        self,
        source: Source,
        trigger: TriggerSource,
        window: Window,
        *,
        counts: PartCounts,
        dropped: collections.Counter[str],
    ) -> None:
        self.name = source.name
        self._source = source
        self._trigger = trigger
        self._matcher: Matcher[Frame] = Matcher(window, dropped)
        self._counts = counts
        self._changed = threading.Condition()
        self._ended: str | None = None
        self._failure: BaseException | None = None
        self._num_unnamed = 0

    def problem(self) -> str | None:
        """Why no part can be announced at present; None if it can."""
        reason = self._trigger.problem()
        return None if reason is None else f"no trigger can come: {reason}"

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """One frame for each trigger, in order, until ``stop`` is set.

        Raises:
            EdgeFlameError: the camera cannot be opened.
        """
        done = threading.Event()
        reader = threading.Thread(target=self._read, args=(done,), name="edgeflame-triggered", daemon=True)
        reader.start()
        with contextlib.ExitStack() as stack:
            stack.callback(self._join, reader, done)
            stack.callback(self._trigger.close)
            self._trigger.open(self._accept)
            while not stop.is_set():
                with self._changed:
                    match = self._next()
                    if match is None and self._ended is not None:
                        if self._failure is not None:
                            raise self._failure
                        return
                    if match is None:
                        self._changed.wait(self._patience_s())
                        continue
                yield self._frame(match)

    def unfinished(self) -> list[Frame]:
        """After the end of :meth:`frames`: the parts that were announced and not given, in order, without images."""
        with self._changed:
            self._matcher.close("the inspection was stopped")
            return [self._frame(match) for match in self._matcher.matches()]

    def _next(self) -> Match[Frame] | None:
        self._matcher.advance(time.monotonic())
        return next(self._matcher.matches(), None)

    def _patience_s(self) -> float:
        wake_at = self._matcher.wake_at()
        return _POLL_S if wake_at is None else min(_POLL_S, max(0.0, wake_at - time.monotonic()))

    def _frame(self, match: Match[Frame]) -> Frame:
        trigger = match.trigger
        part_id = trigger.part_id or ("" if trigger.number is None else f"part-{trigger.number}")
        if not part_id:
            self._num_unnamed += 1
            part_id = f"trigger-{self._num_unnamed:06d}"
        if match.image is None:
            return Frame(
                part_id=part_id,
                source=self.name,
                image_bgr=None,
                error=match.detail,
                fault=match.reason,
                captured_monotonic_s=trigger.at_s,
                captured_utc=trigger.at_utc,
                trigger=trigger,
            )
        return dataclasses.replace(match.image, part_id=part_id, trigger=trigger, missed={})

    def _read(self, done: threading.Event) -> None:
        """The camera's own thread."""
        reason = "the camera ended"
        try:
            for frame in self._source.frames(done):
                with self._changed:
                    self._matcher.dropped.update(frame.missed)
                    if frame.image_bgr is None:
                        self._matcher.camera_away(frame.error or "it gave no image")
                    else:
                        self._matcher.add_image(frame, frame.captured_monotonic_s, time.monotonic())
                    self._changed.notify_all()
                if done.is_set():
                    break
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the reader raises it
            self._failure, reason = exc, str(exc)
        finally:
            with self._changed:
                self._matcher.close(reason)
                self._ended = reason
                self._changed.notify_all()

    def _accept(self, trigger: Trigger) -> None:
        """A trigger, on its transport's thread."""
        with self._changed:
            self._counts.triggers += 1
            taken = self._matcher.add_trigger(trigger, time.monotonic())
            self._counts.triggers_lost += not taken
            if self._ended is not None:
                self._matcher.close(self._ended)
            self._changed.notify_all()
        if not taken:
            log.error("trigger_not_taken", part=trigger.part_id, number=trigger.number, lost=self._counts.triggers_lost)

    def _join(self, reader: threading.Thread, done: threading.Event) -> None:
        done.set()
        reader.join(_STOP_TIMEOUT_S)
        if reader.is_alive():
            log.warning("source_does_not_stop", source=self.name, waited_s=_STOP_TIMEOUT_S)
