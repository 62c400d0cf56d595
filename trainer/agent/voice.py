"""How a site speaks: its messages, chunks and presence, and whether anyone listens."""

from __future__ import annotations

from edgeflame import __version__
from edgeflame.link import Link
from edgeflame.messages import Heartbeat, Hello, Presence, UpMessage, encode
from edgeflame.topics import Topics

HELLO_S = 2.0
"""Hello is said so often until it is answered, seconds."""
HEARTBEAT_S = 1.0


class Voice:
    """Speaks for one process of a site.

    While the link is down nothing is queued: whoever has something to say says it again when it is up.

    Args:
        topics: the fleet's.
        site: our name.
        boot: of this process.
        install: of our state directory.
    """

    def __init__(self, topics: Topics, *, site: str, boot: str, install: str) -> None:
        self.topics = topics
        self.site = site
        self.boot = boot
        self.install = install
        self.link: Link | None = None
        self.is_up = False
        self.welcomed_by: str | None = None
        """The aggregator's boot that let us in; None: nobody, or not on this connection."""
        self._hello_at = 0.0
        self._beat_at = 0.0
        self._beat: tuple[object, ...] = ()

    def connection_changed(self, *, is_up: bool) -> None:
        """The link went up or down; either way we have to be welcomed again."""
        self.is_up = is_up
        self.say_hello_again()

    def say_hello_again(self) -> None:
        """Introduce ourselves anew."""
        self.welcomed_by = None
        self._hello_at = 0.0

    def welcomed(self, aggregator: str) -> None:
        """We may take part."""
        self.welcomed_by = aggregator
        self._beat_at = 0.0
        self.publish_presence()

    def tick(self, now: float) -> None:
        """Say hello, if it is time to."""
        if self.is_up and self.welcomed_by is None and now >= self._hello_at:
            self._hello_at = now + HELLO_S
            self.send(Hello(boot=self.boot, install=self.install, software=f"edgeflame {__version__}"))

    def heartbeat(self, beat: Heartbeat, now: float) -> None:
        """Send a heartbeat: at once when more than the step changed, otherwise at intervals."""
        key = (beat.run, beat.ready, beat.initial, beat.activity, beat.round, beat.paused)
        if key != self._beat or now >= self._beat_at:
            self._beat, self._beat_at = key, now + HEARTBEAT_S
            self.send(beat)

    def send(self, message: UpMessage) -> None:
        """Speak to the aggregator."""
        self._publish(self.topics.up(self.site), encode(message))

    def send_chunk(self, sha256: str, index: int, data: bytes) -> None:
        """Send the aggregator a chunk."""
        self._publish(self.topics.up_chunk(self.site, sha256, index), data)

    def publish_presence(self) -> None:
        """Say to all that we are here."""
        presence = Presence(boot=self.boot, online=True, install=self.install)
        self._publish(self.topics.site_presence(self.site), encode(presence), retain=True)

    def farewell(self) -> bytes:
        """The presence that says that we are not."""
        return encode(Presence(boot=self.boot, online=False, install=self.install))

    def listen(self, sha256: str) -> None:
        """Subscribe to a blob's chunks."""
        assert self.link is not None
        self.link.subscribe(self.topics.chunks(sha256))

    def listen_no_more(self, sha256: str) -> None:
        """End the subscription."""
        assert self.link is not None
        self.link.unsubscribe(self.topics.chunks(sha256))

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.is_up and self.link is not None:
            self.link.publish(topic, payload, retain=retain)
