"""Results to an MQTT 5 broker: one message a part, a retained state, a last will, and Home Assistant's discovery.

edgeflame/v1/<fleet>/line/<line>/result     :class:`edge.delivery.message.Delivery`, QoS 1
edgeflame/v1/<fleet>/line/<line>/state      :class:`LineState`, retained; ``online`` false from the last will
edgeflame/v1/<fleet>/line/<line>/command    :mod:`edge.commands.messages`, to the line
edgeflame/v1/<fleet>/line/<line>/reply      what came of a command
"""

from __future__ import annotations

import collections
import contextlib
import queue
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from edge.delivery.home_assistant import discovery
from edge.delivery.message import Delivery
from edge.status import CameraStatus
from edgeflame.brokerurl import BrokerUrl, TlsFiles, parse_broker_url
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError, LinkError, UsageError
from edgeflame.fleet.kit import Kit, read_kit
from edgeflame.link import Link
from edgeflame.linkevents import Down, Event, Failed, Received, Sent, Up, Will
from edgeflame.topics import Topics, check_name

log = EventLog("mqtt")

MAX_BATCH = 50
"""Results on their way at once; the link keeps to the broker's Receive Maximum by itself."""


TakeCommand = Callable[[bytes, bool], None]
"""Takes a payload of the command topic, and whether the broker had kept it."""


def _ignore(_payload: bytes, _retained: bool) -> None:
    """No commands are taken."""


class MqttConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[mqtt]``."""

    broker: str | None = None
    """``mqtt://[user@]host[:port]`` or ``mqtts://``; the password from ``EDGEFLAME_MQTT_PASSWORD``. A kit has it."""
    fleet: str
    """Which fleet."""
    line: str
    """Name of this line; two daemons never share one."""
    ca: str | None = None
    """``mqtts``: certificate authority of the broker (PEM)."""
    cert: str | None = None
    """``mqtts``: this line's certificate (PEM)."""
    key: str | None = None
    """``mqtts``: this line's private key (PEM)."""
    kit: str | None = None
    """A kit of ``edgeflame fleet enrol --role line``, made for this fleet and line, in place of those files."""
    home_assistant: str | None = None
    """Home Assistant's discovery prefix, ``homeassistant`` as it comes; left out: not announced there."""
    timeout_s: float = 10.0
    """Without an answer from the broker for so long, the connection is given up and made anew."""

    def __post_init__(self) -> None:
        try:
            check_name("fleet", self.fleet)
            check_name("line", self.line)
        except UsageError as exc:
            msg = f"mqtt: {exc}"
            raise ConfigError(msg) from exc
        if self.broker is None and self.kit is None:
            msg = "mqtt: broker or kit has to say where the broker is"
            raise ConfigError(msg)
        if self.kit is not None and (self.ca or self.cert or self.key):
            msg = "mqtt.kit holds the certificates; ca, cert and key are for those without one"
            raise ConfigError(msg)
        if not 0.1 <= self.timeout_s <= 600:
            msg = f"mqtt.timeout_s must be 0.1..600, not {self.timeout_s}"
            raise ConfigError(msg)
        if self.home_assistant is not None and (
            not self.home_assistant or any(sign in self.home_assistant for sign in "+#")
        ):
            msg = f"mqtt.home_assistant must be a topic prefix without wildcards, not {self.home_assistant!r}"
            raise ConfigError(msg)


def broker_url(config: MqttConfig, kit: Kit | None = None) -> BrokerUrl:
    """Where the broker is, and what to show it; ``kit`` is the configuration's, if it was read already.

    Raises:
        UsageError: the URL is none, or the kit is not this line's.
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
    # A line goes on without its broker; results wait in the outbox for a new kit.
    kit = read_kit(Path(config.kit), must_be_valid=False)
    if (kit.role, kit.fleet, kit.name) != ("line", config.fleet, config.line):
        msg = (
            f"{config.kit}: the kit of the {kit.role} {kit.name!r} of the fleet {kit.fleet!r}; expected that of the "
            f"line {config.line!r} of {config.fleet!r}"
        )
        raise UsageError(msg)
    return kit


class CameraState(msgspec.Struct, frozen=True, kw_only=True):
    """What one camera of a line runs."""

    name: str
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    threshold: float
    source: str
    paused: bool = False
    drift: str | None = None
    """``learning``, ``ok``, ``warning`` or ``alarm``; null where it is not watched, or before the first part."""
    drift_message: str | None = None
    """The same for people."""
    golden: str | None = None
    """Of the last self-test: ``passed``, ``failed``, or ``acknowledged`` where a person knows that it failed."""
    threshold_set: bool = False
    """The threshold was set by command, and is not that of the configuration or the package."""


class LineState(msgspec.Struct, frozen=True, kw_only=True):
    """What a line runs; retained. Of several cameras, the first stands outside of the list as well."""

    online: bool
    boot: str
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    threshold: float
    source: str
    cameras: tuple[CameraState, ...] = ()


def line_state(cameras: Sequence[CameraStatus], *, boot: str) -> LineState:
    """What to announce of a daemon's cameras, of which there is at least one."""
    states = tuple(
        CameraState(
            name=camera.camera,
            product=camera.product,
            model=camera.model,
            threshold=camera.threshold,
            source=camera.source,
            paused=camera.paused,
            drift=camera.drift.condition.value if camera.drift is not None else None,
            drift_message=camera.drift.message if camera.drift is not None else None,
            golden=camera.golden.word if camera.golden is not None else None,
            threshold_set=camera.threshold_set,
        )
        for camera in cameras
    )
    first = states[0]
    return LineState(
        online=True,
        boot=boot,
        product=first.product,
        model=first.model,
        threshold=first.threshold,
        source=first.source,
        cameras=states,
    )


class MqttDestination:
    """A broker. Connects when there is something to say, and at the start to announce the line.

    Args:
        config: where and as whom.
        state: what the line runs, while it is online; see :meth:`announce`.
        take: gets what comes on the command topic, on the link's thread; must neither wait nor fail.

    Raises:
        ConfigError: the broker's URL or the TLS files make no sense.
    """

    name = "mqtt"
    max_batch = MAX_BATCH

    def __init__(self, config: MqttConfig, state: LineState, *, take: TakeCommand = _ignore) -> None:
        self._config = config
        self._topics = Topics(fleet=config.fleet)
        try:
            kit = _read_kit(config)
            self.certificate_expires = None if kit is None else kit.expires
            self._url = broker_url(config, kit)
            self._url.ssl_context()
        except (UsageError, LinkError) as exc:
            msg = f"mqtt: {exc}"
            raise ConfigError(msg) from exc
        self._state = state
        self._announced: LineState | None = None
        self._session: _Session | None = None
        self._take = take

    def answer(self, reply: bytes) -> None:
        """Publish the reply to a command; nobody hears it where there is no connection."""
        session = self._session
        if session is not None:
            with contextlib.suppress(LinkError):
                session.link.publish(self._topics.line_reply(self._config.line), reply)

    def announce(self, state: LineState) -> None:
        """What the line runs from now on; told to the broker by the next :meth:`idle` or :meth:`deliver`."""
        self._state = state

    def deliver(self, deliveries: Sequence[Delivery]) -> int:
        """Publish results and wait for the broker's acknowledgements.

        Raises:
            LinkError: not one was acknowledged in order.
        """
        session = self._connected()
        try:
            arrived = session.publish_all(
                self._topics.line_result(self._config.line), [(item.number, item.encode()) for item in deliveries]
            )
        except LinkError:
            session.is_broken = True
            raise
        finally:
            # A new link after any trouble: what the old one still held would be sent again without being marked.
            if session.is_broken:
                self._drop(flush_s=0.0)
        return arrived

    def idle(self) -> None:
        """Keep the line's state on the broker true between parts: connect, and connect again when that broke.

        Raises:
            LinkError: the broker cannot be reached or refuses us.
        """
        try:
            self._connected().check()
        except LinkError:
            self._drop(flush_s=0.0)
            raise

    def close(self) -> None:
        if self._session is not None:
            offline = msgspec.structs.replace(self._state, online=False)
            self._session.link.publish(self._state_topic, msgspec.json.encode(offline), retain=True)
        self._drop(flush_s=1.0)

    @property
    def _state_topic(self) -> str:
        return self._topics.line_state(self._config.line)

    def _connected(self) -> _Session:
        if self._session is None:
            offline = msgspec.structs.replace(self._state, online=False)
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            session = _Session(
                Link(
                    self._url,
                    client_id=f"edgeflame-line-{self._config.fleet}-{self._config.line}",
                    filters=[self._state_topic, self._topics.line_command(self._config.line)],
                    sink=partial(self._hear, events),
                    will=Will(topic=self._state_topic, payload=msgspec.json.encode(offline)),
                    connect_timeout_s=self._config.timeout_s,
                ),
                events,
                self._config.timeout_s,
            )
            try:
                session.wait_until_up()
            except LinkError:
                session.link.close(flush_s=0.0)
                raise
            self._session, self._announced = session, None
            if self._config.home_assistant is not None:
                cameras = [camera.name for camera in self._state.cameras]
                told = discovery(self._config.home_assistant, self._topics, self._config.line, cameras)
                for topic, payload in told:
                    session.link.publish(topic, payload, retain=True)
        if self._announced != (state := self._state):
            self._session.link.publish(self._state_topic, msgspec.json.encode(state), retain=True)
            self._announced = state
        return self._session

    def _hear(self, events: queue.SimpleQueue[Event], event: Event) -> None:
        """On the link's thread: commands go to whoever takes them, everything else to the delivery."""
        if isinstance(event, Received) and event.topic != self._state_topic:
            event.done()
            self._take(event.payload, event.retained)
            return
        events.put(event)

    def _drop(self, *, flush_s: float) -> None:
        if self._session is not None:
            self._session.link.close(flush_s=flush_s)
            self._session = None


class _Session:
    """One connection, from its making to its first trouble."""

    def __init__(self, link: Link, events: queue.SimpleQueue[Event], timeout_s: float) -> None:
        self.link = link
        self.is_broken = False
        self._events = events
        self._timeout_s = timeout_s

    def wait_until_up(self) -> None:
        """Until the broker has taken us.

        Raises:
            LinkError: it did not.
        """
        # The link gives up by itself at the same time, with a better reason than ours.
        while not isinstance(self._next(self._timeout_s + 5.0), Up):
            pass

    def check(self) -> None:
        """Look at what has come meanwhile.

        Raises:
            LinkError: the connection broke.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                _raise_trouble(self._events.get_nowait())

    def publish_all(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Publish in order; the highest number acknowledged with all before it.

        Raises:
            LinkError: the first was not acknowledged.
        """
        for number, payload in messages:
            self.link.publish(topic, payload, token=number)
        waiting = collections.deque(number for number, _ in messages)
        acknowledged: set[int] = set()
        arrived = 0
        try:
            while waiting:
                event = self._next(self._timeout_s)
                if not isinstance(event, Sent):
                    continue
                if event.error is not None:
                    msg = f"the broker refuses results on {topic}: {event.error}"
                    raise LinkError(msg)
                acknowledged.add(event.token)
                while waiting and waiting[0] in acknowledged:
                    arrived = waiting.popleft()
        except LinkError:
            if not arrived:
                raise
            self.is_broken = True
        return arrived

    def _next(self, timeout_s: float) -> Event:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            msg = f"no answer from the broker within {timeout_s:g} s"
            raise LinkError(msg) from None
        _raise_trouble(event)
        return event


def _raise_trouble(event: Event) -> None:
    match event:
        case Failed():
            raise event.error
        case Down():
            msg = f"the connection to the broker was lost: {event.reason}"
            raise LinkError(msg)
        case Received():
            # The line's own state.
            event.done()
        case Up() | Sent():
            pass
