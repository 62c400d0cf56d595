"""Brokers that can do less than is needed, and ones behind a web server's port: Mosquitto, as it is there."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeflame.errors import LinkError, UsageError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, LastWill, ReceivedMessage
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.websocket_proxy import websocket_proxy

WILL = LastWill(topic="gone", payload=b"gone")


@pytest.mark.parametrize(
    ("lines", "what"),
    [("retain_available false", "keeps no retained messages"), ("max_qos 0", r"delivers nothing surely \(no QoS 1\)")],
)
@pytest.mark.parametrize("will", [WILL, None])
def test_a_broker_that_lacks_what_is_needed_is_given_up(
    lines: str, what: str, will: LastWill | None, tmp_path: Path
) -> None:
    events: queue.Queue[ClientEvent] = queue.Queue()
    with (
        BrokerProcess("mosquitto", tmp_path, mosquitto_lines=f"allow_anonymous true\n{lines}") as broker,
        MqttClient(parse_broker_url(broker.url), client_id="a", filters=["t"], sink=events.put, will=will) as client,
    ):
        client.publish("state", b"x", retain=True)
        while not isinstance(event := events.get(timeout=30), ConnectionFailed):
            pass
    with pytest.raises(LinkError, match=what):
        raise event.error


def test_what_needs_no_retained_message_works_without(tmp_path: Path) -> None:
    with (
        BrokerProcess("mosquitto", tmp_path, mosquitto_lines="allow_anonymous true\nretain_available false") as broker,
        Session(parse_broker_url(broker.url), name="test", filters=["t"], connect_timeout_s=10.0) as session,
    ):
        assert session.lacks == "it keeps no retained messages"
        answer = session.request("t", b"x", lambda message: message.payload, timeout_s=20.0)
        assert answer == b"x"


@pytest.fixture
def websocket(tmp_path: Path) -> Iterator[BrokerUrl]:
    with BrokerProcess("mosquitto", tmp_path) as broker, websocket_proxy(broker.port) as port:
        yield parse_broker_url(f"ws://127.0.0.1:{port}")


def test_messages_of_every_size_go_through_a_websocket(websocket: BrokerUrl) -> None:
    assert websocket.address.startswith("ws://127.0.0.1:")
    assert websocket.address.endswith("/mqtt")
    events: queue.Queue[ClientEvent] = queue.Queue()
    sizes = [0, 1, 125, 126, 65_535, 65_536, 250_000] * 3
    with MqttClient(websocket, client_id="a", filters=["t"], sink=events.put, will=WILL) as client:
        assert isinstance(events.get(timeout=30), Connected)
        for size in sizes:
            client.publish("t", bytes(size))
        found = []
        while len(found) < len(sizes):
            event = events.get(timeout=30)
            if isinstance(event, ReceivedMessage):
                found.append(len(event.payload))
                event.acknowledge()
    assert found == sizes


# paho leaves the socket to the garbage collector then.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_web_server_without_a_broker_is_said(tmp_path: Path) -> None:
    with BrokerProcess("mosquitto", tmp_path) as broker, websocket_proxy(broker.port) as port:
        url = parse_broker_url(f"ws://127.0.0.1:{port}/elsewhere")
        with pytest.raises(LinkError, match=r"no connection .*/elsewhere within .*: no WebSocket of a broker there"):
            Session(url, name="test", filters=["t"], connect_timeout_s=0.5).connect()


def test_addresses_of_websockets() -> None:
    url = parse_broker_url("wss://me:secret@plant.example/broker/mqtt")
    assert (url.port, url.websocket_path, url.tls, url.user) == (443, "/broker/mqtt", TlsFiles(), "me")
    assert url.address == "wss://plant.example:443/broker/mqtt"
    assert parse_broker_url("ws://plant.example").address == "ws://plant.example:80/mqtt"
    for wrong in ("ws://", "ws://h/p?x=1", "http://h/mqtt", "mqtt://h/mqtt"):
        with pytest.raises(UsageError, match="expected mqtt://"):
            parse_broker_url(wrong)
