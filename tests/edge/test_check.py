"""`edgeflame inspect --check`: everything is touched, and what is wrong is named with the one thing to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from edge.cameras import OVERRIDES_FILE
from edgeflame.errors import NegativeAnswerError
from edgeflame.state import locked_state_dir
from tests.support.brokers import BrokerProcess
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.small_package import write_images


class Check:
    """One configuration, and what is found."""

    def __init__(self, folder: Path, package_file: Path) -> None:
        self.folder = folder
        self.config = folder / "line.toml"
        self.package = package_file
        self.arguments = ["--state", str(folder / "state"), "--images", str(folder / "rejects")]
        self.exit_code = 0

    def run(self, text: str, *more: str) -> dict[str, list[dict[str, Any]]]:
        """Findings by what was checked."""
        self.config.write_text(text)
        done = CliRunner().invoke(
            cli, ["inspect", "--check", "--json", "--config", str(self.config), *self.arguments, *more]
        )
        self.exit_code = done.exception.exit_code if isinstance(done.exception, NegativeAnswerError) else done.exit_code
        findings: dict[str, list[dict[str, Any]]] = {}
        for finding in msgspec.json.decode(done.stdout):
            findings.setdefault(finding["check"], []).append(finding)
            assert (finding["do"] is not None) >= (finding["level"] == "problem")
        return findings


@pytest.fixture
def check(tmp_path: Path, package_file: Path) -> Check:
    return Check(tmp_path, package_file)


@pytest.fixture
def plc() -> Iterator[Plc]:
    opened = Plc(free_port())
    yield opened
    opened.stop()


def levels(findings: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {name: [finding["level"] for finding in found] for name, found in findings.items()}


def test_all_is_well_and_nothing_is_left_behind(check: Check, plc: Plc) -> None:
    with (
        BrokerProcess("mosquitto", check.folder) as broker,
        socket.create_server(("127.0.0.1", 0)) as service,
    ):
        found = check.run(
            f"""
            [products]
            tile = "{check.package}"
            [cameras.left]
            source = "{write_images(check.folder / "photos")}"
            [cameras.right]
            source = "boards:warm_wood?size=64&parts=3"
            [mqtt]
            broker = "{broker.url}"
            fleet = "f"
            line = "l1"
            [webhook]
            url = "http://127.0.0.1:{service.getsockname()[1]}/hook"
            [modbus]
            host = "127.0.0.1"
            port = {plc.port}
            [web]
            listen = "127.0.0.1:0"
            """
        )
        service.settimeout(5)
        connection, _ = service.accept()
        with connection:
            assert connection.recv(100) == b"", "nothing was posted"
    assert levels(found) == {
        "configuration": ["ok"],
        "product tile": ["ok", "note"],
        "camera left": ["ok"],
        "camera right": ["ok"],
        "state folder": ["ok"],
        "images folder": ["ok"],
        "broker": ["ok"],
        "webhook": ["ok"],
        "PLC of left": ["ok"],
        "PLC of right": ["ok"],
        "page": ["ok"],
    }
    assert check.exit_code == 0
    assert "judged pass" in found["camera left"][0]["what"]
    assert not any((check.folder / "state").iterdir())
    assert not any((check.folder / "rejects").iterdir())
    assert plc.writes == []


def test_each_thing_that_is_wrong_is_named_and_the_rest_is_checked_all_the_same(check: Check) -> None:
    dark = check.folder / "dark.png"
    cv2.imwrite(str(dark), np.zeros((96, 96, 3), np.uint8))
    (check.folder / "foreign.edgeflame").write_bytes(b"something else")
    closed = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = check.run(
            f"""
            [products]
            tile = "{check.package}"
            broken = "{check.folder}/foreign.edgeflame"
            [cameras.gone]
            source = "camera:97"
            product = "tile"
            [cameras.dark]
            source = "{dark}"
            product = "tile"
            [mqtt]
            broker = "mqtt://127.0.0.1:{closed}"
            fleet = "f"
            line = "l1"
            [webhook]
            url = "http://127.0.0.1:{closed}/hook"
            [modbus]
            host = "127.0.0.1"
            port = {closed}
            [web]
            listen = "127.0.0.1:{taken.getsockname()[1]}"
            """
        )
    assert check.exit_code == 1
    assert levels(found) == {
        "configuration": ["ok"],
        "product tile": ["ok", "note"],
        "product broken": ["problem"],
        "camera gone": ["problem"],
        "camera dark": ["problem"],
        "state folder": ["ok"],
        "images folder": ["ok"],
        "broker": ["problem"],
        "webhook": ["problem"],
        "PLC of gone": ["problem"],
        "PLC of dark": ["problem"],
        "page": ["problem"],
    }
    assert "judged unknown: too_dark" in found["camera dark"][0]["what"]
    assert "no such camera" in found["camera gone"][0]["what"]
    assert "not a model package" in found["product broken"][0]["what"]


def test_a_configuration_that_is_none_is_all_that_is_said(check: Check) -> None:
    found = check.run("[verdict]\ntreshold = 1\n", "--model", str(check.package), "--source", "x")
    assert list(found) == ["configuration"]
    assert "treshold" in found["configuration"][0]["what"]
    assert check.exit_code == 1


def test_beside_a_daemon_that_runs_what_it_holds_is_no_problem(check: Check) -> None:
    short = ("--model", str(check.package), "--source", str(write_images(check.folder / "photos")))
    with locked_state_dir(check.folder / "state"), socket.create_server(("127.0.0.1", 0)) as page:
        found = check.run(f'[web]\nlisten = "127.0.0.1:{page.getsockname()[1]}"\n', *short)
    assert levels(found)["state folder"] == ["ok", "note"]
    assert levels(found)["page"] == ["note"]
    assert check.exit_code == 0


def test_folders_that_cannot_be_used(check: Check) -> None:
    short = ("--model", str(check.package), "--source", str(write_images(check.folder / "photos")))
    (check.folder / "rejects").write_text("a file")
    (check.folder / "state").mkdir()
    (check.folder / "state" / OVERRIDES_FILE).write_bytes(b"{")
    found = check.run("", *short)
    assert levels(found)["images folder"] == ["problem"]
    assert levels(found)["state folder"] == ["ok", "problem"]
    check.arguments = []
    assert levels(check.run('[web]\nlisten = "127.0.0.1:0"\n', *short))["state folder"] == ["problem"]


def test_people_get_a_line_each(check: Check) -> None:
    check.config.write_text("")
    done = CliRunner().invoke(
        cli, ["inspect", "--check", "--model", str(check.package), "--source", "boards:warm_wood?size=64"]
    )
    assert done.exit_code == 0
    assert "✓ configuration" in done.stdout
    assert "✓ camera camera" in done.stdout


def test_what_announces_parts_is_asked_whether_it_can(check: Check, plc: Plc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The camera is not there, so that nothing else is well; its parts are checked all the same."""
    modbus = f'[trigger.modbus]\nhost = "127.0.0.1"\nport = {plc.port}\nregister = '
    arguments = ("--model", str(check.package), "--source", "camera:97")
    (found,) = check.run(modbus + "7\n", *arguments)["parts of camera"]
    assert (found["level"], found["what"]) == ("ok", f"127.0.0.1:{plc.port}: can announce them; none was waited for")
    monkeypatch.setattr("edge.check.CONNECT_TIMEOUT_S", 0.5)
    (found,) = check.run(modbus + "500\n", *arguments)["parts of camera"]
    assert (found["level"], "the PLC refuses" in found["what"]) == ("problem", True)
    (found,) = check.run("[trigger.mqtt]\n", *arguments)["parts of camera"]
    assert (found["level"], "topic is missing" in found["what"]) == ("problem", True)
    assert "parts of camera" not in check.run("", *arguments)
