"""What surrounds the daemon in the soak test: camera, broker with a subscriber, web service, a visitor of the page.

Camera, broker and service are disturbed as they are in a plant: the camera stalls or restarts, the broker restarts,
the service answers with errors.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

MOSQUITTO = "/usr/sbin/mosquitto"


class _Numbered(msgspec.Struct):
    number: int
    redelivered: bool


class Arrived:
    """Numbers of the results that a receiver got, and how often one came again."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.num_repeated = 0
        self.num_unmarked = 0
        """Repetitions that were not marked as such."""

    def add(self, body: bytes, *, is_brokers: bool = False) -> None:
        """Count a message; with ``is_brokers`` the broker itself marked it as possibly repeated."""
        message = msgspec.json.decode(body, type=_Numbered)
        if message.number in self.numbers:
            self.num_repeated += 1
            self.num_unmarked += not (message.redelivered or is_brokers)
        self.numbers.add(message.number)


class Process:
    """A program that can be ended, started again, and frozen."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        """End it by SIGTERM, as a service manager does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(20)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def broker(port: int, folder: Path) -> Process:
    """Start Mosquitto, which keeps its messages over a restart."""
    folder.mkdir(parents=True)
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {folder}/\n"
        "max_queued_messages 0\nuser root\n"
    )
    return Process([MOSQUITTO, "-c", str(config)])


def camera(port: int, rate: int, width: int, height: int) -> Process:
    """Start an RTSP camera at ``rtsp://127.0.0.1:PORT/live``."""
    script = Path(__file__).with_name("camera.py")
    return Process(["/usr/bin/python3", str(script), *map(str, (port, rate, width, height))])


class Subscriber:
    """An MQTT client that subscribes to every result; the broker keeps them while it is away."""

    def __init__(self, port: int, topic: str) -> None:
        self.arrived = Arrived()
        self._topic = topic
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="soak", protocol=mqtt.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self._client.on_message = lambda _client, _data, message: self.arrived.add(
            message.payload, is_brokers=message.dup
        )
        self._client.reconnect_delay_set(1, 2)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 24 * 3600
        self._client.connect_async("127.0.0.1", port, clean_start=False, properties=session)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Service:
    """A web service that takes results; with ``fails`` it answers 503."""

    def __init__(self) -> None:
        self.arrived = Arrived()
        self.fails = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if service.fails:
                    self.send_response(503)
                else:
                    service.arrived.add(body)
                    self.send_response(204)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class PageVisitor:
    """Requests the page's data, its pictures and the metrics every second, as a browser and Prometheus do."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"
        self._over = threading.Event()
        self.num_asked = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            # Before the page is up, and after it is down, requests fail.
            with contextlib.suppress(OSError, urllib.error.URLError, msgspec.DecodeError):
                view = msgspec.json.decode(self._get("/api/view"))
                for part in self._parts(view):
                    self._get(f"/parts/{part}/heat.jpg?side=320")
                self._get("/metrics")
                self.num_asked += 1

    def _parts(self, view: dict[str, dict[str, list[dict[str, int]]]]) -> Iterator[int]:
        for part in view["view"].get("rejects", [])[:2]:
            yield part["key"]

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._address + path, timeout=5) as answer:
            return bytes(answer.read())


class Disturbances:
    """Disturbs one thing after another until closed; ``log`` has the time and name of each disturbance.

    Args:
        every_s: seconds from the beginning of one disturbance to that of the next.
    """

    def __init__(self, cam: Process, brk: Process, service: Service, *, every_s: float) -> None:
        self._camera, self._broker, self._service = cam, brk, service
        self._every_s = every_s
        self._over = threading.Event()
        self.log: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the current disturbance and start no other."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        kinds = [self._broker_restarts, self._service_fails, self._camera_stalls, self._camera_restarts]
        number = 0
        while not self._over.wait(self._every_s):
            kind = kinds[number % len(kinds)]
            number += 1
            self.log.append((time.monotonic(), kind.__name__.strip("_")))
            kind()

    def _broker_restarts(self) -> None:
        self._broker.end()
        self._over.wait(5)
        self._broker.start()

    def _service_fails(self) -> None:
        self._service.fails = True
        self._over.wait(10)
        self._service.fails = False

    def _camera_stalls(self) -> None:
        # Longer than the daemon waits for a camera that sends nothing.
        self._camera.freeze()
        self._over.wait(14)
        self._camera.thaw()

    def _camera_restarts(self) -> None:
        self._camera.end()
        self._over.wait(3)
        self._camera.start()
