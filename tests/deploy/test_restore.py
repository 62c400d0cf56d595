"""Each state folder, packed as docs/deploy.md says and unpacked elsewhere, goes on where it was."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge.delivery.outbox import Delivery
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ReceivedMessage
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY, TINY_TRAINER
from tests.support.ports import free_port
from tests.support.small_package import write_images
from tests.support.waiting import wait_for


def moved(state: Path, elsewhere: Path) -> Path:
    """Packed, gone, and unpacked on another "machine"."""
    archive = state.with_suffix(".tar.gz")
    subprocess.run(["tar", "-C", str(state.parent), "-czf", str(archive), state.name], check=True)
    subprocess.run(["rm", "-rf", str(state)], check=True)
    elsewhere.mkdir(exist_ok=True)
    subprocess.run(["tar", "-C", str(elsewhere), "-xzf", str(archive)], check=True)
    return elsewhere / state.name


@contextmanager
def running(log: Path, *arguments: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "edgeflame", *map(str, arguments)]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, env=known)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_results_that_waited_are_delivered_from_a_restored_folder(tmp_path: Path, package_file: Path) -> None:
    images, port = write_images(tmp_path / "images"), free_port()
    config = tmp_path / "line.toml"
    config.write_text(
        f'[mqtt]\nbroker = "mqtt://127.0.0.1:{port}"\nfleet = "test"\nline = "line-1"\n[retry]\nflush_s = 0.1\n'
    )

    def inspect(state: Path) -> None:
        arguments = ["--model", package_file, "--source", images, "--config", config, "--state", state, "--json"]
        with running(tmp_path / "line.log", "inspect", *arguments) as process:
            assert process.wait(timeout=60) == 0, (tmp_path / "line.log").read_text()

    inspect(tmp_path / "line-1")  # its broker is away
    restored = moved(tmp_path / "line-1", tmp_path / "other")
    config.write_text(config.read_text().replace("0.1\n", "30\n"))
    heard: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    results = "edgeflame/v1/test/line/line-1/result"
    with (
        BrokerProcess("embedded", tmp_path, port=port) as broker,
        MqttClient(parse_broker_url(broker.url), client_id="mes", filters=[results], sink=heard.put),
    ):
        assert isinstance(heard.get(timeout=20), Connected)
        inspect(restored)
        events = [heard.get(timeout=20) for _ in range(10)]
    told = [msgspec.json.decode(event.payload, type=Delivery) for event in events if isinstance(event, ReceivedMessage)]
    assert [delivery.number for delivery in told] == list(range(1, 11))
    assert len({delivery.outbox for delivery in told}) == 1


def test_a_run_goes_on_from_restored_folders(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    (tmp_path / "data").mkdir()
    worker = shlex.join([sys.executable, str(TINY_TRAINER)])
    with BrokerProcess("embedded", tmp_path) as broker:
        fleet = ["--broker", broker.url, "--fleet", "test"]

        def aggregator(state: Path) -> list[object]:
            return ["aggregate", *fleet, "--sites", "1", "--rounds", "2", "--state", state]

        def site(state: Path) -> list[object]:
            return ["train", *fleet, "--site", "a", "--data", tmp_path / "data", "--worker", worker, "--state", state]

        states = [tmp_path / "aggregator", tmp_path / "a"]
        with (
            running(tmp_path / "aggregator.log", *aggregator(states[0])) as first,
            running(tmp_path / "a.log", *site(states[1]), TINY_GATE=str(gate)) as second,
        ):
            (gate / "go-a-1").touch()
            wait_for((gate / "waiting-a-2").exists, "the second round is open")
            for process in (first, second):
                process.send_signal(signal.SIGTERM)
            assert [first.wait(timeout=30), second.wait(timeout=30)] == [130, 130]
        restored = [moved(state, tmp_path / "other") for state in states]
        with (
            running(tmp_path / "aggregator.log", *aggregator(restored[0])) as first,
            running(tmp_path / "a.log", *site(restored[1])) as second,
        ):
            assert [first.wait(timeout=60), second.wait(timeout=60)] == [0, 0], (tmp_path / "a.log").read_text()
    assert "run_continued" in (tmp_path / "aggregator.log").read_text()
    assert msgspec.json.decode((restored[0] / "ledger.json").read_bytes())["outcome"] == "done"
