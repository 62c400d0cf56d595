"""Delivery to an MQTT 5 broker: one message a part, a retained state, last wills, and Home Assistant's discovery.

edgeflame/v1/<fleet>/line/<line>/result        :class:`edge.delivery.outbox.Delivery`, QoS 1
edgeflame/v1/<fleet>/line/<line>/state         :class:`LineState`, retained; ``online`` false from the last will
edgeflame/v1/<fleet>/line/<line>/availability  ``online`` or ``offline``, retained; ``offline`` from a last will
edgeflame/v1/<fleet>/line/<line>/command       :mod:`edge.commands.messages`, to the line
edgeflame/v1/<fleet>/line/<line>/reply         the reply to a command

A connection has only one last will. That of the connection for results sets the state, so the availability has a
connection of its own, open as long as the other one.

Last wills may come late: that of a process of this line that was killed is published when the broker misses it, long
after the next one has said that it is online. So what is said of the line is heard here too, and contradicted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edge.config.outputs import MqttConfig
from edge.delivery.home_assistant import home_assistant_discovery, outdated_discovery
from edge.delivery.outbox import Delivery
from edge.status import DEFAULT_CAMERA, LineState
from edgeflame.errors import ConfigError, LinkError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.client import MqttClient, new_client_id
from edgeflame.mqtt.connection import (
    ClientEvent,
    ConnectionFailed,
    Disconnected,
    LastWill,
    ReceivedMessage,
)
from edgeflame.mqtt.kit import Kit, read_kit
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, parse_broker_url

log = EventLog("mqtt")

MAX_BATCH = 50
"""Results in flight at once; the client keeps to the broker's Receive Maximum by itself."""
MAX_OTHERS = 20
"""Other daemons of this line's name that are told apart, and contradicted once each."""


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
        self._client_id = new_client_id(f"line-{config.line}")
        self._is_contradicted = threading.Event()
        """Somebody else has said of this line what is not so, or other entities are known than it has."""
        self._others: set[str] = set()
        """Boots of other daemons that were heard under this line's name."""
        self._cameras_before: tuple[str, ...] = ()
        """Cameras whose entities Home Assistant may still have."""

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
        if self._availability is not None and self._availability.has_failed:
            self._drop(flush_s=0.0)
        if self._session is None:
            offline = msgspec.structs.replace(self._state, online=False)
            session = Session(
                self._url,
                name="line",
                client_id=self._client_id,
                filters=(self._state_topic, self._topics.line_command(self._config.line)),
                will=LastWill(topic=self._state_topic, payload=msgspec.json.encode(offline)),
                connect_timeout_s=self._config.timeout_s,
                reconnect=False,
                on_message=self._on_message,
            )
            self._session, self._announced = session.connect(), None
            self._availability = _Availability(self._url, self._config)
        if self._is_contradicted.is_set():
            self._is_contradicted.clear()
            self._announced = None
        if self._announced != (state := self._state):
            self._session.publish(self._state_topic, msgspec.json.encode(state), retain=True)
            self._announce_entities(self._session, tuple(camera.name for camera in state.cameras))
            self._announced = state
        return self._session

    def _announce_entities(self, session: Session, cameras: tuple[str, ...]) -> None:
        prefix, line = self._config.home_assistant, self._config.line
        if prefix is None:
            return
        for topic in outdated_discovery(prefix, self._topics, line, cameras, self._cameras_before):
            session.publish(topic, b"", retain=True)
        for topic, payload in home_assistant_discovery(prefix, self._topics, line, cameras):
            session.publish(topic, payload, retain=True)
        self._cameras_before = cameras

    def _on_message(self, message: ReceivedMessage) -> None:
        """On the client's thread: hand on commands, and look at what is said of this line."""
        if message.topic != self._state_topic:
            self._on_command(message.payload, message.retained)
            return
        try:
            said = msgspec.json.decode(message.payload, type=LineState)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if message.retained and said.boot != self._state.boot:
            # What the last process of this line left behind.
            self._cameras_before = tuple(camera.name for camera in said.cameras) or (DEFAULT_CAMERA,)
            self._is_contradicted.set()
        elif not said.online:
            self._is_contradicted.set()
        elif said.boot != self._state.boot and said.boot not in self._others and len(self._others) < MAX_OTHERS:
            self._others.add(said.boot)
            log.error("line_name_in_use", line=self._config.line, fleet=self._config.fleet, by=said.source)
            self._is_contradicted.set()

    def _drop(self, *, flush_s: float) -> None:
        if self._availability is not None:
            self._availability.close(flush_s=flush_s)
            self._availability = None
        if self._session is not None:
            self._session.close(flush_s=flush_s)
            self._session = None


class _Availability:
    """Publishes ``online`` until it is closed; if the connection breaks, the last will publishes ``offline``."""

    def __init__(self, url: BrokerUrl, config: MqttConfig) -> None:
        self._topic = Topics(fleet=config.fleet).line_availability(config.line)
        self.has_failed = False
        """Whether its connection is given up: nothing says any more that the line is there."""
        self._is_closing = False
        self._link = MqttClient(
            url,
            client_id=new_client_id(f"availability-{config.line}"),
            filters=[self._topic],
            sink=self._on_event,
            will=LastWill(topic=self._topic, payload=b"offline"),
        )
        self._link.publish(self._topic, b"online", retain=True)
        self._link.start()

    def close(self, *, flush_s: float) -> None:
        self._is_closing = True
        self._link.publish(self._topic, b"offline", retain=True)
        self._link.close(flush_s=flush_s)

    def _on_event(self, event: ClientEvent) -> None:
        """On the client's thread."""
        match event:
            case Disconnected():
                # By the time it is connected again, the broker has published the last will.
                self._link.publish(self._topic, b"online", retain=True)
            case ReceivedMessage(payload=payload):
                event.acknowledge()
                if payload == b"offline" and not self._is_closing:
                    # A last will that came late, or another daemon of this name that ended.
                    self._link.publish(self._topic, b"online", retain=True)
            case ConnectionFailed():
                self.has_failed = True
            case _:
                pass
