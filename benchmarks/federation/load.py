"""Many sites in one light process: the real messages, transfers and connections, without learning and without a disk.

Every site has a connection of its own. All send the same kind of update: the initial model times a number of theirs.
"""

from __future__ import annotations

import queue
import time
import uuid
from pathlib import Path

import numpy as np
import safetensors.numpy

from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, Disconnected, ReceivedMessage
from edgeflame.mqtt.messages import (
    BlobManifest,
    BlobNeed,
    FinishReport,
    Heartbeat,
    Hello,
    Offer,
    Receipt,
    Refusal,
    RoundState,
    UpMessage,
    Welcome,
    decode_down,
    decode_round,
    encode_message,
)
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.transfer.protocol import ChunkKind, Receiver, describe_file
from edgeflame.transfer.store import OutgoingBlob
from trainer.agent.aggregator_client import Upload

HEARTBEAT_S = 1.0
NUM_TENSORS = 80
"""A backbone has about as many large ones."""


def write_models(folder: Path, *, num_bytes: int, num_sites: int) -> tuple[Path, list[Path]]:
    """An initial model of random float32 tensors, and an update for each site."""
    generator = np.random.default_rng(0)
    elements = num_bytes // 4 // NUM_TENSORS
    base = {f"layer{i:03}": generator.standard_normal(elements, dtype=np.float32) for i in range(NUM_TENSORS)}
    initial = folder / "initial.safetensors"
    safetensors.numpy.save_file(base, initial)
    updates = []
    for site in range(num_sites):
        path = folder / f"update-{site}.safetensors"
        factor = np.float32(1 + 1e-4 * (site + 1))
        safetensors.numpy.save_file({name: values * factor for name, values in base.items()}, path)
        updates.append(path)
    return initial, updates


class LoadSite:
    """One site.

    Args:
        name: its name.
        url: the broker.
        topics: the fleet's MQTT topics.
        inbox: gets its events, with the site.
        initial: the initial model, which all sites have.
        update: what it sends in every round.
    """

    def __init__(
        self,
        name: str,
        url: BrokerUrl,
        topics: Topics,
        inbox: queue.SimpleQueue[tuple[LoadSite, ClientEvent]],
        initial: tuple[Path, BlobManifest],
        update: tuple[Path, BlobManifest],
    ) -> None:
        self.name = name
        self.announced: RoundState | None = None
        self._topics = topics
        self._initial, self._update = initial, update
        self._boot, self._install = uuid.uuid4().hex, uuid.uuid4().hex
        self._models = {initial[1].sha256}
        self._download: Receiver | None = None
        self._upload: Upload | None = None
        self._offered: tuple[str, int] = ("", 0)
        self._is_up = self._welcome = False
        self._beat_at = 0.0
        self._link = MqttClient(
            url,
            client_id=f"load-{name}",
            filters=[topics.round, topics.site_down(name)],
            sink=lambda event: inbox.put((self, event)),
        )
        self._link.start()

    def close(self) -> None:
        self._link.close(flush_s=0.5)

    def on_event(self, event: ClientEvent, now: float) -> None:
        match event:
            case Connected():
                self._is_up = True
            case Disconnected() | ConnectionFailed():
                raise RuntimeError(str(event))
            case ReceivedMessage():
                match self._topics.parse(event.topic):
                    case ChunkTopic(index=index):
                        self._chunk(index, event.payload, now)
                    case MessageTopic(kind="round") if event.payload:
                        self.announced = decode_round(event.payload)
                        self._begin(now)
                    case MessageTopic(kind="down"):
                        self._on_down(decode_down(event.payload), now)
                event.acknowledge()
                if self._upload is not None:
                    self._upload.pump()

    def tick(self, now: float) -> None:
        """Send the messages that are sent at intervals."""
        if not self._is_up or now < self._beat_at:
            return
        self._beat_at = now + HEARTBEAT_S
        if not self._welcome:
            self._send(Hello(boot=self._boot, install=self._install))
            return
        announced = self.announced
        self._send(
            Heartbeat(
                boot=self._boot,
                run=None if announced is None else announced.run,
                ready=announced is not None,
                initial=self._initial[1].sha256,
                # Waiting for the broker counts as progress here.
                step=int(now),
            )
        )
        if self._download is not None and self._download.is_stalled(now):
            self._send(self._download.make_request(resend=True, now=now))
        if self._upload is not None:
            self._upload.tick(now)
            self._upload.pump()

    def _on_down(self, message: object, now: float) -> None:
        match message:
            case Welcome():
                self._welcome = True
                self._begin(now)
            case BlobNeed() if self._upload is not None:
                self._upload.on_need(message, now=now)
            case Receipt() if (message.purpose, message.round) == self._offered:
                self._stop_upload()
            case Refusal():
                raise RuntimeError(f"{self.name}: {message.reason}: {message.detail}")

    def _begin(self, now: float) -> None:
        state = self.announced
        self._stop_upload()
        if state is None or not self._welcome or self.name not in state.asked:
            return
        base = state.base
        if base is not None and base.sha256 not in self._models:
            if self._download is None or self._download.manifest.sha256 != base.sha256:
                self._link.subscribe(self._topics.training_chunks(base.sha256))
                self._download = Receiver(base, have=np.zeros(base.num_chunks, dtype=np.bool_), now=now)
                self._send(self._download.make_request(resend=True, now=now))
        elif state.phase == "initialise":
            self._offer(*self._initial, "initial", 0, now)
        elif state.phase == "train":
            self._offer(*self._update, "update", state.round, now)
        elif state.phase == "finish" and base is not None:
            self._send(FinishReport(run=state.run, model=base.sha256))

    def _chunk(self, index: int, data: bytes, now: float) -> None:
        receiver = self._download
        if receiver is None:
            return
        if receiver.add_chunk(index, data, now=now) is ChunkKind.DAMAGED:
            raise RuntimeError("a damaged chunk")
        if receiver.ack_due(now):
            self._send(receiver.make_request(resend=False, now=now))
        if receiver.is_complete:
            self._link.unsubscribe(self._topics.training_chunks(receiver.manifest.sha256))
            self._models.add(receiver.manifest.sha256)
            self._download = None
            self._begin(now)

    def _offer(self, path: Path, manifest: BlobManifest, purpose: str, number: int, now: float) -> None:
        assert self.announced is not None
        offer = Offer(
            run=self.announced.run, purpose=purpose, round=number, manifest=manifest, num_samples=10, num_steps=1
        )
        self._offered = (purpose, number)
        self._upload = Upload(
            OutgoingBlob(path, manifest),
            offer,
            send=self._send,
            publish=lambda index, data: self._link.publish(
                self._topics.up_chunk(self.name, manifest.sha256, index), data
            ),
        )
        self._upload.offer(now=now)

    def _stop_upload(self) -> None:
        if self._upload is not None:
            self._upload.close()
            self._upload = None

    def _send(self, message: UpMessage) -> None:
        self._link.publish(self._topics.site_up(self.name), encode_message(message))


def run_sites(url: BrokerUrl, fleet: str, initial: Path, updates: list[Path], *, timeout_s: float) -> dict[str, float]:
    """Run all sites until the run is over; returns when each phase was announced, seconds on the monotonic clock."""
    topics = Topics(fleet=fleet)
    inbox: queue.SimpleQueue[tuple[LoadSite, ClientEvent]] = queue.SimpleQueue()
    shared = (initial, describe_file(initial))
    sites = [
        LoadSite(f"site{number:03}", url, topics, inbox, shared, (path, describe_file(path)))
        for number, path in enumerate(updates)
    ]
    times: dict[str, float] = {}
    deadline = time.monotonic() + timeout_s
    tick_at = 0.0
    try:
        while "done" not in times:
            now = time.monotonic()
            if now > deadline:
                raise RuntimeError(f"not over after {timeout_s:g} s; announced were {times}")
            try:
                site, event = inbox.get(timeout=0.1)
            except queue.Empty:
                pass
            else:
                site.on_event(event, now)
                if site is sites[0] and (state := site.announced) is not None:
                    times.setdefault(f"{state.phase} {state.round}" if state.phase == "train" else state.phase, now)
                    if state.phase == "failed":
                        raise RuntimeError(state.detail)
            if now >= tick_at:
                tick_at = now + 0.1
                for one in sites:
                    one.tick(now)
    finally:
        for site in sites:
            site.close()
    return times
