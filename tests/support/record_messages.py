"""Records the messages of real runs, one of each kind, as files that later versions must read.

    python -m tests.support.record_messages

writes ``<version>/up.jsonl``, ``down.jsonl``, ``round.jsonl`` and ``presence.jsonl`` in tests/upgrades/recorded,
for the protocol version of the code it runs. A version is recorded once, when it is new; its files are never changed
after.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgeflame.mqtt.messages import VERSION
from edgeflame.mqtt.topics import MessageTopic, Topics
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import RECORDED, REPOSITORY
from tests.support.waiting import wait_for


class Recorder:
    """Keeps the first message of each kind: its type, which fields it has, and what tells them apart."""

    def __init__(self, port: int) -> None:
        self.kept: dict[str, dict[tuple[Any, ...], bytes]] = {}
        subscribed = threading.Event()
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="recorder", protocol=mqtt.MQTTv5)
        client.on_connect = lambda *_: client.subscribe("edgeflame/v1/#", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = self._on_message
        client.connect("127.0.0.1", port)
        client.loop_start()
        subscribed.wait(10)
        self._client = client

    def close(self) -> None:
        self._client.loop_stop()
        self._client.disconnect()

    def _on_message(self, _client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        fleet = message.topic.split("/")[2]
        match Topics(fleet=fleet).parse(message.topic):
            case MessageTopic(kind=kind) if message.payload:
                fields = msgspec.json.decode(message.payload)
                telling = [fields.get(name) for name in ("purpose", "reason", "phase", "online", "ready", "activity")]
                empty = [name for name, value in sorted(fields.items()) if value in (None, 0, {}, [], "")]
                name = "presence" if kind.endswith("presence") else kind
                key = (fields["type"], *telling, *empty)
                self.kept.setdefault(name, {}).setdefault(key, message.payload)
            case _:
                pass


def scenes(broker: BrokerProcess, folder: Path) -> None:
    """Runs in which nearly everything is said: models, bad models, failures, a second site of a name, pauses."""
    gate = folder / "gate"
    gate.mkdir()
    with Fleet(broker, folder, config="min_available_sites = 3\nquorum = 0.3") as fleet:
        aggregator = fleet.aggregator()
        sites = [fleet.site("a", TINY_GATE=str(gate)), fleet.site("b", TINY_FAIL="b:1:nan")]
        sites.append(fleet.site("c", TINY_FAIL="c:2:data"))
        wait_for((gate / "waiting-a-1").exists, "a trains")
        second = fleet.site("a", process="second")
        second.wait()
        (gate / "go").touch()
        for process in (aggregator, *sites):
            process.wait()
    missed = folder / "missed"
    missed.mkdir()
    with Fleet(broker, missed, config="min_available_sites = 1\nquorum = 1.0") as fleet:
        for process in (fleet.aggregator(), fleet.site("a", TINY_FAIL="a:1:shape")):
            process.wait()
    paused = folder / "paused"
    (paused / "gate").mkdir(parents=True)
    with Fleet(
        broker, paused, config='min_available_sites = 3\nquorum = 0.3\nrounds = 1\nstatistics = "federated"'
    ) as fleet:
        # Pauses, a leave-taking and pooled statistics, since 1.1.
        aggregator = fleet.aggregator()
        sites = {name: fleet.site(name, TINY_GATE=str(paused / "gate")) for name in "abc"}
        for name in sites:
            wait_for((paused / "gate" / f"waiting-{name}-1").exists, f"{name} trains")
        command("site", "pause", "--state", str(fleet.site_state("a")), "--reason", "the line runs")
        command("rounds", "pause", "b", "--state", str(paused / "aggregator"))
        aggregator.wait_for_log("site_paused", times=2)
        command("site", "leave", "--state", str(fleet.site_state("c")), "--reason", "the line is sold")
        sites["c"].wait()
        command("site", "resume", "--state", str(fleet.site_state("a")))
        command("rounds", "resume", "b", "--state", str(paused / "aggregator"))
        aggregator.wait_for_log("site_resumed", times=2)
        (paused / "gate" / "go").touch()
        for process in (aggregator, sites["a"], sites["b"]):
            process.wait()


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "edgeflame", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Record, and write what was kept."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory() as name, BrokerProcess("embedded", Path(name)) as broker:
        recorder = Recorder(broker.port)
        scenes(broker, Path(name))
        recorder.close()
    out = RECORDED / VERSION
    out.mkdir()
    for kind, messages in recorder.kept.items():
        (out / f"{kind}.jsonl").write_bytes(b"".join(line + b"\n" for _, line in sorted(messages.items(), key=str)))


if __name__ == "__main__":
    main()
