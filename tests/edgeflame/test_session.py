"""Conversations with a broker: over a client that plays a script, and over real brokers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgeflame.errors import LinkError
from edgeflame.mqtt import session as session_module
from edgeflame.mqtt.connection import (
    ClientEvent,
    Connected,
    ConnectionFailed,
    Disconnected,
    PublishResult,
    ReceivedMessage,
)
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.url import BrokerUrl, parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.waiting import wait_for

URL = BrokerUrl(host="broker", port=1883)
UP = Connected(chunk_bytes=4096)


def message(topic: str, payload: bytes = b"") -> ReceivedMessage:
    return ReceivedMessage(topic=topic, payload=payload, acknowledge=lambda: None)


class ScriptedClient:
    """In the place of the client: says what it is told, and answers what is published by ``answer``."""

    answer: Callable[[str, bytes, int | None], list[ClientEvent]]
    first: list[ClientEvent]

    def __init__(self, _url: BrokerUrl, *, sink: Callable[[ClientEvent], None], **_: Any) -> None:
        self.say = sink
        self.published: list[bytes] = []
        self.flushed_s: float | None = None

    def start(self) -> None:
        for event in self.first:
            self.say(event)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, token: int | None = None) -> None:
        self.published.append(payload)
        for event in type(self).answer(topic, payload, token):
            self.say(event)

    def close(self, *, flush_s: float) -> None:
        self.flushed_s = flush_s


Start = Callable[..., tuple[Session, ScriptedClient]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(session_module, "MqttClient", ScriptedClient)
    ScriptedClient.answer = staticmethod(lambda *_: [])  # type: ignore[assignment]

    def begin(*first: ClientEvent, **options: Any) -> tuple[Session, ScriptedClient]:
        ScriptedClient.first = list(first)
        session = Session(URL, name="test", filters=["t"], connect_timeout_s=1.0, **options)
        client = session.connect()._client
        assert isinstance(client, ScriptedClient)
        return session, client

    return begin


def answering(answer: Callable[[str, bytes, int | None], list[ClientEvent]]) -> None:
    ScriptedClient.answer = staticmethod(answer)  # type: ignore[assignment]


def test_it_waits_for_the_broker_and_knows_its_limit(start: Start) -> None:
    session, client = start(Disconnected(reason="a break"), UP)
    assert session.is_up
    assert session.chunk_bytes == 4096
    client.say(Disconnected(reason="another"))
    session.poll()
    assert not session.is_up
    client.say(Connected(chunk_bytes=1024))
    session.poll()
    assert (session.num_connects, session.chunk_bytes) == (2, 1024)


def test_a_refusal_is_raised_wherever_it_comes(start: Start) -> None:
    refusal = ConnectionFailed(error=LinkError("it refuses us"))
    with pytest.raises(LinkError, match="it refuses us"):
        start(refusal)
    session, client = start(UP)
    client.say(refusal)
    with pytest.raises(LinkError, match="it refuses us"):
        session.receive(1.0)


def test_a_break_is_raised_by_a_session_that_does_not_connect_again(start: Start) -> None:
    session, client = start(UP, reconnect=False)
    client.say(Disconnected(reason="a break"))
    with pytest.raises(LinkError, match="was lost: a break"):
        session.poll()


def test_messages_that_come_while_it_waits_for_something_else_are_not_lost(start: Start) -> None:
    session, _ = start(UP)
    answering(lambda _topic, payload, token: [message("t", b"before " + payload), PublishResult(token=token or 0)])
    session.publish("t", b"x", wait_s=1.0)
    received = session.receive(0.0)
    assert received is not None
    assert received.payload == b"before x"
    assert session.receive(0.0) is None


@pytest.mark.parametrize(
    ("results", "num_arrived"),
    [([0, 1, 2], 3), ([2, 1, 0], 3), ([0, 2], 1), ([1, 2], None), ([], None)],
    ids=["in order", "in another order", "one is missing", "the first is missing", "none"],
)
def test_what_arrived_is_counted_in_order(start: Start, results: list[int], num_arrived: int | None) -> None:
    session, _ = start(UP)
    answering(lambda _topic, _payload, token: [PublishResult(token=token)] if token in results else [])  # type: ignore[arg-type]
    if num_arrived is None:
        with pytest.raises(LinkError, match=r"no answer from the broker mqtt://broker.* within 0\.01 s"):
            session.publish_all("t", [b"a", b"b", b"c"], timeout_s=0.01)
    else:
        assert session.publish_all("t", [b"a", b"b", b"c"], timeout_s=0.01) == num_arrived


def test_what_the_broker_refuses_is_an_error(start: Start) -> None:
    session, _ = start(UP)
    answering(lambda _topic, _payload, token: [PublishResult(token=token or 0, error="Not authorized")])
    with pytest.raises(LinkError, match="refuses what is published on t: Not authorized"):
        session.publish("t", b"", wait_s=1.0)


def test_a_request_is_repeated_until_it_is_answered(start: Start) -> None:
    session, client = start(UP)
    answering(lambda *_: [message("t", b"noise")] if len(client.published) < 3 else [message("t", b"answer")])
    answer = session.request(
        "q", b"?", lambda m: m.payload if m.payload == b"answer" else None, timeout_s=5, repeat_s=0.01
    )
    assert (answer, len(client.published)) == (b"answer", 3)
    answering(lambda *_: [])
    assert session.request("q", b"?", lambda m: m.payload, timeout_s=0.01) is None


def test_an_error_in_the_block_is_not_held_up_by_what_is_queued(start: Start) -> None:
    session, client = start(UP)
    session.__exit__(None, None, None)
    assert client.flushed_s == 3.0
    session.__exit__(ValueError, ValueError(), None)
    assert client.flushed_s == 0.0


def test_a_conversation_with_a_broker(broker: BrokerProcess) -> None:
    url = parse_broker_url(broker.url)
    with Session(url, name="first", filters=["none"], connect_timeout_s=10) as first:
        first.publish("kept", b"state", retain=True, wait_s=10)
    with Session(url, name="second", filters=["kept", "question"], connect_timeout_s=10) as second:
        assert [(m.topic, m.payload, m.retained) for m in second.retained()] == [("kept", b"state", True)]

        def reply() -> None:
            asked = second.receive(10)
            assert asked is not None
            second.publish("answer", asked.payload[::-1])

        thread = threading.Thread(target=reply)
        thread.start()
        with Session(url, name="third", filters=["answer"], connect_timeout_s=10) as third:
            assert third.request("question", b"abc", lambda m: m.payload, timeout_s=10) == b"cba"
            thread.join()
            broker.kill()
            wait_for(lambda: third.poll() or not third.is_up, "the break is noticed")
            broker.start()
            wait_for(lambda: third.poll() or third.num_connects == 2, "it is connected again")


def test_a_message_can_be_taken_on_the_clients_thread(broker: BrokerProcess) -> None:
    url = parse_broker_url(broker.url)
    taken: list[tuple[str, bytes]] = []
    with Session(
        url,
        name="test",
        filters=["t"],
        connect_timeout_s=10,
        on_message=lambda m: taken.append((threading.current_thread().name, m.payload)),
    ) as session:
        session.publish("t", b"x", wait_s=10)
        wait_for(lambda: taken == [("edgeflame-link", b"x")], "it is taken")
        assert session.receive(0.0) is None


def test_nobody_there_is_an_error_in_time() -> None:
    began = time.monotonic()
    url = BrokerUrl(host="127.0.0.1", port=1)
    with (
        pytest.raises(LinkError, match="no connection to the broker"),
        Session(url, name="test", filters=["t"], connect_timeout_s=0.3),
    ):
        pass
    assert time.monotonic() - began < 5
