"""What a later version left is refused with one line that names both, and stays as it is."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from edgeflame.errors import ConfigError
from edgeflame.mqtt.kit import read_kit
from edgeflame.state import MARKER, locked_state_dir
from tests.support.paths import RECORDED

Unpack = Callable[[str, str], Path]
PACKAGE = RECORDED / "state" / "first" / "package.edgeflame"


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash, but for the lock, which names the process that had it last."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def refused(*arguments: object) -> str:
    """A command's one line; it must end with the code for a state folder that cannot be used."""
    done = subprocess.run([sys.executable, "-m", "edgeflame", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 10, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("edgeflame: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return lines[0]


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    link = ("--broker", "mqtt://127.0.0.1:1", "--fleet", "f")
    return {
        "line": ("inspect", "--model", PACKAGE, "--source", "boards:warm_white_grid?parts=1", "--state", folder),
        "aggregator": ("aggregate", *link, "--state", folder),
        "state-a": ("train", *link, "--site", "a", "--data", folder.parent, "--state", folder, "--out", "/dev/null"),
    }


@pytest.mark.parametrize(("archive", "name"), [("line", "line"), ("run", "aggregator"), ("run", "state-a")])
def test_a_state_folder_of_a_later_format(archive: str, name: str, unpack: Unpack) -> None:
    folder = unpack("first", archive) / name
    holds = {"state-a": "site"}.get(name, name)
    (folder / MARKER).write_text(json.dumps({"holds": holds, "format": 2, "edgeflame": "9.1.0", "new": [1]}))
    before = contents(folder)
    line = refused(*commands(folder)[name])
    assert line.startswith(
        f"edgeflame: {folder}: the state is of format 2 of EdgeFlame 9.1.0; this EdgeFlame 0.1.0 reads"
    )
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("archive", "name", "file", "statement"),
    [
        ("line", "line", "outbox.sqlite", "UPDATE meta SET value = '2' WHERE key = 'format'"),
        ("run", "aggregator", "journal.sqlite", "PRAGMA user_version = 2"),
    ],
)
def test_a_database_of_a_later_format(archive: str, name: str, file: str, statement: str, unpack: Unpack) -> None:
    folder = unpack("first", archive) / name
    with sqlite3.connect(folder / file) as database:
        database.execute(statement)
    database.close()
    before = (folder / file).read_bytes()
    line = refused(*commands(folder)[name])
    assert f"{folder / file}: the {file.removesuffix('.sqlite')} is of format 2; this EdgeFlame" in line
    assert (folder / file).read_bytes() == before


def test_a_fleets_folder_of_a_later_format(unpack: Unpack) -> None:
    folder = unpack("first", "fleet") / "fleet"
    registry = json.loads((folder / "fleet.json").read_bytes())
    (folder / "fleet.json").write_text(json.dumps({**registry, "format": 2, "new": {}}))
    before = contents(folder)
    assert "the fleet's registry is of format 2; this EdgeFlame" in refused("fleet", "enrol", folder, "x", "--offline")
    assert contents(folder) == before
    kit = folder / "kits" / "line1.kit"
    kit.write_text(kit.read_text().replace("format = 1", "format = 2\nnew = 1"))
    with pytest.raises(ConfigError, match=r"line1\.kit: not a kit this EdgeFlame .* format 2"):
        read_kit(kit)


def test_a_package_of_a_later_format(tmp_path: Path) -> None:
    later = tmp_path / "later.edgeflame"
    with zipfile.ZipFile(PACKAGE) as old, zipfile.ZipFile(later, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "manifest.json":
                data = json.dumps({**json.loads(data), "format_version": 2, "edgeflame_version": "9.1.0"}).encode()
            new.writestr(info.filename, data)
    before = later.read_bytes()
    done = CliRunner().invoke(cli, ["model", "show", str(later)])
    assert isinstance(done.exception, Exception)
    assert getattr(done.exception, "exit_code", None) == 4
    assert "package format 2, this EdgeFlame 0.1.0 reads 1; use the version that wrote it (9.1.0)" in str(
        done.exception
    )
    assert later.read_bytes() == before


def test_the_state_of_another_kind_is_refused_and_a_damaged_marker_is_made_again(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path, kind="site"):
        pass
    assert "another kind (site, wanted: aggregator)" in refused(*commands(tmp_path)["aggregator"])
    (tmp_path / MARKER).write_bytes(b"")
    with locked_state_dir(tmp_path, kind="site"):
        assert json.loads((tmp_path / MARKER).read_bytes())["holds"] == "site"
