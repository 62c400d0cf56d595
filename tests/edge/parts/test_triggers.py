"""Triggers over MQTT and Modbus, from real brokers and pymodbus's own server, and what they make of a camera."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.config.inspection import ModbusTriggerConfig, MqttTriggerConfig
from edge.frame import AcceptTrigger, Frame, Trigger, trigger_now
from edge.parts.matching import MatchWindow
from edge.parts.modbus_trigger import ModbusTrigger
from edge.parts.mqtt_trigger import MqttTrigger, at_time
from edge.parts.sequence import NumberRange
from edge.parts.triggers import TriggeredSource
from edge.result import Reason
from edge.status import PartCounts
from edgeflame.errors import DataError
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BROKERS, BrokerProcess
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.triggered_parts import Camera, sender
from tests.support.waiting import wait_for

TOPIC = "edgeflame/v1/f/line/l1/trigger"


@contextlib.contextmanager
def listening(broker: BrokerProcess, **keys: Any) -> Iterator[tuple[MqttTrigger, list[Trigger]]]:
    triggers: list[Trigger] = []
    source = MqttTrigger(parse_broker_url(broker.url), topic=TOPIC, client_id="line", config=MqttTriggerConfig(**keys))
    source.open(triggers.append)
    try:
        wait_for(lambda: source.problem() is None, "the trigger listens")
        yield source, triggers
    finally:
        source.close()


@pytest.mark.parametrize("kind", BROKERS)
def test_each_message_is_a_part_with_the_time_of_its_arrival(kind: str, tmp_path: Path) -> None:
    with BrokerProcess(kind, tmp_path) as broker, sender(broker) as plant:
        # Said before we listened, and kept by the broker: of a part that is long gone.
        plant.publish(TOPIC, b"retained", retain=True)
        with listening(broker) as (_, triggers):
            before = trigger_now(None)
            plant.publish(TOPIC, b'{"part_id": "A-1", "number": 1}')
            plant.publish(TOPIC, b"A-2")
            plant.publish(TOPIC, b'{"no": "part"}')
            wait_for(lambda: len(triggers) == 3, "three parts are announced")
            after = trigger_now(None)
    assert [(part.part_id, part.number, part.fault) for part in triggers] == [
        ("A-1", 1, None), ("A-2", None, None), (None, None, Reason.TRIGGER_UNCLEAR),
    ]  # fmt: skip
    assert "neither part_id nor number" in (triggers[2].detail or "")
    times = [part.at_s for part in triggers]
    assert before.at_s <= times[0] <= times[1] <= times[2] <= after.at_s


def test_a_senders_clock_is_believed_only_if_it_shall_be(tmp_path: Path) -> None:
    with BrokerProcess("embedded", tmp_path) as broker, sender(broker) as plant:
        said = trigger_now(None)
        message = b'{"part_id": "A-1", "time": "%s"}' % said.at_utc.isoformat().encode()
        with listening(broker, use_time=True) as (_, believed):
            plant.publish(TOPIC, message)
            wait_for(lambda: believed, "the part is announced")
        with listening(broker) as (_, arrived):
            plant.publish(TOPIC, message)
            wait_for(lambda: arrived, "the part is announced")
    assert believed[0].at_s == pytest.approx(said.at_s, abs=0.001)
    assert believed[0].at_utc == said.at_utc
    assert arrived[0].at_s > believed[0].at_s


@pytest.mark.parametrize(("ahead_s", "says"), [(3600, "3.6e+03 s ahead of our clock"), (-60, "60 s behind our clock")])
def test_a_time_far_from_our_clock_is_no_time(ahead_s: float, says: str) -> None:
    """Believed, a part of tomorrow would wait until then, and keep others from being taken."""
    arrived = trigger_now("A-1")
    timed = at_time(arrived, arrived.at_utc + dt.timedelta(seconds=ahead_s))
    assert (timed.at_s, timed.fault) == (arrived.at_s, Reason.TRIGGER_UNCLEAR)
    assert says in (timed.detail or "")


@pytest.mark.parametrize("kind", BROKERS)
def test_a_broker_that_is_away_is_said_and_found_again(kind: str, tmp_path: Path) -> None:
    with BrokerProcess(kind, tmp_path) as broker, listening(broker) as (source, triggers):
        broker.kill()
        wait_for(lambda: source.problem() is not None, "the loss is noticed")
        assert "the connection to the broker was lost" in (source.problem() or "")
        broker.start()
        wait_for(lambda: source.problem() is None, "the trigger listens again")
        with sender(broker) as plant:
            plant.publish(TOPIC, b"after")
            wait_for(lambda: triggers, "the part is announced")
    assert [part.part_id for part in triggers] == ["after"]
    assert source.problem() == "the camera is not open"


def test_a_broker_that_refuses_us_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.parts.mqtt_trigger.RETRY_S", 0.05)
    with BrokerProcess("mosquitto", tmp_path, mosquitto_lines="allow_anonymous false") as broker:
        source = MqttTrigger(
            parse_broker_url(broker.url), topic=TOPIC, client_id="line", config=MqttTriggerConfig(topic=TOPIC)
        )
        source.open(lambda _trigger: None)
        wait_for(lambda: "refuses us" in (source.problem() or ""), "the refusal is told")
        broker.kill()
        config = tmp_path / "open.conf"
        config.write_text(f"listener {broker.port} 127.0.0.1\nallow_anonymous true\n")
        with BrokerProcess("mosquitto", tmp_path, config=config, port=broker.port):
            wait_for(lambda: source.problem() is None, "it is asked again")
            source.close()


# Modbus.


@pytest.fixture
def plc() -> Iterator[Plc]:
    opened = Plc(free_port())
    yield opened
    opened.stop()


@contextlib.contextmanager
def polling(plc: Plc, **keys: Any) -> Iterator[tuple[ModbusTrigger, list[Trigger]]]:
    config = ModbusTriggerConfig(host="127.0.0.1", port=plc.port, poll_ms=5, timeout_s=0.5, **keys)
    counting = NumberRange(first=0, last=(1 << 16 * config.words) - 1) if config.is_counter else None
    triggers: list[Trigger] = []
    source = ModbusTrigger(config, counting=counting, max_gap=1000, window_s=0.5)
    source.open(triggers.append)
    try:
        wait_for(lambda: source.problem() is None, "the PLC answers")
        yield source, triggers
    finally:
        source.close()


def polled(plc: Plc) -> None:
    """Until what the PLC shows now has surely been seen."""
    seen = plc.num_reads
    wait_for(lambda: plc.num_reads >= seen + 2, "two polls")


@pytest.mark.parametrize("kind", ["coil", "discrete_input"])
def test_a_rising_edge_is_one_part(plc: Plc, kind: Any) -> None:
    plc.set(kind, 7, 1)
    with polling(plc, **{kind: 7}) as (_, triggers):
        for level in (0, 1, 1, 0, 1):
            polled(plc)
            plc.set(kind, 7, level)
        wait_for(lambda: len(triggers) == 2, "two parts are announced")
        polled(plc)
    assert [(part.part_id, part.number, part.fault) for part in triggers] == [(None, None, None)] * 2


@pytest.mark.parametrize("kind", ["register", "input_register"])
def test_a_change_of_a_counter_is_one_part_and_has_its_number(plc: Plc, kind: Any) -> None:
    plc.set(kind, 7, 0, 65534)
    with polling(plc, **{kind: 7}, words=2) as (_, triggers):
        for number in (65535, 65536, 65539):
            polled(plc)
            plc.set(kind, 7, number >> 16, number & 0xFFFF)
        wait_for(lambda: len(triggers) == 3, "three parts are announced")
    assert [(part.number, part.fault) for part in triggers] == [(65535, None), (65536, None), (65539, None)]


def test_a_plc_that_was_away_announces_its_last_part_with_an_unknown_time(plc: Plc) -> None:
    with polling(plc, register=7) as (source, triggers):
        plc.set("register", 7, 1)
        wait_for(lambda: triggers, "the part is announced")
        plc.stop()
        wait_for(lambda: source.problem() is not None, "the loss is noticed")
        plc.start()
        plc.set("register", 7, 4)
        wait_for(lambda: len(triggers) == 2, "the last part is announced")
        assert source.problem() is None
    assert (triggers[1].number, triggers[1].fault) == (4, Reason.TRIGGER_UNCLEAR)
    assert "when, is not known" in (triggers[1].detail or "")


def test_a_register_that_is_not_there_is_said(plc: Plc) -> None:
    source = ModbusTrigger(
        ModbusTriggerConfig(host="127.0.0.1", port=plc.port, register=5000),
        counting=NumberRange(first=0, last=65535), max_gap=1000, window_s=0.5,
    )  # fmt: skip
    source.open(lambda _trigger: None)
    wait_for(lambda: "refuses" in (source.problem() or ""), "the refusal is told")
    source.close()


# A camera with triggers.


class Button:
    """A trigger that a test presses."""

    name = "button"
    accept: AcceptTrigger

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_closed = threading.Event()
        self.said: str | None = None

    def open(self, accept: AcceptTrigger) -> None:
        self.accept = accept
        self.is_open.set()

    def press(self, part_id: str | None = None, number: int | None = None) -> None:
        assert self.is_open.wait(10)
        self.accept(trigger_now(part_id, number))

    def problem(self) -> str | None:
        return self.said

    def close(self) -> None:
        self.is_closed.set()


@dataclasses.dataclass
class Rig:
    camera: Camera
    button: Button
    source: TriggeredSource
    frames: queue.SimpleQueue[Frame | BaseException]
    counts: PartCounts
    dropped: collections.Counter[str]

    def next(self) -> Frame:
        frame = self.frames.get(timeout=20)
        assert isinstance(frame, Frame)
        return frame


@contextlib.contextmanager
def rigged(window: MatchWindow) -> Iterator[Rig]:
    camera, button = Camera(), Button()
    counts, dropped = PartCounts(), collections.Counter[str]()
    source = TriggeredSource(camera, button, window, counts=counts, dropped=dropped)
    rig = Rig(camera, button, source, queue.SimpleQueue(), counts, dropped)
    stop = threading.Event()

    def read() -> None:
        try:
            for frame in rig.source.frames(stop):
                rig.frames.put(frame)
        except DataError as exc:
            rig.frames.put(exc)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield rig
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert button.is_closed.is_set()
    assert not [alive for alive in threading.enumerate() if alive.name == "edgeflame-triggered"]


def test_one_frame_a_trigger_with_its_name_and_the_rest_are_counted() -> None:
    with rigged(MatchWindow(delay_s=0.0, window_s=10.0, lookback_s=0.0)) as rig:
        rig.camera.show()
        wait_for(lambda: rig.camera.num_taken == 1, "the frame before is taken")
        rig.button.press("A-1", 1)
        rig.button.press(None, 2)
        rig.button.press()
        for _ in range(4):
            rig.camera.show()
        frames = [rig.next() for _ in range(3)]
        wait_for(lambda: rig.dropped["untriggered"] >= 1, "frames are dropped")
    assert [frame.part_id for frame in frames] == ["A-1", "part-2", "trigger-000001"]
    assert all(frame.image_bgr is not None for frame in frames)
    triggers = [frame.trigger for frame in frames]
    assert [trigger and trigger.number for trigger in triggers] == [1, 2, None]
    for frame in frames:
        assert frame.trigger is not None
        assert frame.captured_monotonic_s >= frame.trigger.at_s
    assert rig.counts.triggers == 3


def test_a_trigger_while_the_camera_is_away_gets_a_frame_that_says_so_until_it_is_back() -> None:
    with rigged(MatchWindow(delay_s=0.0, window_s=2.0)) as rig:
        rig.camera.show()
        rig.camera.given.put(DataError("unplugged"))
        rig.camera.given.put(DataError("still unplugged"))
        wait_for(rig.camera.given.empty, "it was tried again")
        rig.button.press("A-1")
        frame = rig.next()
        assert (frame.part_id, frame.image_bgr, frame.fault) == ("A-1", None, Reason.NO_IMAGE)
        assert "the camera is away: parts may pass unseen: still unplugged" in (frame.error or "")
        rig.camera.show()
        wait_for(lambda: rig.camera.num_taken == 2, "the camera is back")
        rig.button.press("A-2")
        rig.camera.show()
        assert rig.next().image_bgr is not None


def test_parts_that_are_announced_before_a_camera_can_be_opened_are_not_forgotten() -> None:
    with rigged(MatchWindow(delay_s=0.0, window_s=0.05)) as rig:
        rig.camera.given.put(DataError("no such camera"))
        wait_for(rig.source.camera_problem, "it is told before a part is announced")
        rig.button.press("A-1")
        frame = rig.next()
        assert (frame.part_id, frame.fault) == ("A-1", Reason.NO_IMAGE)
        assert "the camera is away: parts may pass unseen: no such camera" in (frame.error or "")
        rig.camera.show()
        wait_for(lambda: rig.source.camera_problem() is None, "the camera is back")


def test_a_trigger_that_cannot_come_is_a_problem() -> None:
    with rigged(MatchWindow(delay_s=0.0, window_s=1.0)) as rig:
        assert rig.source.problem() is None
        rig.button.said = "the broker is away"
        assert rig.source.problem() == "no trigger can come: the broker is away"
