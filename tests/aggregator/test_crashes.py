"""Crash equivalence: whoever is killed, the final global model is bit for bit that of the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)


def gated(folder: Path) -> Path:
    gate = folder / "gate"
    gate.mkdir()
    return gate


def test_site_killed_while_training(broker: BrokerProcess, tmp_path: Path, undisturbed_model: bytes) -> None:
    gate = gated(tmp_path)
    with Fleet(broker, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        killed, other = fleet.site("a", TINY_GATE=str(gate)), fleet.site("b")
        wait_for((gate / "waiting-a-1").exists, "the site trains")
        killed.kill()
        (gate / "go").touch()
        killed.start()
        assert [aggregator.wait(), killed.wait(), other.wait()] == [0, 0, 0]
        assert fleet.model() == undisturbed_model


def test_site_killed_between_training_and_receipt(
    embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        killed, other = fleet.site("a"), fleet.site("b")
        killed.wait_for_log("trained round=1")
        killed.kill()
        killed.start()
        assert [aggregator.wait(), killed.wait(), other.wait()] == [0, 0, 0]
        assert killed.log.count("trained round=1") == 1, "the update was on disk and needed no second training"
        assert fleet.model() == undisturbed_model


def test_aggregator_killed_after_the_first_receipt(
    broker: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    gate = gated(tmp_path)
    with Fleet(broker, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a"), fleet.site("b", TINY_GATE=str(gate))]
        aggregator.wait_for_log("update_accepted")
        aggregator.kill()
        aggregator.start()
        (gate / "go").touch()
        assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
        assert aggregator.log.count("run_continued") == 1
        assert fleet.model() == undisturbed_model


def test_aggregator_killed_while_waiting_for_sites(
    embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        first = fleet.site("a")
        aggregator.wait_for_log("site_joined")
        aggregator.kill()
        aggregator.start()
        second = fleet.site("b")
        assert [process.wait() for process in (aggregator, first, second)] == [0, 0, 0]
        assert fleet.model() == undisturbed_model


def test_everything_killed_in_the_finish(embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a"), fleet.site("b")]
        aggregator.wait_for_log("model_made round=2")
        for process in (aggregator, *sites):
            process.kill()
        embedded.kill()
        embedded.start()
        for process in (aggregator, *sites):
            process.start()
        assert aggregator.wait() == 0
        assert fleet.model() == undisturbed_model


# Small packets make an upload of many chunks, slow enough to be killed in the middle.
SMALL_PACKETS = "allow_anonymous true\nmax_packet_size 20000"


@pytest.fixture(scope="module")
def large_undisturbed_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("large")
    with BrokerProcess("embedded", folder) as broker, Fleet(broker, folder, env=LARGE) as fleet:
        aggregator = fleet.aggregator("--sites", "1", "--rounds", "1")
        site = fleet.site("a")
        assert [aggregator.wait(), site.wait()] == [0, 0]
        return fleet.model()


LARGE = {"TINY_ELEMENTS": "2000000"}


@pytest.mark.parametrize("victim", ["broker", "site", "aggregator"])
def test_killed_in_the_middle_of_an_upload(victim: str, tmp_path: Path, large_undisturbed_model: bytes) -> None:
    with (
        BrokerProcess("mosquitto", tmp_path, mosquitto_lines=SMALL_PACKETS) as broker,
        Fleet(broker, tmp_path, env=LARGE) as fleet,
    ):
        aggregator = fleet.aggregator("--sites", "1", "--rounds", "1")
        site = fleet.site("a")
        aggregator.wait_for_log("round_started")
        partial = tmp_path / "aggregator" / "partial" / "a"
        wait_for(lambda: sum(f.stat().st_blocks * 512 for f in partial.iterdir()) > 1_000_000, "a part has arrived")
        process = {"broker": broker, "site": site, "aggregator": aggregator}[victim]
        process.kill()
        assert "update_accepted" not in aggregator.log, "it was too late for the middle of the upload"
        process.start()
        assert [aggregator.wait(), site.wait()] == [0, 0]
        assert fleet.model() == large_undisturbed_model
