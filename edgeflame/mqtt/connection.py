"""One connection to a broker, from its CONNECT to its end: the only module that knows paho.

It runs on its client's thread alone (see ``edgeflame.mqtt.client``), which owns what outlives a connection. What
happens is reported to the client's user as events.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgeflame.errors import LinkError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from edgeflame.mqtt.url import BrokerUrl, explain_tls_error


@dataclass(frozen=True, kw_only=True)
class LastWill:
    """A message that the broker publishes for us, retained, when the connection breaks."""

    topic: str
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Connected:
    """Connected and subscribed. ``chunk_bytes`` is the largest chunk to send, within the broker's packet limit."""

    chunk_bytes: int
    lacks: str | None = None
    """What the broker says that it cannot do, though EdgeFlame needs it."""


@dataclass(frozen=True, kw_only=True)
class Disconnected:
    """The connection broke; the client is already trying again."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ConnectionFailed:
    """The client gave up; no further event comes."""

    error: LinkError


@dataclass(frozen=True, kw_only=True)
class ReceivedMessage:
    """A message. Call ``acknowledge`` when it is dealt with, in the order of arrival."""

    topic: str
    payload: bytes
    retained: bool = False
    """Whether the broker had kept it; when it was published is then not known."""
    acknowledge: Callable[[], None] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    """The broker has a message that was published with this ``token``, or refuses it (``error``)."""

    token: int
    error: str | None = None


ClientEvent = Connected | Disconnected | ConnectionFailed | ReceivedMessage | PublishResult

log = EventLog("link")

KEEPALIVE_S = 15
HANDSHAKE_TIMEOUT_S = 10.0
"""For TCP, TLS and CONNACK together, roughly; a broker that takes longer is as good as not there."""
MAX_IN_FLIGHT = 64
"""Messages unacknowledged by us, or by the broker, at most: 16 MiB of chunks."""
MAX_UNPROCESSED = 32
"""Received messages that are acknowledged to the broker before the user has. A message that the user has not finished
with is lost when the process ends, acknowledged or not (the session holds nothing over), so an acknowledgement says
only that there is room: 8 MiB of chunks keep the broker sending while the user's thread is busy."""
MAX_PACKET_BYTES = max(MAX_MESSAGE_BYTES, MAX_CHUNK_BYTES) + 4096
"""What we accept: the largest payload and room for its topic."""
WILL_DELAY_S = 2
"""The broker publishes the last will so long after the connection broke, so that a blink is not a death."""

_BROKE = "the connection broke"

# The broker understood us and says no: trying again will not change its mind.
_REFUSALS = frozenset(
    {
        "Unsupported protocol version",
        "Client identifier not valid",
        "Bad user name or password",
        "Not authorized",
        "Banned",
        "Bad authentication method",
    }
)


# It lacks what nothing here works without, and will not learn it by being asked again.
_LACKS = {
    "Retain not supported": "it keeps no retained messages",
    "QoS not supported": "it delivers nothing surely (no QoS 1)",
}


@dataclass(frozen=True, kw_only=True)
class ConnectionEnd:
    """How a connection ended.

    Attributes:
        was_up: whether it came about.
        reason: for people.
        is_refusal: the broker understood us and says no; it may think better of it.
        is_final: it will not.
    """

    was_up: bool
    reason: str
    is_refusal: bool = False
    is_final: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishCommand:
    topic: str
    payload: bytes
    retain: bool
    token: int | None = None


@dataclass(frozen=True, kw_only=True)
class SubscribeCommand:
    topic_filter: str
    wanted: bool


@dataclass(kw_only=True)
class ClientState:
    """What a client and its connections share. Fields that both threads change are of types that allow it."""

    url: BrokerUrl
    client_id: str
    ssl: ssl.SSLContext | None
    will: LastWill | None
    sink: Callable[[ClientEvent], None]
    filters: dict[str, None]
    """Subscriptions wanted, in order."""
    outbox: deque[PublishCommand | SubscribeCommand] = field(default_factory=deque)
    processed: deque[Connection] = field(default_factory=deque)
    """The connection on which each message came that the user has acknowledged."""
    was_disconnected_by_admin: bool = False
    """The broker's administrator ended one of our connections: whoever is then refused was revoked."""
    bytes_in: int = 0
    bytes_out: int = 0
    """Payload received and sent; what was sent again counts again."""
    closing: threading.Event
    flush_until: float = 0.0
    wake_read: socket.socket
    wake_write: socket.socket

    def wake(self) -> None:
        """Make the connection look at the outbox, the acknowledgements and ``closing``."""
        # A full pipe means that a wake-up is pending; a closed one that the link is.
        with contextlib.suppress(OSError):
            self.wake_write.send(b"w")


class Connection:
    """One connection; :meth:`run` it once."""

    def __init__(self, shared: ClientState) -> None:
        self._shared = shared
        self._in_flight: dict[int, PublishCommand] = {}
        self._num_unprocessed = 0
        self._acks: deque[int] = deque()
        """Packet numbers to acknowledge to the broker now."""
        self._unacked: deque[int] = deque()
        """Packet numbers to acknowledge one by one, as the user acknowledges messages."""
        self._max_in_flight = MAX_IN_FLIGHT
        self._max_packet_bytes: int | None = None
        self._retains = self._has_qos_1 = True
        self._ready = False
        self._first_suback: int | None = None
        self._end_reason: str | None = None
        self._refused = False
        self._is_final = False
        self._socket_error = ""
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=shared.client_id,
            protocol=mqtt.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
            transport="tcp" if shared.url.websocket_path is None else "websockets",
        )
        if shared.url.websocket_path is not None:
            client.ws_set_options(path=shared.url.websocket_path)
        client.max_inflight_messages = MAX_IN_FLIGHT
        client.connect_timeout = HANDSHAKE_TIMEOUT_S
        if shared.ssl is not None:
            client.tls_set_context(shared.ssl)
        if shared.url.user is not None:
            client.username_pw_set(shared.url.user, shared.url.password)
        if shared.will is not None:
            delay = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
            delay.WillDelayInterval = WILL_DELAY_S
            client.will_set(shared.will.topic, shared.will.payload, qos=1, retain=True, properties=delay)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_log = self._on_log
        self._client = client

    def run(self) -> ConnectionEnd:
        """Connect and serve until the connection is over."""
        url = self._shared.url
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = MAX_IN_FLIGHT
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        try:
            self._client.connect(url.host, url.port, keepalive=KEEPALIVE_S, clean_start=True, properties=properties)
        except mqtt.WebsocketConnectionError as exc:
            # A web server that answers otherwise: another path, or no broker.
            reason = f"no WebSocket of a broker there ({exc}); is the path right?"
            return ConnectionEnd(was_up=False, reason=reason)
        except (OSError, ValueError) as exc:
            # socket.gaierror, TimeoutError and ssl.SSLError are OSErrors; a bad certificate name is a ValueError.
            refusal = explain_tls_error(exc) if isinstance(exc, OSError) else None
            if refusal is not None:
                return ConnectionEnd(was_up=False, reason=refusal.reason, is_refusal=True, is_final=refusal.is_final)
            reason = getattr(exc, "strerror", None) or str(exc)
            if url.tls is not None and isinstance(exc, ConnectionResetError | ssl.SSLEOFError):
                # A broker without TLS on this port, one that says nothing about our certificate, or a dying one.
                reason = f"the TLS handshake broke off ({reason}); does this port speak TLS, and take our certificate?"
            return ConnectionEnd(was_up=False, reason=reason)
        try:
            self._serve()
        finally:
            self._shut()
        if self._end_reason == _BROKE:
            self._explain_break()
        return ConnectionEnd(
            was_up=self._ready,
            reason=self._end_reason or _BROKE,
            is_refusal=self._refused or self._is_final,
            is_final=self._is_final,
        )

    def unsent(self) -> list[PublishCommand]:
        """What the broker has not acknowledged, oldest first."""
        return list(self._in_flight.values())

    def _serve(self) -> None:
        """Until ``_end_reason`` is set."""
        handshake_until = time.monotonic() + HANDSHAKE_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._shared.wake_read, selectors.EVENT_READ)
            registered: Any = None
            while self._end_reason is None:
                sock = self._client.socket()
                if sock is None:
                    self._end_reason = _BROKE
                    break
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
                if registered is None:
                    registered = selector.register(sock, events)
                elif registered.events != events:
                    registered = selector.modify(sock, events)
                self._poll(selector, sock)
                if not self._ready and time.monotonic() > handshake_until:
                    self._end_reason = f"no answer within {HANDSHAKE_TIMEOUT_S:g} s"
                if self._shared.closing.is_set() and (
                    self._is_flushed() or time.monotonic() > self._shared.flush_until
                ):
                    self._client.disconnect()
                    self._end_reason = "closed"

    def _poll(self, selector: selectors.BaseSelector, sock: Any) -> None:
        # TLS may hold decrypted bytes that select() cannot see.
        pending = getattr(sock, "pending", None)
        buffered = pending is not None and pending() > 0
        readable = writable = False
        for key, mask in selector.select(0 if buffered else 1.0):
            if key.fileobj is self._shared.wake_read:
                with contextlib.suppress(BlockingIOError):
                    self._shared.wake_read.recv(4096)
            else:
                readable = bool(mask & selectors.EVENT_READ)
                writable = bool(mask & selectors.EVENT_WRITE)
        if readable or buffered:
            self._client.loop_read()
        if writable:
            self._client.loop_write()
        self._client.loop_misc()
        self._send_acks()
        if self._ready:
            self._send()

    def _send_acks(self) -> None:
        processed = self._shared.processed
        while processed:
            # What an earlier connection brought has no number on this one.
            if processed.popleft() is self:
                self._num_unprocessed -= 1
                if self._unacked:
                    self._acks.append(self._unacked.popleft())
        while self._acks:
            self._client.ack(self._acks.popleft(), 1)

    def _send(self) -> None:
        outbox = self._shared.outbox
        while outbox and len(self._in_flight) < self._max_in_flight and self._client.socket() is not None:
            item = outbox.popleft()
            if isinstance(item, SubscribeCommand):
                self._change_subscription(item)
                continue
            size = len(item.payload) + len(item.topic.encode()) + 16
            if self._max_packet_bytes is not None and size > self._max_packet_bytes:
                log.error("message_too_large_for_broker", topic=item.topic, bytes=size, limit=self._max_packet_bytes)
                self._report_result(item, f"{size} bytes, the broker takes {self._max_packet_bytes}")
                continue
            if not self._has_qos_1 or (item.retain and not self._retains):
                outbox.appendleft(item)
                self._refuse_for_lack("QoS not supported" if not self._has_qos_1 else "Retain not supported")
                return
            info = self._client.publish(item.topic, item.payload, qos=1, retain=item.retain)
            self._shared.bytes_out += len(item.payload)
            self._in_flight[info.mid] = item

    def _change_subscription(self, item: SubscribeCommand) -> None:
        if item.wanted:
            self._shared.filters[item.topic_filter] = None
            self._client.subscribe(item.topic_filter, qos=1)
        else:
            self._shared.filters.pop(item.topic_filter, None)
            self._client.unsubscribe(item.topic_filter)

    def _is_flushed(self) -> bool:
        return not self._shared.outbox and not self._in_flight and not self._client.want_write()

    def _shut(self) -> None:
        # paho has no other way to close its socket without saying goodbye.
        sock = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                self._client.loop_write()
                sock.close()

    def _on_connect(
        self, client: mqtt.Client, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._end_reason = reason.getName()
            self._refused = self._end_reason in _REFUSALS
            self._refuse_for_lack(self._end_reason)
            return
        self._max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._retains = bool(getattr(properties, "RetainAvailable", 1))
        self._has_qos_1 = getattr(properties, "MaximumQoS", 2) > 0
        topics = [(topic_filter, 1) for topic_filter in self._shared.filters]
        self._first_suback = client.subscribe(topics)[1]

    def _on_subscribe(
        self, _client: mqtt.Client, _userdata: Any, mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        refused = [reason.getName() for reason in reasons if reason.is_failure]
        if refused:
            log.error("subscription_refused", address=self._shared.url.address, reason=", ".join(refused))
        if mid == self._first_suback and not self._ready:
            if refused:
                self._refuse_for_rights(refused[0])
                return
            self._ready = True
            log.info("broker_connected", address=self._shared.url.address)
            # A topic and the packet's own header share the packet with the chunk.
            limit = DEFAULT_CHUNK_BYTES if self._max_packet_bytes is None else self._max_packet_bytes - 1024
            chunk_bytes = max(1024, min(DEFAULT_CHUNK_BYTES, limit))
            self._shared.sink(Connected(chunk_bytes=chunk_bytes, lacks=self._lacks()))

    def _refuse_for_rights(self, reason: str) -> None:
        """Nothing works without our subscriptions; whoever may not have them is not whom the broker expects."""
        self._refused = True
        self._is_final = self._shared.was_disconnected_by_admin
        if self._is_final:
            self._end_reason = f"we were thrown out and have no rights there any more ({reason}): we were revoked"
        else:
            self._end_reason = (
                f"we may not read what we have to ({reason}): the certificate is of another name or fleet than ours, "
                "or was revoked"
            )

    def _lacks(self) -> str | None:
        if not self._has_qos_1:
            return _LACKS["QoS not supported"]
        return None if self._retains else _LACKS["Retain not supported"]

    def _refuse_for_lack(self, code: str) -> None:
        """End for good where the broker says that it lacks what is needed; any other code is left as it is."""
        if code in _LACKS:
            self._is_final = True
            self._end_reason = f"{_LACKS[code]}, which EdgeFlame needs; switch it on there, or use another broker"

    def _on_publish(
        self, _client: mqtt.Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        item = self._in_flight.pop(mid, None)
        if item is None:
            return
        if reason.is_failure:
            log.error("message_refused", topic=item.topic, reason=reason.getName())
        self._report_result(item, reason.getName() if reason.is_failure else None)

    def _report_result(self, item: PublishCommand, error: str | None) -> None:
        if item.token is not None:
            self._shared.sink(PublishResult(token=item.token, error=error))

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        self._shared.bytes_in += len(message.payload)
        if message.qos:
            (self._acks if self._num_unprocessed < MAX_UNPROCESSED else self._unacked).append(message.mid)
        self._num_unprocessed += 1

        def acknowledge() -> None:
            self._shared.processed.append(self)
            # Appended first, looked at second; the client's thread does it the other way round, so one of the two sees
            # the other's. Otherwise it need not wake: it looks here the next time it has something to do.
            if self._unacked:
                self._shared.wake()

        try:
            topic = message.topic
        except UnicodeDecodeError:
            acknowledge()
            return
        self._shared.sink(
            ReceivedMessage(
                topic=topic, payload=bytes(message.payload), retained=bool(message.retain), acknowledge=acknowledge
            )
        )

    def _on_disconnect(
        self, _client: mqtt.Client, _userdata: Any, flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if self._end_reason is None:
            said = getattr(flags, "is_disconnect_packet_from_server", False)
            self._end_reason = reason.getName() if said else _BROKE
            if said and self._end_reason == "Administrative action":
                self._shared.was_disconnected_by_admin = True
                self._end_reason = "the broker's administrator ended the connection"
            if said:
                self._refuse_for_lack(reason.getName())

    def _on_log(self, _client: mqtt.Client, _userdata: Any, _level: int, text: str) -> None:
        # paho tells nowhere else what a socket's error was.
        if "on socket: " in text:
            self._socket_error = text.partition("on socket: ")[2]

    def _explain_break(self) -> None:
        """With TLS 1.3 a broker checks our certificate after we think that we are connected."""
        refusal = explain_tls_error(self._socket_error)
        if refusal is not None:
            self._end_reason, self._refused, self._is_final = refusal.reason, True, refusal.is_final
        elif not self._ready:
            hint = "does it take our certificate?" if self._shared.url.tls else "does its port want mqtts://, or --kit?"
            self._end_reason = f"it closed the connection without an answer; {hint}"
