"""The MQTT client: one owned thread, reconnecting for ever, never blocking its user.

Everything paho does happens on the client's own thread. Its user sends with :meth:`MqttClient.publish`, which
queues, and gets events through ``sink``, which must only queue as well. What is lost with a connection is the
user's to send again: a session holds nothing over (clean start), because brokers drop silently what they queue for
an absent client. Messages handed to ``publish`` are sent at least once (QoS 1), in order, over reconnections too.

Flow control, both ways: at most the broker's Receive Maximum of our messages are unacknowledged; and a received
message is acknowledged to the broker only when its user has called ``ReceivedMessage.acknowledge``, so that a slow
user holds the broker back instead of filling memory.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from edgeflame.background import BackgroundThread, Backoff
from edgeflame.errors import LinkError
from edgeflame.log import EventLog
from edgeflame.mqtt.connection import (
    ClientEvent,
    ClientState,
    Connection,
    ConnectionFailed,
    Disconnected,
    LastWill,
    PublishCommand,
    SubscribeCommand,
)
from edgeflame.mqtt.url import BrokerUrl

log = EventLog("link")

MAX_QUEUED = 4096
"""Messages waiting to be sent. Users stop sending while the link is down, so only a defect fills it."""
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 20.0
"""Between attempts to connect: doubles from the first to the last, less up to half of it by chance."""


def new_client_id(purpose: str) -> str:
    """An id for a client that no other has and nobody can guess: whoever connects under another's id throws it out.

    Args:
        purpose: a word or two for whoever reads the broker's log.
    """
    return f"edgeflame-{purpose}-{secrets.token_hex(12)}"


class MqttClient:
    """A connection to a broker that is kept up from :meth:`start`, or from entering it, to :meth:`close`.

    Args:
        url: the broker.
        client_id: unique among the broker's clients.
        filters: topics to subscribe to, before ``Connected`` is reported.
        sink: gets every event, on the client's thread, from :meth:`start` on; must not block.
        will: see :class:`LastWill`.
        connect_timeout_s: give up (:class:`ConnectionFailed`) when no connection came about for so long after the
            start. None: never.

    Raises:
        LinkError: the TLS files are wrong.
    """

    def __init__(
        self,
        url: BrokerUrl,
        *,
        client_id: str,
        filters: Iterable[str],
        sink: Callable[[ClientEvent], None],
        will: LastWill | None = None,
        connect_timeout_s: float | None = None,
    ) -> None:
        context = url.ssl_context()
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        self._connect_timeout_s = connect_timeout_s
        self._thread = BackgroundThread("link", self._run, wake=self._wake)
        self._shared = ClientState(
            url=url,
            client_id=client_id,
            ssl=context,
            will=will,
            sink=sink,
            filters=dict.fromkeys(filters),
            closing=self._thread.stop,
            wake_read=wake_read,
            wake_write=wake_write,
        )

    def start(self) -> None:
        """Begin to connect; once. What is published before that waits."""
        self._thread.start()

    def __enter__(self) -> MqttClient:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, token: int | None = None) -> None:
        """Queue a message. With a ``token``, a ``PublishResult`` event reports when the broker has it.

        Raises:
            LinkError: too many wait already.
        """
        if len(self._shared.outbox) >= MAX_QUEUED:
            raise LinkError(f"{MAX_QUEUED} messages wait for {self._shared.url.address}; no more are taken")
        self._shared.outbox.append(PublishCommand(topic=topic, payload=payload, retain=retain, token=token))
        self._shared.wake()

    def subscribe(self, topic_filter: str) -> None:
        """Queue a subscription; it takes effect before what is published after it, and again on reconnection."""
        self._shared.outbox.append(SubscribeCommand(topic_filter=topic_filter, wanted=True))
        self._shared.wake()

    def unsubscribe(self, topic_filter: str) -> None:
        """Queue the end of a subscription."""
        self._shared.outbox.append(SubscribeCommand(topic_filter=topic_filter, wanted=False))
        self._shared.wake()

    @property
    def bytes_in(self) -> int:
        """Payload received since the start."""
        return self._shared.bytes_in

    @property
    def bytes_out(self) -> int:
        """Payload sent since the start; what was sent again counts again."""
        return self._shared.bytes_out

    def close(self, *, flush_s: float = 3.0) -> None:
        """Send what is queued if that is possible within ``flush_s``, disconnect cleanly, end the thread."""
        if not self._shared.closing.is_set():
            self._shared.flush_until = time.monotonic() + flush_s
        # The thread may sit in a TCP connect to a host that does not answer; it ends by itself, and nothing of
        # ours waits for it.
        if self._thread.close(flush_s + 1.0):
            self._shared.wake_read.close()
            self._shared.wake_write.close()

    def _wake(self) -> None:
        self._shared.wake()

    # The rest runs on the client's thread.

    def _run(self, closing: threading.Event) -> None:
        try:
            self._serve(closing)
        except Exception as exc:
            # A defect: without this its user would wait for ever for events.
            self._shared.sink(ConnectionFailed(error=LinkError(f"the MQTT client failed: {exc!r}")))
            raise

    def _serve(self, closing: threading.Event) -> None:
        started = time.monotonic()
        ever_up = False
        backoff = Backoff(FIRST_DELAY_S, MAX_DELAY_S)
        while True:
            connection = Connection(self._shared)
            ending = connection.run()
            was_up, reason = ending.was_up, ending.reason
            self._shared.outbox.extendleft(reversed(connection.unsent()))
            if closing.is_set():
                break
            ever_up = ever_up or was_up
            if was_up:
                backoff.reset()
                log.warning("broker_lost", address=self._shared.url.address, reason=reason)
                self._shared.sink(Disconnected(reason=reason))
            # One that was taken before may be taken again; the broker may be in the middle of a change.
            if ending.is_final or (ending.is_refusal and not ever_up):
                self._shared.sink(
                    ConnectionFailed(error=LinkError(f"the broker {self._shared.url.address} refuses us: {reason}"))
                )
                return
            delay_s = backoff.next_delay()
            if self._connect_timeout_s is not None and not ever_up:
                left_s = started + self._connect_timeout_s - time.monotonic()
                if left_s <= 0:
                    address = self._shared.url.address
                    msg = f"no connection to the broker {address} within {self._connect_timeout_s:g} s: {reason}"
                    self._shared.sink(ConnectionFailed(error=LinkError(msg)))
                    return
                delay_s = min(delay_s, left_s)
            if not was_up:
                # With a time limit the final error has the reason; without one the client tries for days, and each
                # failure is logged.
                say = log.warning if backoff.num_failures == 1 or self._connect_timeout_s is None else log.debug
                say(
                    "broker_unreachable",
                    address=self._shared.url.address,
                    attempt=backoff.num_failures,
                    retry_in_s=round(delay_s, 1),
                    reason=reason,
                )
            if closing.wait(delay_s):
                break
        unsent = sum(isinstance(item, PublishCommand) for item in self._shared.outbox)
        if unsent:
            log.warning("closed_with_unsent_messages", address=self._shared.url.address, count=unsent)
