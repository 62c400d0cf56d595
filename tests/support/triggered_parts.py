"""A plant that announces parts over MQTT, and a camera that shows them when a test says so."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

from edge.frame import Frame, make_frame
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import Connected
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.small_package import good_image


@contextlib.contextmanager
def sender(broker: BrokerProcess) -> Iterator[MqttClient]:
    """The plant's side of the broker."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with MqttClient(parse_broker_url(broker.url), client_id="plant", filters=["nothing"], sink=events.put) as link:
        while not isinstance(events.get(timeout=20), Connected):
            pass
        yield link


class Camera:
    """A live camera that a test gives its images."""

    name, is_live, is_endless, num_frames = "camera:0", True, True, None

    def __init__(self) -> None:
        self.given: queue.SimpleQueue[Frame | Exception] = queue.SimpleQueue()
        self.num_taken = 0

    def show(self, part_id: str = "frame") -> None:
        self.given.put(make_frame(part_id=part_id, source=self.name, image_bgr=good_image(1)))

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        while not stop.is_set():
            with contextlib.suppress(queue.Empty):
                frame = self.given.get(timeout=0.05)
                if isinstance(frame, Exception):
                    raise frame
                yield frame
                self.num_taken += 1
