"""The part tracker of a camera: triggers, the age of images, deadlines, and the parts' numbers and duplicates."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import final

from edge.config.inspection import CaptureConfig, PartsConfig, TriggerConfig
from edge.config.outputs import MqttConfig
from edge.frame import Captured, Frame, Source
from edge.inspector import InspectorProtocol
from edge.parts.deadline import BoundedCall
from edge.parts.mqtt_trigger import MAX_NUMBER
from edge.parts.sequence import SequenceCheck, SequenceFinding, check_parts, number_range
from edge.parts.triggers import TriggeredCamera, capture_of
from edge.result import Inspected, Reason, Result
from edge.status import PartCounts
from edge.verdict import Observation, make_result, unscored, with_evidence
from edgeflame.errors import ConfigError, CrashLoopError
from edgeflame.log import EventLog

log = EventLog("parts")


@final
class PartTracker:
    """Tracks the parts of one camera. Not thread-safe, but for :meth:`problem` and :meth:`busy_s`.

    Args:
        camera: the camera's name.
        trigger: section ``[trigger]``.
        parts: section ``[parts]``.
        clock: monotonic, seconds.

    Raises:
        ConfigError: the two sections contradict each other.
    """

    def __init__(
        self, camera: str, trigger: TriggerConfig, parts: PartsConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_parts(trigger, parts)
        self._camera = camera
        self._parts = parts
        self.counts = PartCounts()
        self._clock = clock
        self._trigger = trigger
        self._announced: TriggeredCamera | None = None
        self._has_sequence = trigger.is_on or parts.number is not None
        self._sequence = SequenceCheck(
            wrap=number_range(trigger, parts), max_gap=parts.max_gap, remembered=parts.dedup_window
        )
        self._number = None if parts.number is None else re.compile(parts.number)
        self._model = (
            BoundedCall(camera=camera, counts=self.counts, clock=clock) if parts.deadline_ms is not None else None
        )

    def source_opener(self, open_source: Callable[[], Source], mqtt: MqttConfig | None) -> Callable[[], Source]:
        """A function that opens the camera's source, combined with its trigger if parts are announced.

        Args:
            open_source: opens the image source alone.
            mqtt: section ``[mqtt]``.
        """
        if not self._trigger.is_on:
            return open_source
        self._announced = TriggeredCamera(
            self._camera, open_source, self._trigger, self._parts, mqtt=mqtt, counts=self.counts
        )
        return self._announced.open

    def capture_config(self, config: CaptureConfig, *, is_live: bool) -> CaptureConfig:
        """How the camera's frames are queued: as configured, but announced parts are never dropped.

        Args:
            config: section ``[capture]``.
            is_live: whether frames come from a camera.

        Raises:
            ConfigError: the policy would drop announced parts, or ``parts.number`` is set and frames have no names.
        """
        if is_live and self._number is not None and not self._trigger.is_on:
            raise ConfigError(
                "[parts] number reads the names of files and of announced parts; the frames of a camera without "
                "[trigger] have none of their own"
            )
        return capture_of(config) if self._trigger.is_on else config

    def unfinished(self, unread: Sequence[Captured]) -> list[Captured]:
        """After the end: parts that were announced and have no verdict yet, in order.

        Args:
            unread: frames that were captured and not taken.
        """
        if self._announced is None:
            return []
        sequence = unread[-1].sequence + 1 if unread else 0
        frames = self._announced.unfinished()
        return [*unread, *(Captured(sequence=sequence + index, frame=frame) for index, frame in enumerate(frames))]

    @property
    def has_sequence(self) -> bool:
        """Whether its parts have numbers or names of their own."""
        return self._has_sequence

    @property
    def has_deadline(self) -> bool:
        """Whether a verdict may come too late."""
        return self._parts.deadline_ms is not None

    @property
    def trigger_up(self) -> bool | None:
        """Whether parts can be announced; None if every frame is a part."""
        return None if self._announced is None else self._announced.problem() is None

    @property
    def dropped(self) -> collections.Counter[str]:
        """Frames of the camera that belonged to no part, by reason."""
        return collections.Counter() if self._announced is None else self._announced.dropped

    def restore(self, past: Iterable[Result]) -> None:
        """Add earlier results, oldest first, so that gaps and duplicates are noticed over a restart."""
        if self._has_sequence:
            for result in past:
                if result.camera == self._camera:
                    self._sequence.check(result.part_id, result.part_number)

    def inspect(self, inspector: InspectorProtocol, captured: Captured) -> Observation:
        """The observation of one part, at its deadline at the latest; :meth:`finish` makes the result.

        Raises:
            Exception: the inspector raised it.
        """
        frame = captured.frame
        if frame.image_bgr is None:
            return unscored(captured, frame.fault or Reason.UNREADABLE, frame.error or "the source gave no image")
        age_ms = 1000 * (self._clock() - frame.captured_monotonic_s)
        if self._parts.max_age_ms is not None and age_ms > self._parts.max_age_ms:
            detail = f"its image was captured {age_ms:.0f} ms ago; parts.max_age_ms is {self._parts.max_age_ms:g}"
            return unscored(captured, Reason.STALE, detail)
        due_s = self.due_s(captured)
        if self._model is None or due_s is None:
            return inspector.inspect(captured)
        return self._model.inspect(inspector, captured, due_s)

    def finish(self, inspector: InspectorProtocol, captured: Captured, observation: Observation) -> Inspected:
        """The result of a part: late after the deadline, and with the findings about its number.

        To be called once for each part, in order.

        Args:
            inspector: its threshold decides.
            captured: the part's frame.
            observation: what was found about the frame.
        """
        due_s = self.due_s(captured)
        number, finding = self._check_sequence(captured.frame)
        result = make_result(
            captured,
            observation,
            camera=self._camera,
            model=inspector.model_id,
            threshold=inspector.threshold,
            review_band=inspector.review_band,
            now_s=self._clock(),
            due_s=due_s,
            number=number,
            sequence=finding,
        )
        self.counts.late += result.late
        self.counts.missing += result.parts_missing
        self.counts.duplicates += result.duplicate
        return with_evidence(result, captured, observation, due_s=due_s)

    def due_s(self, captured: Captured) -> float | None:
        """The part's deadline, seconds on the clock; None: it has none."""
        if self._parts.deadline_ms is None:
            return None
        frame = captured.frame
        since = frame.captured_monotonic_s if frame.trigger is None else frame.trigger.at_s
        return since + self._parts.deadline_ms / 1000

    def problem(self) -> str | None:
        """Why parts cannot be announced or inspected at present; None if they can."""
        if self._announced is not None and (unannounced := self._announced.problem()) is not None:
            return unannounced
        if self._announced is not None and (away := self._announced.camera_problem()) is not None:
            return away
        if self._model is None or self._parts.deadline_ms is None:
            return None
        busy_s = self._model.busy_s()
        if 1000 * busy_s < self._parts.deadline_ms:
            return None
        return f"the model has been busy with one image for {busy_s:.1f} s"

    def busy_s(self) -> float:
        """How long the model has been busy with one image, seconds, even if the deadline has passed; any thread."""
        return 0.0 if self._model is None else self._model.busy_s()

    def raise_if_hung(self) -> None:
        """Raise if the model hangs; to be called after a part was handed on.

        Raises:
            CrashLoopError: the model has been busy for longer than ``hang_s``; only a new start helps.
        """
        if self._model is not None and self._model.busy_s() > self._parts.hang_s:
            raise CrashLoopError(
                f"camera {self._camera}: the model has been busy with one image for more than {self._parts.hang_s:g} s"
                " (parts.hang_s); the daemon has to be started again"
            )

    def close(self) -> None:
        """End the model's thread."""
        if self._model is not None:
            self._model.close()

    def _check_sequence(self, frame: Frame) -> tuple[int | None, SequenceFinding | None]:
        """A part's number and its place among the others; None each if parts have no numbers and names of their own."""
        if not self._has_sequence or (frame.trigger is None and (self._trigger.is_on or frame.fault is not None)):
            # An outage is not a part.
            return None, None
        name = frame.part_id if frame.trigger is None else frame.trigger.part_id
        number = None if frame.trigger is None else frame.trigger.number
        if number is None and name is not None:
            number = self._number_in(name)
        finding = self._sequence.check(name, number)
        if finding.describe(number) is not None:
            log.warning(
                "parts_out_of_sequence",
                kind=finding.kind.value,
                camera=self._camera,
                part=frame.part_id,
                number=number,
                last=finding.last,
                missing=finding.missing,
            )
        return number, finding

    def _number_in(self, name: str) -> int | None:
        found = None if self._number is None else self._number.search(name)
        digits = None if found is None else found.group(1)
        if digits is None or not digits.isdecimal() or len(digits) > 19:
            return None
        number = int(digits)
        return number if number <= MAX_NUMBER else None
