"""Announced parts through the whole command: a network camera, a broker or a PLC, and what comes out."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeflame.mqtt.client import MqttClient
from tests.support.brokers import BrokerProcess
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.rtsp_server import RtspServer
from tests.support.triggered_parts import sender
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def camera() -> Iterator[str]:
    port = free_port()
    server = RtspServer(port)
    yield f"rtsp://127.0.0.1:{port}/live"
    server.kill()


class Daemon:
    """``edgeflame inspect`` as a process; a context manager."""

    def __init__(self, folder: Path, package: Path, source: str, config: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "line.toml").write_text(config)
        self.results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._log = (folder / "log").open("a")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "edgeflame", "inspect", "--model", package, "--source", source, "--json"),
                *("--config", folder / "line.toml", "--state", folder / "state", "--summary", folder / "summary.json"),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._folder = folder
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(20)
        self._log.close()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def next(self) -> dict[str, Any]:
        return self.results.get(timeout=30)

    def stop(self) -> dict[str, Any]:
        """Gracefully; returns the summary."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0, self.log
        summary: dict[str, Any] = msgspec.json.decode((self._folder / "summary.json").read_bytes())
        return summary

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.results.put(msgspec.json.decode(line))


def status_of(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()
    except OSError:
        return 0, ""


def test_messages_announce_parts_whose_gaps_and_repetitions_outlive_a_restart(
    camera: str, package_file: Path, tmp_path: Path
) -> None:
    web = f"http://127.0.0.1:{(port := free_port())}"
    with BrokerProcess("embedded", tmp_path) as broker, sender(broker) as plant:
        config = f"""
            [mqtt]
            broker = "{broker.url}"
            fleet = "f"
            line = "l1"
            [trigger]
            window_ms = 2000
            [trigger.mqtt]
            [web]
            listen = "127.0.0.1:{port}"
        """

        def announce(number: int, plant: MqttClient = plant) -> None:
            plant.publish("edgeflame/v1/f/line/l1/trigger", b'{"part_id": "A-%d", "number": %d}' % (number, number))

        def works() -> None:
            """Triggers can come, and the camera gives images."""
            for sign in ('edgeflame_trigger_up{camera="camera"} 1.0', 'reason="untriggered"'):
                wait_for(lambda sign=sign: sign in status_of(f"{web}/metrics")[1], f"it says {sign}")

        with Daemon(tmp_path / "line", package_file, camera, config) as daemon:
            works()
            for number in (1, 2, 5, 5):
                announce(number)
            results = [daemon.next() for _ in range(4)]
            assert [result["part_id"] for result in results] == ["A-1", "A-2", "A-5", "A-5"]
            assert [result["part_number"] for result in results] == [1, 2, 5, 5]
            assert [result["parts_missing"] for result in results] == [0, 0, 2, 0]
            assert [result["duplicate"] for result in results] == [False, False, False, True]
            assert all(result["score"] is not None for result in results)  # a real image of each
            wait_for(lambda: status_of(f"{web}/readiness")[0] == 200, "it is ready")
            metrics = status_of(f"{web}/metrics")[1]
            assert 'edgeflame_triggers_total{camera="camera"} 4.0' in metrics
            assert 'edgeflame_parts_missing_total{camera="camera"} 2.0' in metrics
            assert 'edgeflame_parts_duplicate_total{camera="camera"} 1.0' in metrics
            broker.kill()
            wait_for(lambda: "no trigger can come" in status_of(f"{web}/readiness")[1], "the loss is said")
            assert status_of(f"{web}/readiness")[0] == 503
            broker.start()
            works()
            summary = daemon.stop()
        assert summary["parts"] == 4
        assert (summary["counts"]["missing"], summary["counts"]["duplicates"]) == (2, 1)
        assert summary["dropped"]["untriggered"] > 0
        with Daemon(tmp_path / "line", package_file, camera, config) as daemon, sender(broker) as anew:
            works()
            # Part 6 came while the daemon was down.
            announce(5, anew)
            announce(7, anew)
            again, after = daemon.next(), daemon.next()
            assert (again["duplicate"], after["parts_missing"]) == (True, 1)
            assert "1 parts missing between 5 and 7" in after["detail"]
            daemon.stop()


def test_a_plc_counts_a_part_up_and_reads_its_verdict_with_that_number(
    camera: str, package_file: Path, tmp_path: Path
) -> None:
    plc = Plc(free_port())
    try:
        plc.set("register", 0, 41)
        config = f"""
            [trigger]
            window_ms = 2000
            [trigger.modbus]
            host = "127.0.0.1"
            port = {plc.port}
            register = 0
            [modbus]
            host = "127.0.0.1"
            port = {plc.port}
            register = 50
            layout = 2
            [parts]
            deadline_ms = 5000
        """
        with Daemon(tmp_path / "line", package_file, camera, config) as daemon:
            wait_for(lambda: "trigger_listening" in daemon.log, "the PLC is polled")
            seen = plc.num_reads
            wait_for(lambda: plc.num_reads > seen + 3, "the counter is known")
            for number in (42, 43, 45):
                plc.set("register", 0, number)
                result = daemon.next()
                assert (result["part_id"], result["part_number"]) == (f"part-{number}", number)
                assert result["parts_missing"] == (1 if number == 45 else 0)
                assert not result["late"]
                wait_for(lambda expected=[0, number]: plc.registers[10:12] == expected, "the PLC sees its number")
                assert plc.registers[1] in (1, 2, 3)
                assert plc.registers[12] == (9 if number == 45 else 1)
            daemon.stop()
    finally:
        plc.stop()
