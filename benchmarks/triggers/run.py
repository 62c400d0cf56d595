"""Delay of triggers, and delay of verdicts behind their deadline; see README.md beside it."""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edge.config.inspection import ModbusTriggerConfig, MqttTriggerConfig
from edge.frame import Captured, Trigger, TriggerSource, make_frame
from edge.parts.deadline import BoundedCall
from edge.parts.modbus_trigger import ModbusTrigger
from edge.parts.mqtt_trigger import MqttTrigger
from edge.parts.sequence import NumberRange
from edge.status import PartCounts
from edge.verdict import Observation
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import Connected
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import MOSQUITTO, BrokerProcess
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.waiting import wait_for

TOPIC = "plant/part"
PAUSE_S = 0.013
"""Seconds between triggers; no divisor of a polling interval."""


def delays(source: TriggerSource, announce: Callable[[int], None], count: int) -> list[float]:
    """Seconds from the announcement of each part to its trigger's time stamp; the first part is not counted."""
    came: queue.SimpleQueue[Trigger] = queue.SimpleQueue()
    source.open(came.put)
    wait_for(lambda: source.problem() is None, "the trigger listens")
    time.sleep(0.2)
    taken = []
    for number in range(1, count + 2):
        time.sleep(PAUSE_S)
        before = time.monotonic()
        announce(number)
        taken.append(came.get(timeout=10).at_s - before)
    source.close()
    return taken[1:]


def over_mqtt(kind: str, count: int) -> list[float]:
    up = threading.Event()
    with tempfile.TemporaryDirectory() as folder, BrokerProcess(kind, Path(folder)) as broker:
        url = parse_broker_url(broker.url)
        sink = lambda event: up.set() if isinstance(event, Connected) else None  # noqa: E731 - a word
        with MqttClient(url, client_id="plant", filters=["nothing"], sink=sink) as plant:
            assert up.wait(20)
            source = MqttTrigger(url, topic=TOPIC, client_id="line", config=MqttTriggerConfig())
            return delays(source, lambda number: plant.publish(TOPIC, b'{"number": %d}' % number), count)


def over_modbus(poll_ms: float, count: int) -> list[float]:
    plc = Plc(free_port())
    try:
        config = ModbusTriggerConfig(host="127.0.0.1", port=plc.port, register=0, poll_ms=poll_ms)
        source = ModbusTrigger(config, counting=NumberRange(first=0, last=65535), max_gap=1000, window_s=1.0)
        return delays(source, lambda number: plc.set("register", 0, number), count)
    finally:
        plc.stop()


class Hung:
    """A model that does not answer."""

    product, model_id, threshold, review_band, provider = "p", "0" * 12, 1.0, 0.0, "none"

    def set_threshold(self, value: float | None) -> None:
        raise NotImplementedError

    def inspect(self, captured: Captured) -> Observation:
        del captured
        time.sleep(3600)
        raise AssertionError


def after_deadline(count: int) -> list[float]:
    """Seconds from each deadline to the verdict, while the model hangs."""
    call, taken = BoundedCall(camera="c", counts=PartCounts()), []
    image = np.zeros((256, 256, 3), np.uint8)
    for number in range(count):
        captured = Captured(sequence=number, frame=make_frame(part_id=str(number), source="s", image_bgr=image))
        due = time.monotonic() + 0.02
        call.inspect(Hung(), captured, due)
        taken.append(time.monotonic() - due)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="of each")
    count = parser.parse_args().count
    rows: dict[str, list[float]] = {"MQTT, embedded broker": over_mqtt("embedded", count)}
    if MOSQUITTO is not None:
        rows["MQTT, Mosquitto"] = over_mqtt("mosquitto", count)
    for poll_ms in (5.0, 20.0):
        rows[f"Modbus TCP, polled every {poll_ms:g} ms"] = over_modbus(poll_ms, count)
    rows["deadline to verdict, model hung"] = after_deadline(count)
    print("| milliseconds | median | 99% | largest |\n|---|---|---|---|")
    for name, seconds in rows.items():
        middle, high, largest = np.percentile(1000 * np.array(seconds), [50, 99, 100])
        print(f"| {name} | {middle:.2f} | {high:.2f} | {largest:.2f} |")


if __name__ == "__main__":
    main()
