"""Several cameras and several products in one daemon, as a user configures them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edge.cameras import plan_cameras
from edge.config import InspectConfig
from edge.config.outputs import OutboxConfig
from edge.delivery.outbox import Outbox
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, DataError, UsageError
from tests.support.small_package import write_images


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


def lines(result: Result) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in result.stdout.splitlines()]


@pytest.fixture
def two_cameras(package_file: Path, tmp_path: Path) -> Path:
    """A configuration: the second camera lets everything pass."""
    config = tmp_path / "line.toml"
    config.write_text(
        f"""
        [products]
        tile = "{package_file}"
        board = "{package_file}"
        [cameras.left]
        source = "{write_images(tmp_path / "left")}"
        product = "tile"
        [cameras.right]
        source = "{write_images(tmp_path / "right")}"
        product = "board"
        [cameras.right.verdict]
        threshold = 1e9
        """
    )
    return config


def test_each_camera_judges_its_own_parts_by_its_own_rules(two_cameras: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    parts = lines(inspect("--config", two_cameras, "--json", "--state", state))
    by_camera = {name: [part for part in parts if part["camera"] == name] for name in ("left", "right")}
    assert [part["verdict"] for part in by_camera["left"]] == ["pass"] * 3 + ["fail"] * 2
    assert [part["verdict"] for part in by_camera["right"]] == ["pass"] * 5
    for told in by_camera.values():
        assert [part["sequence"] for part in told] == [0, 1, 2, 3, 4]
    with Outbox(state / "outbox.sqlite", OutboxConfig()) as outbox:
        assert [number for number, _ in outbox.latest(20)] == list(range(10, 0, -1))


def test_people_are_told_which_camera_it_was(two_cameras: Path) -> None:
    shown = inspect("--config", two_cameras)
    assert shown.exit_code == 0
    assert "10 parts in" in shown.stdout
    assert "left" in shown.stdout
    assert "right" in shown.stdout


def test_a_camera_that_is_not_there_does_not_stop_the_others(package_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    config.write_text(
        f'[cameras.gone]\nsource = "camera:97"\n[cameras.here]\nsource = "{write_images(tmp_path / "here")}"\n'
    )
    parts = lines(inspect("--config", config, "--model", package_file, "--json", "--limit", "6"))
    assert sorted(part["camera"] for part in parts) == ["gone"] + ["here"] * 5
    (outage,) = [part for part in parts if part["camera"] == "gone"]
    assert (outage["verdict"], outage["reasons"]) == ("unknown", ["unreadable"])
    assert outage["detail"].startswith("parts may pass unseen: camera:97: no such camera")


def test_alone_a_camera_that_is_not_there_is_waited_for(package_file: Path) -> None:
    (outage,) = lines(inspect("--model", package_file, "--source", "camera:97", "--json", "--limit", "1"))
    assert (outage["verdict"], outage["reasons"]) == ("unknown", ["unreadable"])
    assert outage["detail"].startswith("parts may pass unseen: camera:97: no such camera")


def test_a_block_of_registers_for_each_camera_in_their_order() -> None:
    text = (
        b'[products]\np = "f"\n[modbus]\nhost = "plc"\nregister = 100\n[cameras.a]\nsource = "x"\n[cameras.b]\n'
        b'source = "y"\n[cameras.b.modbus]\nhost = "other"\nregister = 7\n[cameras.c]\nsource = "z"\n'
    )
    config = parse_config(text, InspectConfig, "line.toml")
    plan = plan_cameras(config, model=None, source=None, product_of=str)
    told = [(camera.modbus.host, camera.modbus.register) for camera in plan.cameras if camera.modbus is not None]
    assert told == [("plc", 100), ("other", 7), ("plc", 120)]


@pytest.mark.parametrize(
    ("text", "arguments", "kind", "message"),
    [
        ("", ("--source", "photos"), UsageError, "--model: missing"),
        ("", ("--model", "MODEL"), UsageError, "--source: missing"),
        ('[cameras.a]\nsource = "photos"\n', ("--source", "photos"), UsageError, "one camera; the configuration has"),
        ('[products]\np = "x"\n', ("--model", "x", "--source", "photos"), UsageError, "one product; the configuration"),
        (
            '[products]\np = "x"\nq = "y"\n[cameras.a]\nsource = "photos"\n', (), ConfigError,
            r"cameras\.a\.product: missing; \[products\] has p, q",
        ),
        (
            '[products]\np = "x"\n[cameras.a]\nsource = "photos"\nproduct = "q"\n', (), ConfigError,
            r"cameras\.a\.product: no product 'q'; there are p",
        ),
        ('[cameras."a/b"]\nsource = "photos"\n', (), ConfigError, "cameras: the name 'a/b'"),
        ('[cameras.a]\nsource = "photos"\nlens = 1\n', (), ConfigError, "lens"),
        ('[cameras.a]\nsource = "nowhere"\n', ("--model", "MODEL"), DataError, "nowhere: no such folder or file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_error(
    text: str,
    arguments: tuple[str, ...],
    kind: type[Exception],
    message: str,
    package_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"))
    Path("line.toml").write_text(text)
    with pytest.raises(kind, match=message) as raised:
        inspect("--config", "line.toml", *(str(package_file) if word == "MODEL" else word for word in arguments))
    assert "\n" not in str(raised.value)
