"""The embedded broker: its port, its limits, its life."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys

import pytest

from edgeflame.errors import LinkError, MissingDependencyError, UsageError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ReceivedMessage
from edgeflame.mqtt.embedded_broker import EmbeddedBroker
from edgeflame.mqtt.messages import MAX_MESSAGE_BYTES
from edgeflame.mqtt.url import parse_broker_url
from tests.support.ports import free_port
from tests.support.waiting import wait_for


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_takes_a_free_port_and_gives_it_back() -> None:
    with EmbeddedBroker(port=0) as broker:
        assert broker.is_running
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert listens(broker.port)
    assert not broker.is_running
    assert not listens(broker.port)


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LinkError, match=f"port {port} on 127.0.0.1 is taken.*--port"):
            EmbeddedBroker(port=port)


def test_an_address_that_is_not_ours_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match=r"203\.0\.113\.1"):
        EmbeddedBroker(port=0, bind="203.0.113.1")
    with pytest.raises(UsageError, match="port 70000"):
        EmbeddedBroker(port=70000)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iotcore", None)
    with pytest.raises(MissingDependencyError, match=r"edgeflame\[broker\]"):
        EmbeddedBroker(port=0)


def test_its_process_ends_with_its_parent_even_by_sigkill() -> None:
    port = free_port()
    parent = subprocess.Popen([sys.executable, "-m", "edgeflame", "broker", "--port", str(port)])
    wait_for(lambda: listens(port), "the broker listens")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not listens(port), "the broker's process is gone")


def test_carries_large_retained_messages() -> None:
    payload = os.urandom(MAX_MESSAGE_BYTES)
    inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    with EmbeddedBroker(port=0) as broker:
        url = parse_broker_url(broker.url)
        with MqttClient(url, client_id="writer", filters=["none"], sink=lambda _event: None) as writer:
            writer.publish("large", payload, retain=True)
        with MqttClient(url, client_id="reader", filters=["large"], sink=inbox.put):
            assert isinstance(inbox.get(timeout=20), Connected)
            received = inbox.get(timeout=20)
            assert isinstance(received, ReceivedMessage)
            assert received.payload == payload
            received.acknowledge()
