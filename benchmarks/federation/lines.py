"""Many lines on one broker: what each adds to it, and how long `edgeflame model status` takes over them.

    PYTHONPATH=. python benchmarks/federation/lines.py [--lines 100 1000 3000] [--rate 1000] [--seconds 20]

A real Mosquitto. Each line is three connections, as a line with [mqtt] and [models] has: one with its results and its
retained state, one that says that it is there, one for packages; their messages are those that a line sends. Their ends
are driven by one thread. Processor time is Mosquitto's, memory its resident set. `--rate` results a second come from
all lines together and reach one subscriber, an MES say; each is acknowledged. Prints a table.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt

from edge.delivery.outbox import Delivery
from edge.result import Result
from edge.status import LineState
from edgeflame.cpus import usable_cpus
from edgeflame.mqtt.messages import encode_message
from edgeflame.mqtt.release_messages import LineModels, ProductModels, RunningModel
from edgeflame.mqtt.topics import Topics
from tests.support.brokers import BrokerProcess

TOPICS = Topics(fleet="plants")
BOOT = "0" * 32
RESULT = msgspec.json.encode(
    Result(
        sequence=1_000_000,
        part_id="part-1000000",
        source="rtsp://10.20.30.40:554/stream1",
        captured=dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone.utc),
        verdict="pass",
        reasons=(),
        detail=None,
        score=16.912345,
        threshold=20.381415,
        latency_ms=12.34,
        label=None,
        model="0" * 12,
        camera="camera",
    )
)


MOSQUITTO = "allow_anonymous true\nmax_inflight_messages 100\nmax_queued_messages 20000\nmax_queued_bytes 536870912"
"""The limits that `edgeflame fleet init` writes; by default Mosquitto drops what one client is to get beyond 1000."""


class Line:
    """A line's connections.

    Args:
        name: the line's.
        port: the broker's, on this machine.
        selector: gets the connections' sockets.
    """

    def __init__(self, name: str, port: int, selector: selectors.BaseSelector) -> None:
        self._name = name
        state, availability = TOPICS.line_state(name), TOPICS.line_availability(name)
        self._results = connect(f"{name}-results", port, selector, TOPICS.line_command(name), will=state)
        self._availability = connect(f"{name}-availability", port, selector, availability, will=availability)
        self._models = connect(f"{name}-models", port, selector, TOPICS.all_releases(), will=None)
        self._number = 0

    def announce(self) -> int:
        """Publish what a line that starts publishes, retained; returns its bytes."""
        state = LineState(online=True, boot=BOOT, product="board", model="0" * 12, threshold=20.0, source="camera:0")
        runs = ProductModels(product="board", present=RunningModel(sha256="0" * 64, origin="release", name="board"))
        sent = {
            self._results: (TOPICS.line_state(self._name), msgspec.json.encode(state)),
            self._availability: (TOPICS.line_availability(self._name), b"online"),
            self._models: (TOPICS.line_models(self._name), encode_message(LineModels(boot=BOOT, products=(runs,)))),
        }
        for client, (topic, payload) in sent.items():
            client.publish(topic, payload, qos=1, retain=True)
        return sum(len(topic) + len(payload) for topic, payload in sent.values())

    def send_result(self) -> int:
        """Publish one result; returns its bytes."""
        self._number += 1
        payload = Delivery(outbox=BOOT, number=self._number, redelivered=False, result=msgspec.Raw(RESULT)).encode()
        self._results.publish(TOPICS.line_result(self._name), payload, qos=1)
        return len(payload)


def connect(
    client_id: str, port: int, selector: selectors.BaseSelector, topic: str, *, will: str | None
) -> mqtt.Client:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
    if will is not None:
        client.will_set(will, b"offline", qos=1, retain=True)
    client.on_connect = lambda *_: client.subscribe(topic, qos=1)
    client.connect("127.0.0.1", port, keepalive=60)
    selector.register(client.socket(), selectors.EVENT_READ, client)
    return client


def drive(selector: selectors.BaseSelector, seconds: float) -> None:
    """Have all connections read what has come, and write what waits."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            client: mqtt.Client = key.data
            client.loop_read()
            if client.want_write():
                client.loop_write()


def measure(num_lines: int, rate: float, seconds: float, folder: Path) -> Iterator[Any]:
    with (
        BrokerProcess("mosquitto", folder, mosquitto_lines=MOSQUITTO) as broker,
        selectors.DefaultSelector() as selector,
    ):
        # First: its thread waits by select(), which knows descriptors up to 1024 only.
        received = Subscriber(broker.port)
        empty_kb = resident_kb(broker.pid)
        lines = []
        for number in range(num_lines):
            lines.append(Line(f"line-{number:05}", broker.port, selector))
            drive(selector, 0.002)
        drive(selector, 1.0)
        announced = [line.announce() for line in lines]
        drive(selector, 2.0)
        connected_kb = resident_kb(broker.pid)
        before_s, began = cpu_s(broker.pid), time.monotonic()
        sent = result_bytes = 0
        while (elapsed := time.monotonic() - began) < seconds:
            while sent < elapsed * rate:
                result_bytes = lines[sent % num_lines].send_result()
                sent += 1
            drive(selector, 0.002)
        while received.count < sent:
            drive(selector, 0.05)
        took_s = time.monotonic() - began
        used_s = cpu_s(broker.pid) - before_s
        received.close()
        # Nobody else keeps these connections alive meanwhile; Mosquitto waits for one and a half times 60 s.
        status_s, status_mb, known = time_status(broker.url)
        assert known == num_lines
        for key in list(selector.get_map().values()):
            key.data.disconnect()
        yield num_lines
        yield f"{(connected_kb - empty_kb) / num_lines:.1f}"
        yield f"{sum(announced) / num_lines / 1000:.2f}"
        yield f"{sent / took_s:.0f}"
        yield f"{result_bytes / 1000:.2f}"
        yield f"{1e6 * used_s / sent:.0f}"
        yield f"{status_s:.1f}"
        yield f"{status_mb:.0f}"


class Subscriber:
    """Counts the results of all lines."""

    def __init__(self, port: int) -> None:
        self.count = 0
        ready = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="mes", protocol=mqtt.MQTTv5)
        self._client.on_connect = lambda *_: self._client.subscribe(f"{TOPICS.base}/line/+/result", qos=1)
        self._client.on_subscribe = lambda *_: ready.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert ready.wait(20)

    def _on_message(self, *_: object) -> None:
        self.count += 1

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def time_status(url: str) -> tuple[float, float, int]:
    """Seconds and largest resident MB of `edgeflame model status`, and how many lines it knows."""
    command = [sys.executable, "-m", "edgeflame", "model", "status", "--broker", url, "--fleet", TOPICS.fleet, "--json"]
    start = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took_s = time.monotonic() - start
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return took_s, peak_kb / 1000, len(json.loads(done.stdout)["lines"])


def resident_kb(pid: int) -> int:
    return int(
        next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line).split()[1]
    )


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[100, 1000, 3000])
    parser.add_argument("--rate", type=float, default=1000.0, help="results a second, of all lines together")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    print(f"Mosquitto and all ends on one machine of {usable_cpus()} cores, load average {os.getloadavg()[0]:.1f}.\n")
    heads = ["lines", "broker kB a line", "kB announced", "results/s", "kB a result", "broker µs a result"]
    heads += ["`model status` s", "its peak MB"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for num_lines in options.lines:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(num_lines, options.rate, options.seconds, Path(folder))
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
