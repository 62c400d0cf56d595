"""From the configuration to a camera whose parts are announced, and what the line has to know of it."""

from __future__ import annotations

import collections
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import final

import msgspec

from edge.capture import CaptureConfig
from edge.delivery.mqtt import MqttConfig, broker_url
from edge.parts.config import MqttTriggerConfig, PartsConfig, TriggerConfig, number_range
from edge.parts.counts import PartCounts
from edge.parts.matching import Window
from edge.parts.mqtt import MqttTrigger
from edge.parts.source import TriggeredSource
from edge.parts.trigger import TriggerSource
from edge.sources import Frame, Source
from edgeflame.brokerurl import BrokerUrl, TlsFiles, parse_broker_url
from edgeflame.errors import ConfigError, LinkError, MissingDependencyError, UsageError
from edgeflame.topics import Topics


@final
class Announced:
    """Opens a camera whose parts are announced, as often as the line asks for it.

    Args:
        camera: its name.
        open_source: gives the camera.
        trigger: how its parts are announced.
        parts: what is asked of them.
        mqtt: the section ``[mqtt]``.
        counts: of parts.

    Raises:
        ConfigError: it cannot be done so.
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
        """Frames of the camera that no part claimed, by reason; over all times that it was opened."""

    def open(self) -> Source:
        """The camera with its trigger, neither of them at work yet.

        Raises:
            EdgeFlameError: there is no such camera, or it needs no trigger.
        """
        source = self._open_source()
        if not source.is_live:
            msg = f"[trigger] is for cameras: of {source.name} every file or frame is a part already"
            raise ConfigError(msg)
        deadline_ms = self._parts.deadline_ms
        window = Window(
            delay_s=self._trigger.delay_ms / 1000,
            window_s=self._trigger.window_ms / 1000,
            lookback_s=self._trigger.lookback_ms / 1000,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000,
        )
        transport = trigger_source(self._camera, self._trigger, self._parts, self._mqtt)
        self._source = TriggeredSource(source, transport, window, counts=self._counts, dropped=self.dropped)
        return self._source

    def unfinished(self) -> list[Frame]:
        """After the end: parts that were announced, and that the line has not seen."""
        return [] if self._source is None else self._source.unfinished()

    def problem(self) -> str | None:
        """Why no part can be announced at present; None if it can."""
        return None if self._source is None else self._source.problem()


def trigger_source(camera: str, trigger: TriggerConfig, parts: PartsConfig, mqtt: MqttConfig | None) -> TriggerSource:
    """What announces a camera's parts, not yet at work.

    Raises:
        ConfigError: the settings make no sense, or something is missing among them.
        MissingDependencyError: it needs an extra that is not installed.
    """
    if trigger.modbus is None:
        assert trigger.mqtt is not None
        return _over_mqtt(camera, trigger.mqtt, mqtt)
    try:
        from edge.parts.modbus import ModbusTrigger
    except ImportError as exc:
        msg = f"[trigger.modbus] needs the extra 'plc': pip install 'edgeflame[plc]' ({exc.name} is missing)"
        raise MissingDependencyError(msg) from exc
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
            msg = "trigger.mqtt.topic is missing; only with [mqtt] there is a topic of the line's own"
            raise ConfigError(msg)
        topic = Topics(fleet=mqtt.fleet).line_trigger(mqtt.line)
    name = f"edgeflame-trigger-{camera}-{uuid.uuid4().hex[:12]}"
    try:
        return MqttTrigger(_url(config, mqtt), topic=topic, client_id=name, config=config)
    except (UsageError, LinkError) as exc:
        msg = f"trigger.mqtt: {exc}"
        raise ConfigError(msg) from exc


def _url(config: MqttTriggerConfig, mqtt: MqttConfig | None) -> BrokerUrl:
    if config.broker is None:
        if mqtt is None:
            msg = "trigger.mqtt.broker is missing, and there is no section [mqtt] whose broker it could be"
            raise ConfigError(msg)
        return broker_url(mqtt)
    ca, cert, key = (Path(path) if path else None for path in (config.ca, config.cert, config.key))
    return parse_broker_url(config.broker, tls=TlsFiles(ca=ca, cert=cert, key=key))


def capture_of(config: CaptureConfig) -> CaptureConfig:
    """How the frames of announced parts are queued: none gives way to another.

    Raises:
        ConfigError: it is configured otherwise.
    """
    if config.policy == "latest":
        msg = 'capture.policy = "latest" would drop announced parts; leave it out, or out of this camera'
        raise ConfigError(msg)
    return msgspec.structs.replace(config, policy="wait")
