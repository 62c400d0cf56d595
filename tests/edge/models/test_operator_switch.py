"""The whole way with kits on a real Mosquitto: publish, wait for a word, switch, roll back; and who may do which."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import LinkError, UsageError
from edgeflame.package import Package, read_package
from fleet import broker_control
from fleet.folder import make_fleet, open_fleet
from tests.support.brokers import BrokerProcess
from tests.support.ports import free_port
from tests.support.rollout_daemon import Daemon, variant
from tests.support.signing_keys import Keys
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def kits(tmp_path: Path) -> Iterator[tuple[Path, BrokerProcess]]:
    """Kits of a fleet, and its broker."""
    folder, port = tmp_path / "fleet", free_port()
    make_fleet(
        folder,
        fleet="test",
        hosts=["localhost", "127.0.0.1"],
        port=port,
        bind="127.0.0.1",
        install_dir=None,
        plugin=None,
        broker_user="root" if os.getuid() == 0 else None,
        replace=False,
    )
    with open_fleet(folder) as fleet:
        for name, role in (("line-1", "line"), ("engineer", "publisher"), ("office", "observer")):
            fleet.enrol(name, role=role, days=10, out=None, reinstate=False)  # type: ignore[arg-type]
        fleet.write_access()
    with BrokerProcess("mosquitto", folder, config=folder / "broker" / broker_control.CONFIG_FILE, port=port) as broker:
        yield folder / "kits", broker


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def model(*arguments: object) -> Result:
    return run("model", *arguments)


def test_a_person_says_when(
    kits: tuple[Path, BrokerProcess], signed: Path, referenced: Package, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    folder, broker = kits
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    sha256, web = read_package(new).sha256, free_port()
    with Daemon(
        tmp_path / "line",
        broker=broker,
        model=signed,
        key=keys.public,
        source=parts,
        models=f'shadow_parts = 40\nmax_slowdown = 10\nauto_promote = false\n[web]\nlisten = "127.0.0.1:{web}"',
        mqtt=f'kit = "{folder / "line-1.kit"}"',
    ) as daemon:
        observer, publisher = ("--kit", folder / "office.kit"), ("--kit", folder / "engineer.kit")
        wait_for(lambda: model("status", *observer).exit_code == 0, "the line says what it runs")
        waits_not = run("line", "switch-model", "line-1", "test piece", *publisher)
        assert "no candidate waits" in waits_not.stderr
        published = model("publish", new, *publisher, "--timeout", 30)
        assert published.exit_code == 0, (published.output, published.exception)
        state = lambda: json.loads(model("status", "--json", *observer).stdout)["lines"][0]["products"][0]  # noqa: E731
        wait_for(lambda: state()["candidate"]["stage"] == "waiting", "the shadow run is passed")
        candidate = state()["candidate"]
        assert candidate["disagreement"]["parts"] >= 40
        assert state()["present"]["sha256"] == referenced.sha256, "it waits"
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{web}/metrics", timeout=10).read().decode()
        assert 'edgeflame_model_on_trial{product="test piece"} 0.0' in metrics

        # Who waits for it to run is told that it waits, and no longer kept.
        until = model("publish", new, *publisher, "--timeout", 30, "--until", "running")
        assert "line-1 waiting" in str(until.exception)
        switched = run("line", "switch-model", "line-1", "test piece", *publisher)
        assert switched.stdout == f"line-1: runs {sha256[:12]} (new.edgeflame)\n", switched.exception
        wait_for(lambda: daemon.judging_model == sha256[:12], "the new model judges")
        assert state()["outcomes"][0]["disagreement"] == candidate["disagreement"]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{web}/metrics", timeout=10).read().decode()
        assert 'edgeflame_model_on_trial{product="test piece"} 1.0' in metrics
        assert 'edgeflame_releases_total{fate="running",product="test piece"} 1.0' in metrics

        # Under its former name.
        back = model("rollback", "test piece", "--line", "line-1", "--line", "line-2", *publisher)
        assert back.stdout == f"line-1: runs {referenced.sha256[:12]} (its configuration's file)\n"
        assert back.exit_code == LinkError.exit_code
        assert "use `edgeflame line rollback LINE PRODUCT`" in back.stderr
        assert "line-2: no line 'line-2' has ever announced itself" in back.stderr
        wait_for(lambda: daemon.judging_model == referenced.sha256[:12], "the file judges again")
        again = run("line", "rollback", "line-1,line-2", "test piece", "--json", *publisher)
        answers = [json.loads(line) for line in again.stdout.splitlines()]
        assert [(one["line"], one["ok"], one["exit_code"]) for one in answers] == [
            ("line-1", False, again.exit_code), ("line-2", False, LinkError.exit_code),
        ]  # fmt: skip
        assert "nothing to roll back to" in answers[0]["error"]
        refused = model("publish", new, *publisher, "--timeout", 5)
        assert "line-1 rolled back: command: by command" in str(refused.exception)
        table = model("status", *observer)
        assert "rolled back" in table.stdout

        assert isinstance(run("line", "rollback", "line-1", "test piece", *observer).exception, UsageError)
        sequence = [one["sequence"] for one in daemon.results()]
        assert sequence == list(range(len(sequence))), "no part is missing"
        assert not daemon.named("models_thread_failed")
