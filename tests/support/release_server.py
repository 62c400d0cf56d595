"""A server of released packages that announces and serves any file, also those that `model publish` would refuse."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ReceivedMessage
from edgeflame.mqtt.messages import BlobManifest, encode_message
from edgeflame.mqtt.release_messages import ProductModels, Release, ReleaseOutcome, decode_line_models, decode_need
from edgeflame.mqtt.topics import MessageTopic, Topics
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.transfer.protocol import describe_file, unpack_mask
from edgeflame.transfer.store import OutgoingBlob
from tests.support.brokers import BrokerProcess
from tests.support.rollout_daemon import PRODUCT
from tests.support.waiting import wait_for


class Server:
    """A context manager with a thread of its own.

    Args:
        broker: the broker to publish on.
        line: the line whose models are kept in ``models``.
        fleet: name of the fleet.
    """

    def __init__(self, broker: BrokerProcess, *, line: str = "line-1", fleet: str = "test") -> None:
        self._topics = Topics(fleet=fleet)
        self._line = line
        self._events: queue.SimpleQueue[ClientEvent | None] = queue.SimpleQueue()
        self._outgoing: dict[str, OutgoingBlob] = {}
        self.models: ProductModels | None = None
        self.max_chunks: int | None = None
        """The most chunks to serve, as if the publisher then went away; None: all."""
        self.num_chunks = 0
        self._link = MqttClient(
            parse_broker_url(broker.url),
            client_id=f"test-server-{uuid.uuid4().hex[:8]}",
            filters=[self._topics.all_line_models(), self._topics.all_line_up()],
            sink=self._events.put,
        )
        self._link.start()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Server:
        assert self._is_up.wait(20)
        wait_for(lambda: self.models is not None, "the line says what it runs")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._events.put(None)
        self._thread.join(5)
        self._link.close()
        for outgoing in self._outgoing.values():
            outgoing.close()

    def announce(self, path: Path, *, key: str, manifest: BlobManifest | None = None, **changes: Any) -> Release:
        """Announce a file, and serve it."""
        described = manifest or describe_file(path, chunk_bytes=4096)
        values: dict[str, Any] = {
            "release": uuid.uuid4().hex,
            "product": PRODUCT,
            "manifest": described,
            "key": key,
            "name": path.name,
            "published": datetime.now(timezone.utc),
            **changes,
        }
        release = Release(**values)
        if (before := self._outgoing.get(described.sha256)) is not None:
            before.close()
        self._outgoing[described.sha256] = OutgoingBlob(path, described)
        self.say(release)
        return release

    def say(self, release: Release) -> None:
        """Publish an announcement."""
        self._link.publish(self._topics.release(release.product), encode_message(release), retain=True)

    def outcome(self, release: Release) -> ReleaseOutcome | None:
        """What became of it."""
        return None if self.models is None else self.models.outcome(release.release)

    def wait_for(self, release: Release, fate: str | None = None) -> ReleaseOutcome:
        """Wait until the line has decided about a release (with this ``fate``, if given); what became of it."""

        def is_there() -> bool:
            found = self.outcome(release)
            return found is not None and fate in (None, found.fate)

        wait_for(is_there, f"the release is {fate or 'decided'}; last: {self.models}")
        found = self.outcome(release)
        assert found is not None
        return found

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            if isinstance(event, Connected):
                self._is_up.set()
            if not isinstance(event, ReceivedMessage):
                continue
            match self._topics.parse(event.topic):
                case MessageTopic(kind="line_models", line=self._line) if event.payload:
                    self.models = decode_line_models(event.payload).of(PRODUCT)
                case MessageTopic(kind="line_up", line=str(line)):
                    need = decode_need(event.payload)
                    outgoing = self._outgoing.get(need.sha256)
                    if outgoing is not None:
                        missing = unpack_mask(need.missing, outgoing.sender.manifest.num_chunks)
                        outgoing.sender.handle_request(
                            line, missing, resend=need.resend, now=time.monotonic(), window=need.window
                        )
                case _:
                    pass
            event.acknowledge()
            for sha256, outgoing in list(self._outgoing.items()):

                def send(index: int, data: bytes, sha256: str = sha256) -> None:
                    if self.max_chunks is None or self.num_chunks < self.max_chunks:
                        self.num_chunks += 1
                        self._link.publish(self._topics.release_chunk(sha256, index), data)

                outgoing.send_window(send)
