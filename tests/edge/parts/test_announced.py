"""A line whose parts a PLC announces: stops, rests and hangs lose no part; and how it is configured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli
from edge.camera_worker import CameraWorker
from edge.config import InspectConfig
from edge.config.inspection import CaptureConfig, ModbusTriggerConfig, PartsConfig, TriggerConfig
from edge.frame import Captured
from edge.parts.tracker import PartTracker
from edge.result import Result
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, CrashLoopError
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.scripted_camera import FakeInspector
from tests.support.small_package import write_images
from tests.support.triggered_parts import Camera
from tests.support.waiting import wait_for


class Station:
    """A camera, a PLC that counts parts, and a line between them."""

    def __init__(self, plc: Plc, inspector: FakeInspector | None = None, **parts: Any) -> None:
        self.plc, self.camera, self.inspector = plc, Camera(), inspector or FakeInspector()
        trigger = TriggerConfig(
            window_ms=60_000, modbus=ModbusTriggerConfig(host="127.0.0.1", port=plc.port, register=0, poll_ms=2)
        )
        tracker = PartTracker("a", trigger, PartsConfig(**parts))
        self.line = CameraWorker(
            "a",
            tracker.source_opener(lambda: self.camera, None),
            self.inspector,
            tracker.capture_config(CaptureConfig(depth=1), is_live=True),
            tracker=tracker,
        )
        self.told: list[Result] = []
        self.halt = threading.Event()
        self.error: Exception | None = None
        self._count = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_for(lambda: self.line.status().trigger_up, "the PLC is polled")
        self._poll()

    def announce(self) -> None:
        """One part, seen by the camera."""
        self._count += 1
        self.plc.set("register", 0, self._count)
        wait_for(lambda: self.line.status().counts.triggers == self._count, "the part is announced")
        self.camera.show()

    def wait(self, count: int) -> None:
        wait_for(lambda: len(self.told) >= count, f"{count} parts are told")

    def end(self) -> None:
        self.halt.set()
        if self.inspector.gate is not None:
            self.inspector.gate.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _poll(self) -> None:
        seen = self.plc.num_reads
        wait_for(lambda: self.plc.num_reads > seen + 2, "the counter is known")

    def _run(self) -> None:
        try:
            self.line.run(lambda inspected: self.told.append(inspected.result), self.halt)
        except CrashLoopError as exc:
            self.error = exc


class PrefetchingInspector(FakeInspector):
    """Would look at two images side by side, and hangs."""

    num_parallel = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate: threading.Event = threading.Event()
        self.observer = self  # type: ignore[assignment]

    def observe(self, captured: Captured, *, beside_others: bool = False) -> None:
        assert self.gate.wait(60)


@pytest.fixture
def plc() -> Iterator[Plc]:
    opened = Plc(free_port())
    yield opened
    opened.stop()


def numbers(station: Station) -> list[int | None]:
    return [result.part_number for result in station.told]


def test_a_stop_gives_every_announced_part_its_verdict(plc: Plc) -> None:
    station = Station(plc)
    station.inspector.gate = threading.Event()
    for _ in range(5):
        station.announce()
    wait_for(lambda: station.camera.num_taken == 5, "all images are taken")
    # One in the model's hands, one in the queue, one on its way into it, two with the trigger.
    station.end()
    assert numbers(station) == [1, 2, 3, 4, 5]
    assert station.told[0].verdict != "unknown" or station.told[0].reasons != ("not_scored",)
    for result in station.told[1:]:
        assert (result.verdict, result.reasons) == ("unknown", ("not_scored",))
        assert result.detail == "the inspection was stopped before its turn"
    assert [result.sequence for result in station.told] == [0, 1, 2, 3, 4]


def test_a_model_that_hangs_costs_no_part_its_verdict_and_ends_the_line(plc: Plc) -> None:
    station = Station(plc, deadline_ms=1000, hang_s=0.1)
    station.inspector.gate = threading.Event()
    for _ in range(3):
        station.announce()
    wait_for(lambda: station.error is not None, "the line gives up")
    assert station.line.busy_s > 0.5  # what the watchdog sees: nothing moves any more
    station.end()
    assert isinstance(station.error, CrashLoopError)
    assert numbers(station) == [1, 2, 3]
    assert all(result.verdict == "unknown" for result in station.told)
    first = station.told[0]
    assert (first.reasons, first.late, first.detail and "has not answered" in first.detail) == (("late",), True, True)


def test_a_model_that_looks_ahead_and_hangs_costs_no_part_its_verdict(plc: Plc) -> None:
    judge = PrefetchingInspector()
    station = Station(plc, judge, deadline_ms=300)
    for number in range(1, 8):
        station.announce()
        station.wait(number)
    judge.gate.set()
    station.end()
    assert [(result.verdict, result.late) for result in station.told] == [("unknown", True)] * 7


def test_announced_parts_wait_while_the_line_rests(plc: Plc) -> None:
    station = Station(plc)
    station.line.pause()
    station.announce()
    wait_for(lambda: station.camera.num_taken == 1, "the image is taken")
    station.line.resume()
    station.wait(1)
    station.end()
    assert numbers(station) == [1]
    assert "paused" not in station.line.status().dropped


def test_a_part_that_waits_beyond_its_deadline_is_late_also_while_the_line_rests(plc: Plc) -> None:
    station = Station(plc, deadline_ms=300)
    station.line.pause()
    station.announce()
    station.wait(1)
    station.end()
    assert (station.told[0].verdict, station.told[0].reasons) == ("unknown", ("late",))
    assert station.line.is_paused


def test_files_with_numbers_are_missed_when_they_are_missing(package_file: Path, tmp_path: Path) -> None:
    folder, config = write_images(tmp_path / "photos") / "good", tmp_path / "line.toml"
    (folder / "1.png").unlink()
    config.write_text("[parts]\nnumber = '(\\d+)\\.png$'\n")
    arguments = ["inspect", "--model", package_file, "--source", folder, "--config", config, "--state", tmp_path / "s"]
    shown = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert "parts: 1 missing" in shown.stdout
    assert "1 parts missing between 0 and 2" in shown.stdout
    # The outbox remembers them: the same files again are the same parts again.
    again = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert "parts: 2 duplicate" in again.stdout


# Configuration.

MODBUS = '[trigger.modbus]\nhost = "h"\nregister = 0\n'


def test_each_camera_may_have_triggers_of_its_own() -> None:
    config = parse_config(
        b"""
        [parts]
        deadline_ms = 200
        [cameras.left]
        source = "camera:0"
        [cameras.left.trigger.mqtt]
        topic = "press/4"
        [cameras.right]
        source = "camera:1"
        """,
        InspectConfig,
        "line.toml",
    )
    left, right = config.of_camera("left"), config.of_camera("right")
    assert (left.trigger.is_on, right.trigger.is_on) == (True, False)
    assert left.parts.deadline_ms == right.parts.deadline_ms == 200


@pytest.mark.parametrize(
    ("config", "source", "says"),
    [
        (MODBUS, "photos", "every file or frame is a part already"),
        (MODBUS + '[capture]\npolicy = "latest"\n', "camera:9", "would drop announced parts"),
        ('[trigger.mqtt]\ntopic = "t"\n', "camera:9", "no section"),
        ('[trigger.mqtt]\nbroker = "mqtt://h"\n', "camera:9", "topic is missing"),
        ('[trigger.mqtt]\nbroker = "ftp://h"\ntopic = "t"\n', "camera:9", "trigger.mqtt: broker"),
        (MODBUS + "[parts]\ndeadline_ms = 0.5\n", "camera:9", "deadline_ms"),
        ("[trigger]\ndelay = 3\n", "camera:9", "delay"),
        ("[parts]\nnumber = '(\\d+)$'\n", "camera:9", "have none of their own"),
    ],
)
def test_mistakes_are_one_clear_error(
    package_file: Path, tmp_path: Path, config: str, source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"))
    Path("line.toml").write_text(config)
    arguments = ["inspect", "--model", str(package_file), "--source", source, "--config", "line.toml"]
    with pytest.raises(ConfigError, match=says) as raised:
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "\n" not in str(raised.value)
