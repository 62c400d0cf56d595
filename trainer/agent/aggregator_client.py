"""The channel to the aggregator: messages, chunks and presence; uploads; and leaving a run for good.

The site keeps the timers for both directions. A message that needs an answer is repeated until it is answered, and
again on a new connection. An upload never gives up; the aggregator's deadline limits how long a site may make no
progress. Leaving a run does give up, because an older aggregator may not know how to confirm it.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeflame import __version__
from edgeflame.background import RetryTimer
from edgeflame.errors import FederationError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.messages import BlobNeed, Heartbeat, Hello, Leaving, Offer, Presence, UpMessage, encode_message
from edgeflame.mqtt.topics import Topics
from edgeflame.transfer.protocol import unpack_mask
from edgeflame.transfer.store import OutgoingBlob

HELLO_INTERVAL_S = 2.0
"""How often Hello is sent until it is answered, seconds."""
HEARTBEAT_INTERVAL_S = 1.0


class AggregatorClient:
    """Sends what one process of a site has for the aggregator, and keeps the handshake with it.

    While the link is down nothing is queued: every sender repeats what still matters when it is up again.

    Args:
        topics: the fleet's MQTT topics.
        site: the site's name.
        boot: the id of this process.
        install: the id of the state directory.

    Attributes:
        is_connected: whether the broker is connected.
        accepted_by: the boot id of the aggregator that accepted this site on this connection; None before.
    """

    def __init__(self, topics: Topics, *, site: str, boot: str, install: str) -> None:
        self.topics = topics
        self.site = site
        self.boot = boot
        self.install = install
        self.link: MqttClient | None = None
        self.is_connected = False
        self.accepted_by: str | None = None
        self._next_hello_s = 0.0
        self._next_heartbeat_s = 0.0
        self._last_heartbeat: tuple[object, ...] = ()

    def connection_changed(self, *, is_up: bool) -> None:
        """The link went up or down; either way the handshake begins anew."""
        self.is_connected = is_up
        self.restart_handshake()

    def restart_handshake(self) -> None:
        """Send Hello again, and wait to be accepted."""
        self.accepted_by = None
        self._next_hello_s = 0.0

    def on_welcome(self, aggregator: str) -> None:
        """The aggregator accepted this site."""
        self.accepted_by = aggregator
        self._next_heartbeat_s = 0.0
        self.publish_presence()

    def tick(self, now: float) -> None:
        """Send Hello, if it is due."""
        if self.is_connected and self.accepted_by is None and now >= self._next_hello_s:
            self._next_hello_s = now + HELLO_INTERVAL_S
            self.send(Hello(boot=self.boot, install=self.install, software=f"edgeflame {__version__}"))

    def send_heartbeat(self, beat: Heartbeat, now: float) -> None:
        """Send a heartbeat: at once when more than the step changed, otherwise at intervals."""
        key = (beat.run, beat.ready, beat.initial, beat.activity, beat.round, beat.paused)
        if key != self._last_heartbeat or now >= self._next_heartbeat_s:
            self._last_heartbeat, self._next_heartbeat_s = key, now + HEARTBEAT_INTERVAL_S
            self.send(beat)

    def send(self, message: UpMessage) -> None:
        """Send the aggregator a message."""
        self._publish(self.topics.site_up(self.site), encode_message(message))

    def send_chunk(self, sha256: str, index: int, data: bytes) -> None:
        """Send the aggregator a chunk."""
        self._publish(self.topics.up_chunk(self.site, sha256, index), data)

    def publish_presence(self) -> None:
        """Publish that this site is online (retained)."""
        presence = Presence(boot=self.boot, online=True, install=self.install)
        self._publish(self.topics.site_presence(self.site), encode_message(presence), retain=True)

    def offline_payload(self) -> bytes:
        """The payload that says that this site is offline."""
        return encode_message(Presence(boot=self.boot, online=False, install=self.install))

    def subscribe_chunks(self, sha256: str) -> None:
        """Subscribe to a blob's chunks."""
        assert self.link is not None
        self.link.subscribe(self.topics.training_chunks(sha256))

    def unsubscribe_chunks(self, sha256: str) -> None:
        """End the subscription."""
        assert self.link is not None
        self.link.unsubscribe(self.topics.training_chunks(sha256))

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.is_connected and self.link is not None:
            self.link.publish(topic, payload, retain=retain)


REPEAT_INTERVAL_S = 5.0
"""What was not answered is sent again after this time, seconds."""

BLOB_OWNER = "aggregator"
"""The one peer of a site's transfers, as its blob store and its senders name it."""


class Upload:
    """The upload of a file to the aggregator, offered until it is answered.

    Args:
        outgoing: the file.
        offer: the message that offers it.
        send: sends a message to the aggregator.
        publish: sends a chunk: number and bytes.
    """

    def __init__(
        self,
        outgoing: OutgoingBlob,
        offer: Offer,
        *,
        send: Callable[[UpMessage], None],
        publish: Callable[[int, bytes], None],
    ) -> None:
        self._outgoing = outgoing
        self._offer = offer
        self._send = send
        self._publish = publish
        self._retry = RetryTimer(0.0)
        self._num_missing = offer.manifest.num_chunks

    @property
    def progress(self) -> tuple[int, int]:
        """Chunks that the aggregator has, and all."""
        total = self._offer.manifest.num_chunks
        return total - self._num_missing, total

    def offer(self, *, now: float) -> None:
        """Send the offer."""
        self._retry.sent(now)
        self._send(self._offer)

    def on_need(self, need: BlobNeed, *, now: float) -> None:
        """The aggregator said which chunks it lacks.

        Raises:
            FederationError: it does not fit the blob.
        """
        if need.sha256 != self._offer.manifest.sha256:
            return
        missing = unpack_mask(need.missing, self._offer.manifest.num_chunks)
        self._num_missing = int(missing.sum())
        self._retry.progressed(now)
        self._outgoing.sender.handle_request(BLOB_OWNER, missing, resend=need.resend, now=now, window=need.window)

    def pump(self) -> None:
        """Send chunks until the window is full."""
        self._outgoing.send_window(self._publish)

    def tick(self, now: float) -> None:
        """Offer it again if nothing was heard for a while."""
        if self._retry.is_due(now):
            self._send(self._offer)

    def close(self) -> None:
        """Stop."""
        self._outgoing.close()


LEAVE_TIMEOUT_S = 30.0
"""Seconds after which leaving fails unless confirmed, counted while the aggregator accepts this site; one that knows
the message answers at once."""


class LeaveHandshake:
    """Leaving a run for good: the message is repeated until the aggregator confirms it.

    Args:
        reason: for the aggregator's ledger.
    """

    def __init__(self, reason: str) -> None:
        self.is_confirmed = False
        self._reason = reason
        self._sent_at: float | None = None
        self._began_at = 0.0

    def tick(self, client: AggregatorClient, run: str, now: float) -> None:
        """Send the message, if it is due.

        Raises:
            FederationError: it was not confirmed in time.
        """
        if client.accepted_by is None:
            return
        if self._sent_at is None:
            self._began_at = now
        elif now - self._began_at >= LEAVE_TIMEOUT_S:
            raise FederationError(
                f"the aggregator has not confirmed within {LEAVE_TIMEOUT_S:g} s that this site leaves; one of protocol "
                "1.0 does not know how to, and leaves the site out after its deadline"
            )
        if self._sent_at is None or now - self._sent_at >= REPEAT_INTERVAL_S:
            self._sent_at = now
            client.send(Leaving(boot=client.boot, run=run, detail=self._reason))
