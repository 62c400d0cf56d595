"""Sources of announced parts: a live source combined with a trigger source gives one frame for each trigger."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

import msgspec

from edge.config.inspection import CaptureConfig, MqttTriggerConfig, PartsConfig, TriggerConfig
from edge.config.outputs import MqttConfig
from edge.delivery.mqtt import broker_url
from edge.frame import Frame, Source, Trigger, TriggerSource
from edge.parts.matching import Match, Matcher, MatchWindow
from edge.parts.mqtt_trigger import MqttTrigger
from edge.parts.sequence import number_range
from edge.status import PartCounts
from edgeflame.background import BackgroundThread, Backoff
from edgeflame.errors import ConfigError, DataError, LinkError, UsageError, require_extra
from edgeflame.log import EventLog
from edgeflame.mqtt.client import new_client_id
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, parse_broker_url

log = EventLog("trigger")

_POLL_S = 0.2
"""How often a waiting reader checks whether it should stop, seconds; frames and triggers wake it at once."""

_STOP_TIMEOUT_S = 3.0

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
"""Pause between attempts to reopen a camera, seconds: doubles from the first to the longest."""


class TriggeredSource:
    """A source that yields one frame of a live source for each trigger.

    A part without an image gets a frame with the reason in place of an image; the camera's other frames are dropped
    and counted. The reading thread, the trigger's thread and the caller share a pure matcher under one lock.

    A camera that fails, be it at the start, is opened again here, with growing pauses, because triggers go on
    meanwhile: parts announced while it is away get frames without images.

    Args:
        source: a camera or stream.
        trigger: announces the parts.
        window: the times in which an image is taken for a part's.
        counts: triggers are counted here.
        dropped: counts the camera's frames that are dropped, by reason.
    """

    is_live = True
    is_endless = True
    num_frames: int | None = None

    def __init__(
        self,
        source: Source,
        trigger: TriggerSource,
        window: MatchWindow,
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
        self._backoff = Backoff(FIRST_DELAY_S, LONGEST_DELAY_S, jitter=0.0)
        self._num_unnamed = 0

    def problem(self) -> str | None:
        """Why no part can be announced at present; None if it can."""
        reason = self._trigger.problem()
        return None if reason is None else f"no trigger can come: {reason}"

    def camera_problem(self) -> str | None:
        """Why the camera gives no images at present; None if it does, or was not asked yet."""
        with self._changed:
            return self._matcher.away

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """One frame for each trigger, in order, until ``stop`` is set.

        Raises:
            EdgeFlameError: what reads the camera is not installed.
        """
        reader = BackgroundThread("triggered", self._read, join_s=_STOP_TIMEOUT_S)
        reader.start()
        with contextlib.ExitStack() as stack:
            stack.callback(self._join, reader)
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
        """After the end of :meth:`frames`: frames of the announced parts that were not yielded, in order."""
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
            while (lost := self._read_until_lost(done)) is not None:
                delay_s = self._backoff.next_delay()
                log.warning("camera_lost", source=self.name, reason=lost, retry_in_s=delay_s)
                if done.wait(delay_s):
                    break
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the reader raises it
            self._failure, reason = exc, str(exc)
        finally:
            with self._changed:
                self._matcher.close(reason)
                self._ended = reason
                self._changed.notify_all()

    def _read_until_lost(self, done: threading.Event) -> str | None:
        """Read the camera until it ends (returns None) or fails (returns the reason)."""
        try:
            for frame in self._source.frames(done):
                self._backoff.reset()
                with self._changed:
                    self._matcher.dropped.update(frame.missed)
                    if frame.image_bgr is None:
                        self._matcher.camera_away(frame.error or "it gave no image")
                    else:
                        self._matcher.add_image(frame, frame.captured_monotonic_s, time.monotonic())
                    self._changed.notify_all()
                if done.is_set():
                    break
        except DataError as exc:
            with self._changed:
                self._matcher.camera_away(f"parts may pass unseen: {exc}")
                self._changed.notify_all()
            return str(exc)
        return None

    def _accept(self, trigger: Trigger) -> None:
        """Take a trigger, on the trigger source's thread."""
        with self._changed:
            self._counts.triggers += 1
            taken = self._matcher.add_trigger(trigger, time.monotonic())
            self._counts.triggers_lost += not taken
            if self._ended is not None:
                self._matcher.close(self._ended)
            self._changed.notify_all()
        if not taken:
            log.error("trigger_not_taken", part=trigger.part_id, number=trigger.number, lost=self._counts.triggers_lost)

    def _join(self, reader: BackgroundThread) -> None:
        if not reader.close():
            log.warning("source_does_not_stop", source=self.name, waited_s=_STOP_TIMEOUT_S)


@final
class TriggeredCamera:
    """Opens a camera together with its trigger source, as often as the camera worker needs it.

    Args:
        camera: the camera's name.
        open_source: opens the image source.
        trigger: section ``[trigger]``.
        parts: section ``[parts]``.
        mqtt: section ``[mqtt]``; None: there is none.
        counts: triggers are counted here.
    """

    def __init__(
        self,
        camera: str,
        open_source: Callable[[], Source],
        trigger: TriggerConfig,
        parts: PartsConfig,
        *,
        mqtt: MqttConfig | None,
        counts: PartCounts,
    ) -> None:
        self._camera = camera
        self._open_source = open_source
        self._trigger = trigger
        self._parts = parts
        self._mqtt = mqtt
        self._counts = counts
        self._source: TriggeredSource | None = None
        self.dropped: collections.Counter[str] = collections.Counter()
        """Number of frames of the camera that belonged to no part, by reason, since the start."""

    def open(self) -> Source:
        """Open the camera with its trigger source; both start working when frames are read.

        Raises:
            ConfigError: the source is not live, so every file or frame is a part already, or settings are wrong.
            EdgeFlameError: there is no such camera, or the trigger source cannot be made.
        """
        source = self._open_source()
        if not source.is_live:
            raise ConfigError(f"[trigger] is for cameras: of {source.name} every file or frame is a part already")
        deadline_ms = self._parts.deadline_ms
        window = MatchWindow(
            delay_s=self._trigger.delay_ms / 1000,
            window_s=self._trigger.window_ms / 1000,
            lookback_s=self._trigger.lookback_ms / 1000,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000,
        )
        transport = trigger_source(self._camera, self._trigger, self._parts, self._mqtt)
        self._source = TriggeredSource(source, transport, window, counts=self._counts, dropped=self.dropped)
        return self._source

    def unfinished(self) -> list[Frame]:
        """After the end: frames of the announced parts that were not yielded."""
        return [] if self._source is None else self._source.unfinished()

    def problem(self) -> str | None:
        """Why no part can be announced at present; None if it can."""
        return None if self._source is None else self._source.problem()

    def camera_problem(self) -> str | None:
        """Why the camera gives no images at present; None if it does."""
        return None if self._source is None else self._source.camera_problem()


def trigger_source(camera: str, trigger: TriggerConfig, parts: PartsConfig, mqtt: MqttConfig | None) -> TriggerSource:
    """The trigger source of a camera, not yet opened.

    Raises:
        ConfigError: the settings are wrong or incomplete.
        MissingDependencyError: it needs an extra that is not installed.
    """
    if trigger.modbus is None:
        assert trigger.mqtt is not None
        return _over_mqtt(camera, trigger.mqtt, mqtt)
    with require_extra("plc", "[trigger.modbus] needs pymodbus"):
        from edge.parts.modbus_trigger import ModbusTrigger
    return ModbusTrigger(
        trigger.modbus,
        counting=number_range(trigger, parts) if trigger.modbus.is_counter else None,
        max_gap=parts.max_gap,
        window_s=trigger.window_ms / 1000,
    )


def _over_mqtt(camera: str, config: MqttTriggerConfig, mqtt: MqttConfig | None) -> TriggerSource:
    topic = config.topic
    if topic is None:
        if mqtt is None:
            raise ConfigError("trigger.mqtt.topic is missing; only with [mqtt] there is a topic of the line's own")
        topic = Topics(fleet=mqtt.fleet).line_trigger(mqtt.line)
    name = new_client_id(f"trigger-{camera}")
    try:
        return MqttTrigger(_url(config, mqtt), topic=topic, client_id=name, config=config)
    except (UsageError, LinkError) as exc:
        raise ConfigError(f"trigger.mqtt: {exc}") from exc


def _url(config: MqttTriggerConfig, mqtt: MqttConfig | None) -> BrokerUrl:
    if config.broker is None:
        if mqtt is None:
            raise ConfigError("trigger.mqtt.broker is missing, and there is no section [mqtt] whose broker it could be")
        return broker_url(mqtt)
    ca, cert, key = (Path(path) if path else None for path in (config.ca, config.cert, config.key))
    return parse_broker_url(config.broker, tls=TlsFiles(ca=ca, cert=cert, key=key))


def capture_of(config: CaptureConfig) -> CaptureConfig:
    """How the frames of announced parts are queued: with the policy ``wait``, so that none is dropped.

    Raises:
        ConfigError: the policy ``latest`` is configured.
    """
    if config.policy == "latest":
        raise ConfigError('capture.policy = "latest" would drop announced parts; leave it out, or out of this camera')
    return msgspec.structs.replace(config, policy="wait")
