"""A conversation with a broker, one step after another in the caller's own thread.

Short dealings over MQTT (ask the broker, read what is retained, send a command and wait for the answer) have no event
loop: they connect, publish, and read what comes until they know enough. :class:`Session` is that, over the client that
does the work on a thread of its own. Services with an event loop use :class:`~edgeflame.mqtt.client.MqttClient` itself.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar, final

from edgeflame.errors import LinkError
from edgeflame.mqtt.client import MqttClient, new_client_id
from edgeflame.mqtt.connection import (
    ClientEvent,
    Connected,
    ConnectionFailed,
    Disconnected,
    LastWill,
    PublishResult,
    ReceivedMessage,
)
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES
from edgeflame.mqtt.url import BrokerUrl

RETAINED_S = 0.6
"""The broker sends retained messages right after the subscription; what has not come after so long is not there."""
_HANDSHAKE_GRACE_S = 15.0
"""The client gives up after its time-out at the end of an attempt, with a better reason than ours; this is longer."""

T = TypeVar("T")


@final
class Session:
    """A connection to a broker for one thread; a context manager, which enters when the broker has taken us.

    It connects again by itself after a break. A message counts as dealt with when it is handed out.

    Args:
        url: the broker.
        name: what the session is for, part of its client id.
        filters: topics to subscribe to.
        connect_timeout_s: give up when the broker was not reached within this time; None: never.
        client_id: instead of one made from ``name`` and chance.
        will: published by the broker when we vanish.
        reconnect: whether to go on after a break; if not, it raises.
        on_message: gets every message on the client's thread, instead of :meth:`receive`; must not block.

    Raises:
        LinkError: on entering and in every method: the broker cannot be reached, refuses us, or (without
            ``reconnect``) the connection broke.
    """

    def __init__(
        self,
        url: BrokerUrl,
        *,
        name: str,
        filters: Iterable[str],
        connect_timeout_s: float | None,
        client_id: str | None = None,
        will: LastWill | None = None,
        reconnect: bool = True,
        on_message: Callable[[ReceivedMessage], None] | None = None,
    ) -> None:
        self.chunk_bytes = DEFAULT_CHUNK_BYTES
        """The largest chunk to send, as the broker said when it last took us."""
        self.lacks: str | None = None
        """What the broker says that it cannot do, though EdgeFlame needs it."""
        self.is_up = False
        """Whether there is a connection, as far as events were looked at."""
        self.num_connects = 0
        self._url = url
        self._client_id = client_id or new_client_id(name)
        self._filters = tuple(filters)
        self._connect_timeout_s = connect_timeout_s
        self._will = will
        self._reconnect = reconnect
        self._on_message = on_message
        self._events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self._unread: deque[ReceivedMessage] = deque()
        self._tokens = itertools.count()
        self._client: MqttClient | None = None

    def connect(self) -> Session:
        """Wait until the broker has taken us; entering does this."""
        self._client = MqttClient(
            self._url,
            client_id=self._client_id,
            filters=self._filters,
            sink=self._sink,
            will=self._will,
            connect_timeout_s=self._connect_timeout_s,
        )
        self._client.start()
        limit_s = None if self._connect_timeout_s is None else self._connect_timeout_s + _HANDSHAKE_GRACE_S
        try:
            while not self.is_up:
                if self._next_event(limit_s) is None:
                    raise LinkError(f"no answer from the broker {self._url.address}")
        except BaseException:
            self.close(flush_s=0.0)
            raise
        return self

    def close(self, *, flush_s: float = 3.0) -> None:
        """Send what is still queued, for ``flush_s`` at most, and disconnect."""
        if self._client is not None:
            self._client.close(flush_s=flush_s)

    def __enter__(self) -> Session:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(flush_s=3.0 if kind is None else 0.0)

    def receive(self, timeout_s: float) -> ReceivedMessage | None:
        """The next message; None if there is none within ``timeout_s``."""
        until = time.monotonic() + timeout_s
        while not self._unread:
            if self._next_event(max(0.0, until - time.monotonic())) is None:
                return None
        message = self._unread.popleft()
        message.acknowledge()
        return message

    def messages(self, seconds: float) -> Iterator[ReceivedMessage]:
        """What comes in the next ``seconds``."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and (message := self.receive(left)) is not None:
            yield message

    def retained(self) -> Iterator[ReceivedMessage]:
        """What the broker had kept of the topics that we are subscribed to; call it right after entering."""
        return self.messages(RETAINED_S)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, wait_s: float | None = None) -> None:
        """Publish a message: queue it, or with ``wait_s`` wait until the broker has it.

        Raises:
            LinkError: the broker refuses it, or did not take it within ``wait_s``.
        """
        if wait_s is not None:
            self.publish_all(topic, [payload], retain=retain, timeout_s=wait_s)
        else:
            self._connected().publish(topic, payload, retain=retain)

    def publish_all(self, topic: str, payloads: Sequence[bytes], *, timeout_s: float, retain: bool = False) -> int:
        """Publish in order, and wait until the broker has them all.

        Returns:
            How many it has, from the first on; fewer than all if it did not answer for ``timeout_s``, refused one, or
            the connection broke. Then nothing is known about the others.

        Raises:
            LinkError: it has not even the first.
        """
        waiting = deque(itertools.islice(self._tokens, len(payloads)))
        for token, payload in zip(waiting, payloads, strict=True):
            self._connected().publish(topic, payload, retain=retain, token=token)
        acknowledged: set[int] = set()
        try:
            while waiting:
                event = self._next_event(timeout_s)
                if event is None:
                    raise LinkError(f"no answer from the broker {self._url.address} within {timeout_s:g} s")
                if isinstance(event, PublishResult):
                    if event.error is not None:
                        raise LinkError(f"the broker refuses what is published on {topic}: {event.error}")
                    acknowledged.add(event.token)
                while waiting and waiting[0] in acknowledged:
                    waiting.popleft()
        except LinkError:
            if len(waiting) == len(payloads):
                raise
        return len(payloads) - len(waiting)

    def request(
        self,
        topic: str,
        payload: bytes,
        match: Callable[[ReceivedMessage], T | None],
        *,
        timeout_s: float,
        repeat_s: float | None = None,
    ) -> T | None:
        """Publish a message and wait for its answer.

        Args:
            topic: where to.
            payload: the question.
            match: returns the answer that a message holds, or None if it is another one; called for every message.
            timeout_s: how long to wait.
            repeat_s: publish the question again so often; None: never.

        Returns:
            The answer; None if none came in time.
        """
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            self.publish(topic, payload)
            for message in self.messages(left if repeat_s is None else min(left, repeat_s)):
                if (answer := match(message)) is not None:
                    return answer
        return None

    def poll(self) -> None:
        """Handle the events that have come meanwhile, without waiting; raises if the connection is lost for good."""
        while self._next_event(0.0) is not None:
            pass

    def _connected(self) -> MqttClient:
        if self._client is None:
            raise LinkError("the session was not entered")
        return self._client

    def _next_event(self, timeout_s: float | None) -> ClientEvent | None:
        """Take note of the next event; None if there is none within ``timeout_s``."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        match event:
            case ConnectionFailed(error=error):
                raise error
            case Connected(chunk_bytes=chunk_bytes, lacks=lacks):
                self.is_up, self.chunk_bytes, self.lacks = True, chunk_bytes, lacks
                self.num_connects += 1
            case Disconnected(reason=reason):
                self.is_up = False
                if not self._reconnect:
                    raise LinkError(f"the connection to the broker was lost: {reason}")
            case ReceivedMessage():
                self._unread.append(event)
            case PublishResult():
                pass
        return event

    def _sink(self, event: ClientEvent) -> None:
        """On the client's thread."""
        if self._on_message is not None and isinstance(event, ReceivedMessage):
            event.acknowledge()
            self._on_message(event)
        else:
            self._events.put(event)
