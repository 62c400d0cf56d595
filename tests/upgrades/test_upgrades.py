"""What an earlier version left on the disk is opened by this one, and nothing of it is lost.

The recordings are made by ``tests/support/record_state.py``, once for each format, and never changed afterwards.
"""

from __future__ import annotations

import http.server
import json
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregator.journal import Journal
from cli import cli
from edge.runtimes.load import open_runtime, require_parity
from edgeflame.images import read_image
from edgeflame.mqtt.kit import read_kit
from edgeflame.package import read_package
from fleet.folder import open_fleet
from tests.support import paths
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.small_package import write_images

Unpack = Callable[[str, str], Path]
RECORDED = paths.RECORDED / "state"
VERSIONS = sorted(path.name for path in RECORDED.iterdir())

pytestmark = pytest.mark.timeout(90)


def facts(version: str, name: str) -> dict[str, Any]:
    return dict(json.loads((RECORDED / version / "facts.json").read_bytes())[name])


def inspect(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


class Hook(http.server.BaseHTTPRequestHandler):
    """A web service that keeps what it is sent."""

    taken: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@pytest.mark.parametrize("version", VERSIONS)
def test_a_line_delivers_what_waited_and_keeps_its_numbers_and_marks(
    version: str, unpack: Unpack, tmp_path: Path
) -> None:
    told, state = facts(version, "line"), unpack(version, "line") / "line"
    marks = {path: path.read_bytes() for path in (state / "marks").rglob("*") if path.is_file()}
    token = (state / "operator-token").read_bytes()
    hook = type("TakingHook", (Hook,), {"taken": []})
    folder, config = write_images(tmp_path / "photos"), tmp_path / "line.toml"
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), hook) as server,
        BrokerProcess("embedded", tmp_path) as broker,
    ):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        config.write_text(
            f'[webhook]\nurl = "http://127.0.0.1:{server.server_port}/"\n[web]\nlisten = "127.0.0.1:0"\n'
            f'[mqtt]\nbroker = "{broker.url}"\nfleet = "recorded"\nline = "line1"\n[retry]\nflush_s = 30.0\n'
        )
        done = inspect(
            *("--model", RECORDED / version / "package.edgeflame", "--source", folder),
            *("--config", config, "--state", state),
        )
        server.shutdown()
    assert done.exit_code == 0
    assert "wait for" not in done.stdout
    # All that was acknowledged to nobody, in order, and after it the parts of today.
    numbers = [delivery["number"] for delivery in hook.taken]
    assert numbers == list(range(told["delivered"] + 1, told["newest"] + 5 + 1))
    assert {delivery["outbox"] for delivery in hook.taken} == {told["outbox"]}
    assert all(delivery["result"]["captured"] for delivery in hook.taken)
    with sqlite3.connect(state / "outbox.sqlite") as outbox:
        standing = dict(outbox.execute("SELECT name, acknowledged FROM destinations"))
    assert standing == dict.fromkeys(("mqtt", "webhook"), told["newest"] + 5)
    assert {path: path.read_bytes() for path in marks} == marks
    assert (state / "operator-token").read_bytes() == token
    for name in told["marked"]:
        assert read_image(state / "marks" / name).shape[2] == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_goes_on_where_it_stood_and_ends_with_the_same_bits(version: str, unpack: Unpack, tmp_path: Path) -> None:
    before = unpack(version, "run")
    with Journal(before / "aggregator" / "journal.sqlite") as journal:
        state = journal.last_run()
        assert state is not None
        assert (state.phase, len(state.rounds)) == ("train", 2)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    models = []
    with BrokerProcess("embedded", tmp_path) as broker:
        for name, folder in (("before", before), ("undisturbed", undisturbed)):
            with Fleet(broker, folder, name=name) as fleet:
                processes = [fleet.aggregator("--sites", "2", "--rounds", "2"), fleet.site("a"), fleet.site("b")]
                assert [process.wait() for process in processes] == [0, 0, 0]
                models.append(fleet.model())
                if folder == before:
                    assert processes[0].log.count("run_continued") == 1
                    assert processes[2].log.count("trained round=") == 0, "b had trained both rounds"
                    assert fleet.ledger()["run"] == state.run
    assert models[0] == models[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fleets_folder_is_administrated_further(version: str, unpack: Unpack) -> None:
    told, folder = facts(version, "fleet"), unpack(version, "fleet") / "fleet"
    with open_fleet(folder) as fleet:
        members = {entry.name: entry.revoked_at is None for entry in fleet.registry.identities}
        assert {name for name, active in members.items() if not active} == {told["revoked"]}
        assert set(told["active"]) <= set(members)
        revoked = fleet.registry.revocations()
    new = CliRunner().invoke(cli, ["fleet", "enrol", str(folder), "plant-c", "--offline"], catch_exceptions=False)
    assert new.exit_code == 0
    with open_fleet(folder) as fleet:
        assert fleet.registry.revocations() == revoked
        old = [read_kit(folder / "kits" / f"{name}.kit", must_be_valid=False) for name in told["active"]]
        assert {kit.ca for kit in (*old, read_kit(folder / "kits" / "plant-c.kit"))} == {old[0].ca}
    assert stat.S_IMODE((folder / "kits" / "plant-c.kit").stat().st_mode) == 0o600


@pytest.mark.parametrize("version", VERSIONS)
def test_a_package_scores_as_it_did(version: str) -> None:
    path = RECORDED / version / "package.edgeflame"
    package = read_package(path)
    assert package.manifest.format_version == 1
    assert require_parity(open_runtime(package.model_onnx, device="cpu"), package).num_images == 2
