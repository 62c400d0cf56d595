"""Delivery to an MQTT 5 broker: one message a part, a retained state, last wills, and Home Assistant's discovery.

edgeflame/v1/<fleet>/line/<line>/result        :class:`edge.delivery.outbox.Delivery`, QoS 1
edgeflame/v1/<fleet>/line/<line>/state         :class:`LineState`, retained; ``online`` false from the last will
edgeflame/v1/<fleet>/line/<line>/availability  ``online`` or ``offline``, retained; ``offline`` from a last will
edgeflame/v1/<fleet>/line/<line>/command       :mod:`edge.commands.messages`, to the line
edgeflame/v1/<fleet>/line/<line>/reply         the reply to a command

A connection has only one last will. That of the connection for results sets the state, so the availability has a
connection of its own, open as long as the other one.

Discovery makes verdicts and scores appear in Home Assistant by themselves. Source: Home Assistant's documentation of
MQTT discovery and of the MQTT sensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edge.config.outputs import MqttConfig
from edge.delivery.outbox import Delivery
from edge.status import LineState
from edgeflame.errors import ConfigError, LinkError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import (
    ClientEvent,
    Disconnected,
    LastWill,
    ReceivedMessage,
)
from edgeflame.mqtt.kit import Kit, read_kit
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, parse_broker_url

_ENTITIES = {
    "verdict": ("Verdict", "value_json.result.verdict"),
    "score": (
        "Score, 1 = at the threshold",
        (
            "(value_json.result.score / value_json.result.threshold) | round(3) "
            "if value_json.result.score is not none else none"
        ),
    ),
}
"""Name and value template of each entity, by key."""


def home_assistant_discovery(prefix: str, topics: Topics, line: str, cameras: Sequence[str]) -> list[tuple[str, bytes]]:
    """Discovery messages for the verdict and the score, of each camera if there are several: topic and payload.

    Args:
        prefix: beginning of Home Assistant's discovery topics.
        topics: the fleet's.
        line: the line's name.
        cameras: the cameras' names.
    """
    unique = f"edgeflame_{topics.fleet}_{line}".replace(".", "_")
    messages = []
    for camera in cameras if len(cameras) > 1 else [None]:
        for key, (name, value) in _ENTITIES.items():
            own, title, template = key, name, value
            if camera is not None:
                own, title = f"{camera}_{key}".replace(".", "_"), f"{camera}: {name}"
                # All cameras share one topic; an entity keeps its state when a message is another camera's.
                template = f"({value}) if value_json.result.camera == '{camera}' else this.state"
            entity = {
                "state_topic": topics.line_result(line),
                "availability_topic": topics.line_availability(line),
                "device": {"identifiers": [unique], "name": f"Line {line}", "manufacturer": "EdgeFlame"},
                "name": title,
                "unique_id": f"{unique}_{own}",
                "value_template": f"{{{{ {template} }}}}",
            }
            messages.append((f"{prefix}/sensor/{unique}/{own}/config", msgspec.json.encode(entity)))
    return messages


log = EventLog("mqtt")

MAX_BATCH = 50
"""Results in flight at once; the client keeps to the broker's Receive Maximum by itself."""


CommandListener = Callable[[bytes, bool], None]
"""Called with a payload of the command topic, and whether the message was retained."""


def _ignore(_payload: bytes, _retained: bool) -> None:
    """Ignore commands."""


def broker_url(config: MqttConfig, kit: Kit | None = None) -> BrokerUrl:
    """The broker's address and credentials.

    Args:
        config: section ``[mqtt]``.
        kit: the configuration's kit, if it has been read already.

    Raises:
        UsageError: the URL is not valid, or the kit is not this line's.
    """
    kit = kit or _read_kit(config)
    if kit is not None:
        return kit.broker_url(config.broker)
    assert config.broker is not None
    ca, cert, key = (Path(path) if path else None for path in (config.ca, config.cert, config.key))
    return parse_broker_url(config.broker, tls=TlsFiles(ca=ca, cert=cert, key=key))


def _read_kit(config: MqttConfig) -> Kit | None:
    if config.kit is None:
        return None
    # An expired kit is accepted: the line goes on without its broker, and results wait in the outbox for a new kit.
    kit = read_kit(Path(config.kit), must_be_valid=False)
    if (kit.role, kit.fleet, kit.name) != ("line", config.fleet, config.line):
        raise UsageError(
            f"{config.kit}: the kit of the {kit.role} {kit.name!r} of the fleet {kit.fleet!r}; expected that of the "
            f"line {config.line!r} of {config.fleet!r}"
        )
    return kit


class MqttDestination:
    """An MQTT broker. Connects at the start, to announce the line, and again after an outage.

    Args:
        config: section ``[mqtt]``.
        state: the line's state while it is online; see :meth:`set_state`.
        on_command: gets messages of the command topic, on the client's thread; must neither block nor raise.

    Raises:
        ConfigError: the broker's URL or the TLS files cannot be used.
    """

    name = "mqtt"
    max_batch = MAX_BATCH

    def __init__(self, config: MqttConfig, state: LineState, *, on_command: CommandListener = _ignore) -> None:
        self._config = config
        self._topics = Topics(fleet=config.fleet)
        try:
            kit = _read_kit(config)
            self.certificate_expires = None if kit is None else kit.expires
            self._url = broker_url(config, kit)
            self._url.ssl_context()
        except (UsageError, LinkError) as exc:
            raise ConfigError(f"mqtt: {exc}") from exc
        self._state = state
        self._announced: LineState | None = None
        self._session: Session | None = None
        self._availability: _Availability | None = None
        self._on_command = on_command

    def publish_reply(self, reply: bytes) -> None:
        """Publish the reply to a command; it is dropped if there is no connection."""
        session = self._session
        if session is not None:
            with contextlib.suppress(LinkError):
                session.publish(self._topics.line_reply(self._config.line), reply)

    def set_state(self, state: LineState) -> None:
        """Set the line's state; the next :meth:`idle` or :meth:`deliver` publishes it."""
        self._state = state

    def deliver(self, deliveries: Sequence[Delivery]) -> int:
        """Publish results and wait for the broker's acknowledgements.

        Raises:
            LinkError: the first result was not acknowledged.
        """
        session, num_arrived = self._connected(), 0
        try:
            topic = self._topics.line_result(self._config.line)
            payloads = [delivery.encode() for delivery in deliveries]
            num_arrived = session.publish_all(topic, payloads, timeout_s=self._config.timeout_s)
        finally:
            # A new connection after any failure: the old one would send what it holds again without marking it.
            if num_arrived < len(deliveries):
                self._drop(flush_s=0.0)
        return deliveries[num_arrived - 1].number

    def idle(self) -> None:
        """Keep the connection and the line's state on the broker up to date between parts; connects if necessary.

        Raises:
            LinkError: the broker cannot be reached or refuses us.
        """
        try:
            self._connected().poll()
        except LinkError:
            self._drop(flush_s=0.0)
            raise

    def close(self) -> None:
        if self._session is not None:
            offline = msgspec.structs.replace(self._state, online=False)
            self._session.publish(self._state_topic, msgspec.json.encode(offline), retain=True)
        self._drop(flush_s=1.0)

    @property
    def _state_topic(self) -> str:
        return self._topics.line_state(self._config.line)

    def _connected(self) -> Session:
        if self._session is None:
            offline = msgspec.structs.replace(self._state, online=False)
            session = Session(
                self._url,
                name="line",
                client_id=_client_id(self._config),
                filters=(self._state_topic, self._topics.line_command(self._config.line)),
                will=LastWill(topic=self._state_topic, payload=msgspec.json.encode(offline)),
                connect_timeout_s=self._config.timeout_s,
                reconnect=False,
                on_message=self._on_message,
            )
            self._session, self._announced = session.connect(), None
            self._availability = _Availability(self._url, self._config)
            if self._config.home_assistant is not None:
                cameras = [camera.name for camera in self._state.cameras]
                messages = home_assistant_discovery(
                    self._config.home_assistant, self._topics, self._config.line, cameras
                )
                for topic, payload in messages:
                    session.publish(topic, payload, retain=True)
        if self._announced != (state := self._state):
            self._session.publish(self._state_topic, msgspec.json.encode(state), retain=True)
            self._announced = state
        return self._session

    def _on_message(self, message: ReceivedMessage) -> None:
        """On the client's thread: hand on commands, and ignore the line's own state."""
        if message.topic != self._state_topic:
            self._on_command(message.payload, message.retained)

    def _drop(self, *, flush_s: float) -> None:
        if self._availability is not None:
            self._availability.close(flush_s=flush_s)
            self._availability = None
        if self._session is not None:
            self._session.close(flush_s=flush_s)
            self._session = None


def _client_id(config: MqttConfig) -> str:
    return f"edgeflame-line-{config.fleet}-{config.line}"


class _Availability:
    """Publishes ``online`` until it is closed; if the connection breaks, the last will publishes ``offline``."""

    def __init__(self, url: BrokerUrl, config: MqttConfig) -> None:
        self._topic = Topics(fleet=config.fleet).line_availability(config.line)
        self._link = MqttClient(
            url,
            client_id=f"{_client_id(config)}-availability",
            filters=[self._topic],
            sink=self._on_event,
            will=LastWill(topic=self._topic, payload=b"offline"),
        )
        self._link.publish(self._topic, b"online", retain=True)

    def close(self, *, flush_s: float) -> None:
        self._link.publish(self._topic, b"offline", retain=True)
        self._link.close(flush_s=flush_s)

    def _on_event(self, event: ClientEvent) -> None:
        """On the client's thread."""
        match event:
            case Disconnected():
                # By the time it is connected again, the broker has published the last will.
                self._link.publish(self._topic, b"online", retain=True)
            case ReceivedMessage():
                event.acknowledge()
            case _:
                pass
