"""The two ends of one measured transfer, each a process of its own: raw paho, and EdgeFlame's blob transfer.

An end connects, sends ``ready``, waits for ``go``, and sends its :class:`Times` when it is done. Times are readings of
the system-wide monotonic clock, so that those of two processes compare.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from aggregator.uploads import UploadReceiver
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ReceivedMessage
from edgeflame.mqtt.messages import (
    DEFAULT_CHUNK_BYTES,
    BlobManifest,
    BlobNeed,
    Offer,
    Receipt,
    decode_down,
    decode_up,
    encode_message,
)
from edgeflame.mqtt.topics import ChunkTopic, Topics
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.transfer.protocol import describe_file, unpack_mask
from edgeflame.transfer.store import BlobStore, Download, OutgoingBlob
from trainer.agent.aggregator_client import Upload

TOPICS = Topics(fleet="bench")
SITE = "site"
RUN = "0" * 32
TICK_S = 0.25


class Times(NamedTuple):
    """When an end began and ended, and the processor time it took in between, seconds."""

    began: float
    ended: float
    cpu_s: float


Control = Connection
"""The pipe to the measuring process: sends ``ready`` and :class:`Times`, receives ``go`` and ``stop``."""


def raw_publisher(control: Control, url: str, path: Path) -> None:
    """Publish a file in chunks at QoS 1; done when the broker has acknowledged all."""
    blob = path.read_bytes()
    client, broker = _paho(), parse_broker_url(url)
    client.connect(broker.host, broker.port)
    client.loop_start()
    while not client.is_connected():
        time.sleep(0.01)
    control.send("ready")
    control.recv()
    started, cpu = time.monotonic(), time.process_time()
    sent = [
        client.publish(f"bench/{start}", blob[start : start + DEFAULT_CHUNK_BYTES], qos=1)
        for start in range(0, len(blob), DEFAULT_CHUNK_BYTES)
    ]
    for info in sent:
        info.wait_for_publish()
    control.send(Times(started, time.monotonic(), time.process_time() - cpu))
    control.recv()
    client.loop_stop()
    client.disconnect()


def raw_subscriber(control: Control, url: str, size_bytes: int) -> None:
    """Count bytes until all have arrived; their content is not read."""
    client, broker = _paho(), parse_broker_url(url)
    num_bytes = 0
    cpu = 0.0

    def on_message(_client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        nonlocal num_bytes
        num_bytes += len(message.payload)
        if num_bytes == size_bytes:
            control.send(Times(0.0, time.monotonic(), time.process_time() - cpu))

    client.on_message = on_message
    client.on_connect = lambda client, *_: client.subscribe("bench/#", qos=1)
    client.on_subscribe = lambda *_: control.send("ready")
    client.connect(broker.host, broker.port)
    client.loop_start()
    control.recv()
    cpu = time.process_time()
    control.recv()
    client.loop_stop()
    client.disconnect()


def uploader(control: Control, url: str, path: Path) -> None:
    """A site that offers an update, until it has the receipt."""
    inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    manifest = describe_file(path)
    offer = Offer(run=RUN, purpose="update", round=1, manifest=manifest, num_samples=1)
    with MqttClient(
        parse_broker_url(url), client_id="bench-site", filters=[TOPICS.site_down(SITE)], sink=inbox.put
    ) as link:
        upload = Upload(
            OutgoingBlob(path, manifest),
            offer,
            send=lambda message: link.publish(TOPICS.site_up(SITE), encode_message(message)),
            publish=lambda index, data: link.publish(TOPICS.up_chunk(SITE, manifest.sha256, index), data),
        )
        cpu = _ready(control, inbox)
        started = time.monotonic()
        upload.offer(now=started)
        is_done = False
        while not is_done:
            event = _next(inbox)
            now = time.monotonic()
            if isinstance(event, ReceivedMessage):
                message = decode_down(event.payload)
                is_done = isinstance(message, Receipt)
                if isinstance(message, BlobNeed):
                    upload.on_need(message, now=now)
                event.acknowledge()
            upload.tick(now)
            upload.pump()
        control.send(Times(started, time.monotonic(), time.process_time() - cpu))
        control.recv()


def intake(control: Control, url: str, _size_bytes: int) -> None:
    """An aggregator that takes one offered blob: on disk, hashed, receipt."""
    inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        MqttClient(
            parse_broker_url(url), client_id="bench-aggregator", filters=[TOPICS.all_up()], sink=inbox.put
        ) as link,
    ):
        taking = UploadReceiver(
            BlobStore(Path(folder)), lambda site, message: link.publish(TOPICS.site_down(site), encode_message(message))
        )
        cpu = _ready(control, inbox)
        arrived = None
        while arrived is None:
            event = _next(inbox)
            now = time.monotonic()
            if not isinstance(event, ReceivedMessage):
                continue
            match TOPICS.parse(event.topic):
                case ChunkTopic(site=str(site), sha256=sha256, index=index):
                    _, arrived = taking.receive_chunk(site, sha256, index, event.payload, now=now)
                case _:
                    message = decode_up(event.payload)
                    if isinstance(message, Offer):
                        arrived = taking.start(SITE, message, now=now)
            event.acknowledge()
        assert arrived.intact
        sha256 = arrived.offer.manifest.sha256
        link.publish(TOPICS.site_down(SITE), encode_message(Receipt(run=RUN, purpose="update", round=1, sha256=sha256)))
        control.send(Times(0.0, time.monotonic(), time.process_time() - cpu))
        control.recv()


def distributor(control: Control, url: str, path: Path) -> None:
    """An aggregator that serves a model to whoever asks, until it is told to stop."""
    inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    manifest = describe_file(path)
    with MqttClient(
        parse_broker_url(url), client_id="bench-aggregator", filters=[TOPICS.all_up()], sink=inbox.put
    ) as link:
        outgoing = OutgoingBlob(path, manifest)
        cpu = _ready(control, inbox, say=manifest)
        while not control.poll():
            event = _next(inbox)
            if isinstance(event, ReceivedMessage):
                need = decode_up(event.payload)
                site = event.topic.split("/")[4]
                if isinstance(need, BlobNeed):
                    missing = unpack_mask(need.missing, manifest.num_chunks)
                    outgoing.sender.handle_request(
                        site, missing, resend=need.resend, now=time.monotonic(), window=need.window
                    )
                event.acknowledge()
            outgoing.send_window(lambda index, data: link.publish(TOPICS.training_chunk(manifest.sha256, index), data))
        control.send(Times(0.0, time.monotonic(), time.process_time() - cpu))


def downloader(control: Control, url: str, manifest: BlobManifest, site: str) -> None:
    """A site that fetches a model: on disk, hashed."""
    inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        MqttClient(
            parse_broker_url(url),
            client_id=f"bench-{site}",
            filters=[TOPICS.training_chunks(manifest.sha256)],
            sink=inbox.put,
        ) as link,
    ):
        store = BlobStore(Path(folder))

        def send(message: object) -> None:
            link.publish(TOPICS.site_up(site), encode_message(message))

        cpu = _ready(control, inbox)
        started = time.monotonic()
        download = Download(store, manifest, owner="aggregator", send=send, now=started)
        download.request_missing(now=started)
        while manifest.sha256 not in store:
            event = _next(inbox)
            now = time.monotonic()
            if isinstance(event, ReceivedMessage):
                address = TOPICS.parse(event.topic)
                assert isinstance(address, ChunkTopic)
                download.add_chunk(address.index, event.payload, now=now)
                event.acknowledge()
            download.tick(now)
        control.send(Times(started, time.monotonic(), time.process_time() - cpu))
        control.recv()


def _paho() -> mqtt.Client:
    # paho's own window is 20 messages, which is what Mosquitto takes.
    return mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)


def _next(inbox: queue.SimpleQueue[ClientEvent]) -> ClientEvent | None:
    try:
        return inbox.get(timeout=TICK_S)
    except queue.Empty:
        return None


def _ready(control: Control, inbox: queue.SimpleQueue[ClientEvent], say: object = "ready") -> float:
    while not isinstance(inbox.get(), Connected):
        pass
    control.send(say)
    control.recv()
    return time.process_time()


Peer = Callable[..., None]
