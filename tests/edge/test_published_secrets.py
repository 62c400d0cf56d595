"""What a camera is told in confidence is neither logged, shown, stored nor published by a real daemon."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from edgeflame.errors import ConfigError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, ReceivedMessage
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.waiting import wait_for

SECRET = "s3cret-word"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    with BrokerProcess("embedded", tmp_path) as process:
        yield process


def test_a_daemon_publishes_no_camera_s_password(broker: BrokerProcess, package_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    closed, web = free_port(), free_port()
    config = tmp_path / "line.toml"
    config.write_text(
        f"""
        [products]
        tile = "{package_file}"
        [cameras.query]
        source = "rtsp://127.0.0.1:{closed}/cam/realmonitor?channel=1&user=admin&password={SECRET}"
        [cameras.path]
        source = "rtsp://127.0.0.1:{closed}/user=admin_password={SECRET}_channel=1_stream=0.sdp"
        [cameras.pipeline]
        source = 'gst:souphttpsrc location=http://127.0.0.1:{closed}?usr=a&pwd={SECRET} user-pw="x {SECRET}"'
        [cameras.belt]
        source = "boards:warm_wood?size=64"
        [mqtt]
        broker = "{broker.url}"
        fleet = "f"
        line = "l"
        [web]
        listen = "127.0.0.1:{web}"
        """
    )
    heard: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    published: list[tuple[str, bytes]] = []

    def drain() -> bool:
        while not heard.empty():
            if isinstance(event := heard.get(), ReceivedMessage):
                published.append((event.topic, event.payload))
                event.acknowledge()
        return any(topic.endswith("/result") for topic, _ in published) and any(
            topic.endswith("/state") and b'"online":true' in payload for topic, payload in published
        )

    arguments = ["inspect", "--config", str(config), "--state", str(tmp_path / "state"), "--json"]
    with (
        MqttClient(parse_broker_url(broker.url), client_id="all", filters=["#"], sink=heard.put),
        (tmp_path / "log").open("wb") as log,
        (tmp_path / "out").open("wb") as out,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeflame", *arguments],
            stdout=out,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        try:
            wait_for(drain, "the line is online and has published a result")
            written = (tmp_path / "log").read_text
            wait_for(lambda: written().count("cannot be opened as video") >= 2, "both cameras were tried")
            wait_for(lambda: "gst:" in written(), "and the pipeline")
            pages = [
                urllib.request.urlopen(f"http://127.0.0.1:{web}{path}", timeout=10).read()
                for path in ("/api/line", "/api/view", "/metrics")
            ]
            children = [
                path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if b"gst_child" in _read(path)
            ]
        finally:
            process.terminate()
            process.wait(20)
    drain()
    everything = [payload for _, payload in published] + pages + children
    everything += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert all(SECRET.encode() not in data for data in everything)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_doctor_and_its_bundle_show_none(package_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    config, bundle = tmp_path / "line.toml", tmp_path / "bundle.zip"
    source = f"rtsp://127.0.0.1:{free_port()}/live?usr=admin&pwd={SECRET}"
    config.write_text(f'[products]\ntile = "{package_file}"\n[cameras.a]\nsource = "{source}"\n')
    done = CliRunner().invoke(cli, ["doctor", "--config", str(config), "--bundle", str(bundle), "--json"])
    assert "rtsp://127.0.0.1" in done.stdout
    assert SECRET not in done.stdout
    with zipfile.ZipFile(bundle) as archive:
        assert all(SECRET.encode() not in archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize(
    "text",
    [
        f'[webhook]\nurl = "https://me:{SECRET}@mes/results"',
        f'[webhook]\nurl = "htps://hooks.example/services/{SECRET}"',
        f'[webhook]\nurl = "https://mes/results?token={SECRET} x"',
        f'[webhook]\nurl = "https://[mes/{SECRET}"',
        f'[webhook]\nurl = ["https://mes/results?token={SECRET}"]',
        f'[cameras.a]\nsource = ["rtsp://me:{SECRET}@cam/live"]',
        f'[mqtt]\nfleet = "f"\nline = "l"\nbroker = "mqtt://broker:x?password={SECRET}"',
    ],
)
def test_a_refused_configuration_repeats_none(package_file: Path, tmp_path: Path, text: str) -> None:
    config = tmp_path / "line.toml"
    config.write_text(text)
    belt = "boards:warm_wood?parts=1"
    arguments = ["--model", str(package_file), "--source", belt, "--state", str(tmp_path / "state")]
    done = CliRunner().invoke(cli, ["inspect", "--config", str(config), *arguments])
    assert isinstance(done.exception, ConfigError), done.exception
    assert SECRET not in str(done.exception)


@pytest.mark.parametrize("scheme", ["http://", "rstp://", "rtsp:/", ""])
def test_a_mistyped_address_repeats_none(package_file: Path, scheme: str) -> None:
    source = f"{scheme}admin:{SECRET}@camera/live"
    done = CliRunner().invoke(cli, ["inspect", "--model", str(package_file), "--source", source])
    assert done.exception is not None
    assert "camera/live" in str(done.exception)
    assert SECRET not in str(done.exception)
