"""The link on real brokers: delivery, flow control, reconnection, refusal; and the broker's URL."""

from __future__ import annotations

import contextlib
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeflame.errors import LinkError, UsageError
from edgeflame.masking import without_secrets
from edgeflame.mqtt import client as client_module
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import (
    MAX_IN_FLIGHT,
    MAX_UNPROCESSED,
    ClientEvent,
    Connected,
    ConnectionFailed,
    Disconnected,
    LastWill,
    ReceivedMessage,
)
from edgeflame.mqtt.url import BrokerUrl, TlsFiles, parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.ports import free_port
from tests.support.waiting import wait_for


class Inbox:
    """Collects a link's events; acknowledges messages at once unless told to hold them."""

    def __init__(self, *, hold: bool = False) -> None:
        self.events: list[ClientEvent] = []
        self.held: list[ReceivedMessage] = []
        self._hold = hold

    def __call__(self, event: ClientEvent) -> None:
        if isinstance(event, ReceivedMessage):
            if self._hold:
                self.held.append(event)
            else:
                event.acknowledge()
        self.events.append(event)

    @property
    def payloads(self) -> list[bytes]:
        return [event.payload for event in self.events if isinstance(event, ReceivedMessage)]

    def count(self, kind: type[ClientEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@contextlib.contextmanager
def connect(
    broker: BrokerProcess, name: str, inbox: Inbox, *filters: str, will: LastWill | None = None
) -> Iterator[MqttClient]:
    with MqttClient(
        parse_broker_url(broker.url), client_id=name, filters=filters or ["nothing"], sink=inbox, will=will
    ) as link:
        wait_for(lambda: inbox.count(Connected), f"{name} is connected")
        yield link


def test_messages_arrive_in_order(broker: BrokerProcess) -> None:
    inbox = Inbox()
    with connect(broker, "r", inbox, "t/+"), connect(broker, "w", Inbox()) as writer:
        for number in range(500):
            writer.publish(f"t/{number}", b"%d" % number)
        wait_for(lambda: len(inbox.payloads) == 500, "all messages are there")
    assert inbox.payloads == [b"%d" % number for number in range(500)]


def test_publishing_never_blocks_and_an_unacknowledged_reader_holds_the_broker_back(broker: BrokerProcess) -> None:
    num_messages = 900
    inbox = Inbox(hold=True)
    with connect(broker, "r", inbox, "t"), connect(broker, "w", Inbox()) as writer:
        for number in range(num_messages):
            writer.publish("t", b"%d" % number)
        wait_for(lambda: len(inbox.held) >= MAX_UNPROCESSED + MAX_IN_FLIGHT, "the first messages are there")
        time.sleep(0.2)
        # Mosquitto 2.0 sends up to a few hundred more than our Receive Maximum when acknowledgements and new messages
        # cross; it does not pour out everything either.
        assert len(inbox.held) < num_messages
        done = 0
        while done < num_messages:
            wait_for(lambda: len(inbox.held) > done, "the next message is there")  # noqa: B023
            inbox.held[done].acknowledge()
            done += 1
    assert inbox.payloads == [b"%d" % number for number in range(num_messages)]


def test_a_killed_broker_is_found_again_and_nothing_queued_is_lost(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("edgeflame").propagate = True
    reader, writer_box = Inbox(), Inbox()
    caplog.set_level(logging.INFO, logger="edgeflame")
    with connect(broker, "r", reader, "t"), connect(broker, "w", writer_box) as writer:
        broker.kill()
        wait_for(lambda: reader.count(Disconnected) and writer_box.count(Disconnected), "both noticed")
        broker.start()
        wait_for(lambda: reader.count(Connected) >= 2, "the reader is back")
        writer.publish("t", b"after")
        # At least once: a link that broke a second time sends it again.
        wait_for(lambda: set(reader.payloads) == {b"after"}, "the message is there")
    lost = [record for record in caplog.records if record.getMessage() == "broker_lost"]
    assert lost
    assert all(record.fields["address"] == broker.url for record in lost)  # type: ignore[attr-defined]


DOOMED = """
import sys, time
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import Connected, LastWill
will = LastWill(topic="will/x", payload=b"gone")
sink = lambda event: isinstance(event, Connected) and open(sys.argv[2], "w").close()
MqttClient(parse_broker_url(sys.argv[1]), client_id="x", filters=["n"], will=will, sink=sink).start()
time.sleep(100)
"""


def test_the_last_will_is_published_and_a_clean_end_has_none(broker: BrokerProcess, tmp_path: Path) -> None:
    inbox = Inbox()
    with connect(broker, "r", inbox, "will/#"):
        with connect(broker, "clean", Inbox(), will=LastWill(topic="will/clean", payload=b"gone")):
            pass
        marker = tmp_path / "up"
        with subprocess.Popen([sys.executable, "-c", DOOMED, broker.url, str(marker)]) as child:
            wait_for(marker.exists, "the doomed client is connected")
            child.kill()
        wait_for(lambda: b"gone" in inbox.payloads, "the last will is there")
    topics = [event.topic for event in inbox.events if isinstance(event, ReceivedMessage)]
    assert topics == ["will/x"]


def test_a_missing_broker_is_retried_and_said_with_its_address(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("edgeflame").propagate = True
    port = free_port()
    inbox = Inbox()
    caplog.set_level(logging.WARNING, logger="edgeflame")
    with MqttClient(BrokerUrl(host="127.0.0.1", port=port), client_id="x", filters=["t"], sink=inbox):
        wait_for(lambda: len(caplog.records) >= 3, "it was tried three times")
    fields = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert [entry["attempt"] for entry in fields[:3]] == [1, 2, 3]
    assert all(entry["address"] == f"mqtt://127.0.0.1:{port}" for entry in fields)
    assert not inbox.events


def test_a_missing_broker_is_given_up_when_a_time_is_set(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("edgeflame").propagate = True
    caplog.set_level(logging.WARNING, logger="edgeflame")
    events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    url = BrokerUrl(host="127.0.0.1", port=free_port())
    with MqttClient(url, client_id="x", filters=["t"], sink=events.put, connect_timeout_s=0.6):
        event = events.get(timeout=20)
    assert isinstance(event, ConnectionFailed)
    assert "within 0.6 s" in str(event.error)
    assert url.address in str(event.error)
    # A line whose broker is away for days asks again and again in this way: no line of the log for each try.
    assert [record.message for record in caplog.records] == ["broker_unreachable"]


def test_a_wrong_password_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = tmp_path / "passwords"
    lines = f"allow_anonymous false\nuser root\npassword_file {passwords}"
    tool = "mosquitto_passwd"
    try:
        subprocess.run([tool, "-b", "-c", str(passwords), "anna", "right"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("mosquitto_passwd is not installed")
    passwords.chmod(0o644)
    with BrokerProcess("mosquitto", tmp_path, mosquitto_lines=lines) as broker:
        address = broker.url.removeprefix("mqtt://")
        events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        with MqttClient(
            parse_broker_url(f"mqtt://anna:wrong@{address}"), client_id="x", filters=["t"], sink=events.put
        ):
            event = events.get(timeout=20)
        assert isinstance(event, ConnectionFailed)
        assert "refuses us" in str(event.error)
        assert "wrong" not in str(event.error)
        monkeypatch.setenv("EDGEFLAME_MQTT_PASSWORD", "right")
        with MqttClient(parse_broker_url(f"mqtt://anna@{address}"), client_id="x", filters=["t"], sink=events.put):
            assert isinstance(events.get(timeout=20), Connected)


def test_the_brokers_packet_limit_is_kept(tmp_path: Path) -> None:
    with BrokerProcess("mosquitto", tmp_path, mosquitto_lines="allow_anonymous true\nmax_packet_size 20000") as broker:
        inbox = Inbox()
        with connect(broker, "x", inbox, "t") as link:
            up = inbox.events[0]
            assert isinstance(up, Connected)
            assert up.chunk_bytes == 20000 - 1024
            link.publish("t", bytes(30000))  # would disconnect us; it is dropped and said
            link.publish("t", bytes(up.chunk_bytes))
            wait_for(lambda: inbox.payloads, "the second message is there")
        assert [len(payload) for payload in inbox.payloads] == [up.chunk_bytes]
        assert inbox.count(Disconnected) == 0


def test_a_full_outbox_is_an_error_and_not_a_silent_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_QUEUED", 3)
    with MqttClient(
        BrokerUrl(host="127.0.0.1", port=free_port()), client_id="x", filters=["t"], sink=lambda _e: None
    ) as link:
        for _ in range(3):
            link.publish("t", b"")
        with pytest.raises(LinkError, match="3 messages wait"):
            link.publish("t", b"")


def test_nothing_is_heard_before_the_start(broker: BrokerProcess) -> None:
    """A sink may use what its owner sets up after it has made the client."""
    inbox = Inbox()
    client = MqttClient(parse_broker_url(broker.url), client_id="x", filters=["t"], sink=inbox)
    client.publish("t", b"waits")
    time.sleep(0.5)
    assert not inbox.events
    with client:
        wait_for(lambda: inbox.payloads == [b"waits"], "what was published before the start arrives")


def test_a_client_that_was_never_started_is_closed(broker: BrokerProcess) -> None:
    inbox = Inbox()
    client = MqttClient(parse_broker_url(broker.url), client_id="x", filters=["t"], sink=inbox)
    client.publish("t", b"never sent")
    client.close()
    client.close()
    assert (inbox.events, client.bytes_out) == ([], 0)
    assert client._shared.wake_read.fileno() == client._shared.wake_write.fileno() == -1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_its_sink_is_told_to_its_user(broker: BrokerProcess) -> None:
    inbox = Inbox()

    def sink(event: ClientEvent) -> None:
        inbox(event)
        if isinstance(event, Connected):
            raise RuntimeError("a defect")

    with MqttClient(parse_broker_url(broker.url), client_id="x", filters=["t"], sink=sink):
        wait_for(lambda: inbox.count(ConnectionFailed), "the failure is told")
    assert "a defect" in str(inbox.events[-1].error)  # type: ignore[union-attr]


def test_its_thread_is_named_and_ends(broker: BrokerProcess) -> None:
    names = {thread.name for thread in threading.enumerate()}
    with connect(broker, "x", Inbox()):
        assert "edgeflame-link" in {thread.name for thread in threading.enumerate()} - names
    assert "edgeflame-link" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("text", "address", "user"),
    [
        ("mqtt://h", "mqtt://h:1883", None),
        ("h:99", "mqtt://h:99", None),
        ("mqtts://u@h", "mqtts://h:8883", "u"),
        ("mqtt://u:p%40q@h:5", "mqtt://h:5", "u"),
        ("mqtt://[::1]:5", "mqtt://[::1]:5", None),
    ],
)
def test_urls(text: str, address: str, user: str | None) -> None:
    url = parse_broker_url(text)
    assert (url.address, url.user) == (address, user)


def test_a_password_is_masked_everywhere() -> None:
    url = parse_broker_url("mqtt://u:p%40q@h:5")
    assert url.password == "p@q"
    assert "p@q" not in repr(url) + url.address
    with pytest.raises(UsageError) as caught:
        parse_broker_url("http://u:secret@h")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "mqtt://", "http://h", "mqtt://h:port", "mqtt://h:99999", "mqtt://h/path"])
def test_bad_urls(text: str) -> None:
    with pytest.raises(UsageError, match="expected mqtt://") as caught:
        parse_broker_url(text)
    # As a command shows it.
    assert without_secrets(str(caught.value)) == str(caught.value)


def test_certificates_need_mqtts_and_must_be_there(tmp_path: Path) -> None:
    files = TlsFiles(ca=tmp_path / "missing.pem")
    with pytest.raises(UsageError, match="mqtts://"):
        parse_broker_url("mqtt://h", tls=files)
    with pytest.raises(LinkError, match=r"missing\.pem"):
        parse_broker_url("mqtts://h", tls=files).ssl_context()
