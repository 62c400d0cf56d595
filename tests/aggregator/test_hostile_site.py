"""One site that says whatever it likes must not end the run, nor the aggregator."""

from __future__ import annotations

import hashlib
import threading
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as mqtt
import pytest
import safetensors.numpy
from paho.mqtt.enums import CallbackAPIVersion

from edgeflame.mqtt.messages import (
    BlobManifest,
    Heartbeat,
    Hello,
    Offer,
    RoundState,
    TaskFailed,
    decode_down,
    decode_round,
    encode_message,
)
from edgeflame.mqtt.topics import Topics
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)

TOPICS = Topics(fleet="test")
NAME, BOOT, INSTALL = "aaa", "a" * 32, "b" * 32
"""First by name: it is asked for the initial model."""


FORGED = "gone\nrun_ended succeeded=true\x1b[1A"


class Evil:
    """A client that speaks the protocol when it helps it."""

    def __init__(self, port: int) -> None:
        self.state: RoundState | None = None
        self.answers: list[Any] = []
        self._welcomed = threading.Event()
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="evil", protocol=mqtt.MQTTv5)
        client.on_connect = lambda *_: client.subscribe([(TOPICS.round, 1), (TOPICS.site_down(NAME), 1)])
        client.on_message = self._on_message
        client.connect("127.0.0.1", port)
        client.loop_start()
        self._client = client

    def _on_message(self, _client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic == TOPICS.round:
            self.state = decode_round(message.payload)
            return
        answer = decode_down(message.payload)
        self.answers.append(answer)
        if type(answer).__name__ == "Welcome":
            self._welcomed.set()

    def say(self, payload: bytes, topic: str = TOPICS.site_up(NAME)) -> None:
        self._client.publish(topic, payload, qos=1)

    def join(self) -> None:
        def welcomed() -> bool:
            self.say(encode_message(Hello(boot=BOOT, install=INSTALL)))
            return self._welcomed.wait(0.3)

        wait_for(welcomed, "the hostile site is welcomed")
        wait_for(lambda: self.state is not None, "a run is announced")
        assert self.state is not None
        self.say(encode_message(Heartbeat(boot=BOOT, run=self.state.run, ready=True, initial="c" * 64)))

    def wait_for_phase(self, phase: str, number: int = 0) -> RoundState:
        def there() -> bool:
            return self.state is not None and (self.state.phase, self.state.round) == (phase, number)

        wait_for(there, f"{phase} {number}")
        assert self.state is not None
        return self.state

    def refused(self, reason: str) -> None:
        wait_for(lambda: any(getattr(a, "reason", None) == reason for a in self.answers), f"a refusal: {reason}")

    def garbage(self) -> None:
        """On every topic it may write to, and some that are none."""
        beat = encode_message(Heartbeat(boot=BOOT))
        for payload in (
            b"", b"\xff" * 1000, b"[" * 10_000, b'{"v":"1.0","type":"' + b"x" * 1_000_000 + b'"}', b'{"v":"9.0"}',
            beat.replace(b'"step":0', b'"step":-1'), beat.replace(b'"step":0', b'"step":1e300'),
        ):  # fmt: skip
            self.say(payload)
            self.say(payload, TOPICS.site_presence(NAME))
        base = f"edgeflame/v1/test/site/{NAME}"
        for topic in (
            f"{base}/up/blob/{'d' * 64}/0",
            f"{base}/up/blob/{'d' * 64}/9999999",
            f"{base}/up/blob/{'D' * 64}/0",
            f"{base}/up/blob/../0",
            f"{base}/up/x",
            "edgeflame/v1/test/site/../up/message",
            "edgeflame/v1/test/site//up/message",
            f"edgeflame/v1/test/site/{'x' * 1000}/up/message",
        ):
            self.say(b"\x00" * 100, topic)

    def close(self) -> None:
        self._client.loop_stop()
        self._client.disconnect()


def manifest(data: bytes, **changes: Any) -> BlobManifest:
    whole = BlobManifest(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        chunk_bytes=len(data),
        crc32s=zlib.crc32(data).to_bytes(4, "little"),
    )
    return msgspec.structs.replace(whole, **changes)


def test_a_hostile_site_is_refused_and_the_run_goes_on(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = "min_available_sites = 2\nquorum = 0.5\nrounds = 2\ndeadline_s = 6.0"
    with Fleet(embedded, tmp_path, config=config) as fleet:
        aggregator = fleet.aggregator()
        aggregator.wait_for_log("broker_connected")
        evil = Evil(embedded.port)
        evil.join()
        gate = tmp_path / "gate"
        gate.mkdir()
        good = fleet.site("good", TINY_GATE=str(gate))
        state = evil.wait_for_phase("initialise")
        evil.garbage()
        # 64 GiB, announced in a sound manifest.
        huge = BlobManifest(sha256="e" * 64, size_bytes=1 << 36, chunk_bytes=1 << 20, crc32s=bytes(4 << 16))
        evil.say(encode_message(Offer(run=state.run, purpose="initial", round=0, manifest=huge)))
        evil.refused("too_large")
        state = evil.wait_for_phase("train", 1)
        evil.garbage()
        other = safetensors.numpy.save({"weight": np.zeros(2000, np.float32)})
        base = safetensors.numpy.save({"weight": np.full(2000, np.nan, np.float32)})
        offers: list[tuple[str, Offer, bytes]] = [
            ("samples", Offer(run=state.run, purpose="update", round=1, manifest=manifest(base)), base),
            ("schema", Offer(run=state.run, purpose="update", round=1, manifest=manifest(other), num_samples=5), other),
            (
                "not_tensors",
                Offer(run=state.run, purpose="update", round=1, manifest=manifest(b"x" * 99), num_samples=5),
                b"x" * 99,
            ),
            ("unknown_run", Offer(run="9" * 32, purpose="update", round=1, manifest=manifest(base)), base),
            ("stale_round", Offer(run=state.run, purpose="update", round=7, manifest=manifest(base)), base),
        ]
        for reason, offer, data in offers:
            evil.say(encode_message(offer))
            evil.say(data, TOPICS.up_chunk(NAME, offer.manifest.sha256, 0))
            evil.refused(reason)
        # A false manifest: every chunk is as announced, and the whole is not.
        false = manifest(b"y" * 99, sha256="f" * 64)
        offer = Offer(run=state.run, purpose="update", round=1, manifest=false, num_samples=5)
        for _ in range(4):
            evil.say(encode_message(offer))
            evil.say(b"y" * 99, TOPICS.up_chunk(NAME, false.sha256, 0))
        evil.refused("corrupt")
        evil.say(encode_message(TaskFailed(run=state.run, purpose="update", round=1, detail=FORGED)))
        aggregator.wait_for_log("site_failed")
        (gate / "go").touch()
        assert [aggregator.wait(), good.wait()] == [0, 0]
        evil.close()
        assert "Traceback" not in aggregator.log
        assert all(line.isprintable() and "run_ended" not in line.split()[:1] for line in aggregator.log.split("\n"))
        ledger = fleet.ledger()
        assert [[c["site"] for c in entry["contributed"]] for entry in ledger["rounds"]] == [["good"], ["good"]]
        assert ledger["initial_model"]["site"] == "good"


@pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)
def test_a_site_that_only_claims_to_go_on_holds_nobody_up(broker: BrokerProcess, tmp_path: Path) -> None:
    deadline_s, rounds = 3.0, 3
    config = (
        f"min_available_sites = 3\nquorum = 0.6\nrounds = {rounds}\ndeadline_s = {deadline_s}\nstraggler_factor = 1.0"
    )
    with Fleet(broker, tmp_path, config=config) as fleet:
        aggregator = fleet.aggregator()
        aggregator.wait_for_log("broker_connected")
        evil = Evil(broker.port)
        evil.join()
        good = [fleet.site("good"), fleet.site("other")]
        stop = threading.Event()
        sent = 0

        def claim() -> None:
            """Heartbeats with a rising step, hundreds a second, in turns at rest and not."""
            nonlocal sent
            while not stop.wait(0.002):
                sent += 1
                evil.say(b"{", TOPICS.site_presence(NAME))
                run = evil.state.run if evil.state is not None else None
                is_begun = evil.state is not None and evil.state.phase == "train"
                resting = "no reason" if is_begun and sent % 2 else None
                evil.say(
                    encode_message(
                        Heartbeat(
                            boot=BOOT, run=run, ready=True, initial="c" * 64, activity="training", round=1,
                            step=sent, num_steps=10**9, paused=resting,
                        )
                    )
                )  # fmt: skip

        thread = threading.Thread(target=claim)
        thread.start()
        try:
            assert [aggregator.wait(), *(site.wait() for site in good)] == [0, 0, 0]
        finally:
            stop.set()
            thread.join()
            evil.close()
        ledger = fleet.ledger()
        assert [[c["site"] for c in entry["contributed"]] for entry in ledger["rounds"]] == [["good", "other"]] * rounds
        # Silent when asked for the initial model, overdue in a round, and at the end: each time one deadline.
        assert [entry["site"] for entry in ledger["rounds"][0]["left_out"]] == [NAME]
        assert ledger["rounds"][1]["asked"] == ["good", "other"]
        assert [entry["site"] for entry in ledger["packages_missing"]] == [NAME]
        assert "site_slowed_down site=aaa too_many=messages" in aggregator.log
        assert "site_slowed_down site=aaa too_many=changes" in aggregator.log
        assert sent > 1000
        assert 1 <= aggregator.log.count("message_refused") <= 30, "of thousands"
        changes = aggregator.log.count("site_paused site=aaa") + aggregator.log.count("site_resumed site=aaa")
        assert 1 <= changes <= 12, "of hundreds"
