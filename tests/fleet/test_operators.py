"""What operators may do, with real processes: pause, resume, leave, remove, finish early, stop, stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeflame", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def gated(folder: Path) -> Path:
    gate = folder / "gate"
    gate.mkdir()
    return gate


def worker_states(site_pid: int) -> list[str]:
    """The process states (``T``: stopped) of a process's children."""
    children = Path(f"/proc/{site_pid}/task/{site_pid}/children").read_text().split()
    return [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]


def test_a_paused_site_computes_nothing_and_its_result_is_the_same(
    embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    gate = gated(tmp_path)
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        site, other = fleet.site("a", TINY_GATE=str(gate)), fleet.site("b")
        wait_for((gate / "waiting-a-1").exists, "the site trains")
        assert command("site", "pause", "--state", fleet.site_state("a"), "--reason", "the line runs").returncode == 0
        aggregator.wait_for_log("site_paused")
        wait_for(lambda: worker_states(site.pid) == ["T"], "the worker is stopped")
        (gate / "go").touch()
        # A pause outlives the site's process, and the aggregator's.
        for process in (site, aggregator):
            process.kill()
            process.start()
        site.wait_for_log('paused reason="the line runs"', times=2)
        assert command("site", "resume", "--state", fleet.site_state("a")).stdout == "goes on\n"
        assert [aggregator.wait(), site.wait(), other.wait()] == [0, 0, 0]
        assert fleet.model() == undisturbed_model
        assert aggregator.log.count("site_resumed") == 1


def test_a_paused_worker_may_give_its_memory_back(
    embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    gate = gated(tmp_path)
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        site, other = fleet.site("a", TINY_GATE=str(gate)), fleet.site("b")
        wait_for((gate / "waiting-a-1").exists, "the site trains")
        command("site", "pause", "--state", fleet.site_state("a"), "--release")
        wait_for(lambda: not worker_states(site.pid), "the worker is gone")
        (gate / "go").touch()
        command("site", "resume", "--state", fleet.site_state("a"))
        assert [aggregator.wait(), site.wait(), other.wait()] == [0, 0, 0]
        assert fleet.model() == undisturbed_model


def test_the_aggregators_operator_pauses_and_removes_sites(embedded: BrokerProcess, tmp_path: Path) -> None:
    gate = gated(tmp_path)
    with Fleet(embedded, tmp_path, config="min_available_sites = 3\nrounds = 2\nquorum = 0.3") as fleet:
        aggregator = fleet.aggregator()
        sites = {name: fleet.site(name, TINY_GATE=str(gate)) for name in "abc"}
        for name in "abc":
            wait_for((gate / f"waiting-{name}-1").exists, f"{name} trains")
        state = tmp_path / "aggregator"
        assert command("site", "pause", "b", "--state", state).stdout == "b is paused\n"
        sites["b"].wait_for_log("paused")
        removed = command("rounds", "remove", "c", "--state", state, "--reason", "sold")
        assert removed.stdout == "c is removed\n"
        assert sites["c"].wait() == 8
        assert "removed by the aggregator's operator: sold" in sites["c"].log.splitlines()[-1]
        stranger = command("site", "pause", "x", "--state", state)
        assert (stranger.returncode, stranger.stderr) == (
            2,
            "edgeflame: x is not a site of this run; its sites are: a, b\n",
        )
        # The same installation is not let in again; another one of that name is.
        sites["c"].start()
        assert sites["c"].wait() == 8
        assert "has left the run" in sites["c"].log.splitlines()[-1]
        (gate / "go").touch()
        anew = fleet.site("c", process="anew")
        aggregator.wait_for_log("site_joined site=c", times=2)
        assert command("rounds", "resume", "b", "--state", state).stdout == "b goes on\n"
        assert [p.wait() for p in (aggregator, sites["a"], sites["b"], anew)] == [0, 0, 0, 0]
        first, second = fleet.ledger()["rounds"]
        assert [c["site"] for c in first["contributed"]] == ["a", "b"]
        assert [(m["site"], m["reason"]) for m in first["left_out"]] == [("c", "left")]
        assert [c["site"] for c in second["contributed"]] == ["a", "b", "c"]


def test_a_site_leaves_for_good_and_is_not_waited_for(embedded: BrokerProcess, tmp_path: Path) -> None:
    gate = gated(tmp_path)
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        site, leaver = fleet.site("a"), fleet.site("b", TINY_GATE=str(gate))
        wait_for((gate / "waiting-b-1").exists, "the site trains")
        # Also if it was not running when its operator decided.
        leaver.kill()
        said = command("site", "leave", "--state", fleet.site_state("b"), "--reason", "moved")
        assert "does not run" in said.stdout
        leaver.start()
        assert leaver.wait() == 0
        assert leaver.out.read_text() == "b: has left the run\n"
        # Two sites were asked, one contributed: 0.6 of two is more.
        assert [aggregator.wait(), site.wait()] == [1, 1]
        ledger = fleet.ledger()
        assert ledger["left"] == [{"site": "b", "by": "site", "detail": "moved"}]
        assert ledger["rounds"][0]["left_out"] == [{"site": "b", "reason": "left", "detail": "moved"}]


def test_an_aggregator_that_stays_serves_late_sites_and_leaves_when_told(broker: BrokerProcess, tmp_path: Path) -> None:
    gate = gated(tmp_path)
    with Fleet(broker, tmp_path, config="min_available_sites = 2\nrounds = 1\nquorum = 0.5\ndeadline_s = 2.0") as fleet:
        aggregator = fleet.aggregator("--stay")
        site, late = fleet.site("a"), fleet.site("b", TINY_GATE=str(gate))
        wait_for((gate / "waiting-b-1").exists, "the late site trains")
        late.kill()
        assert site.wait() == 0
        aggregator.wait_for_log("run_over_staying")
        assert [package["site"] for package in fleet.ledger()["packages"]] == ["a"]
        late.start()
        assert late.wait() == 0
        aggregator.wait_for_log("run_over_staying", times=2)
        assert [package["site"] for package in fleet.ledger()["packages"]] == ["a", "b"]
        aggregator.interrupt(signal.SIGTERM)
        assert aggregator.wait() == 0
        aggregator.start()
        aggregator.wait_for_log("run_over_staying", times=3)
        told = command("rounds", "stop", "--state", tmp_path / "aggregator")
        assert told.stdout == "the run is over (done); the aggregator leaves\n"
        assert aggregator.wait() == 0


def test_stop_ends_the_run_visibly(embedded: BrokerProcess, tmp_path: Path) -> None:
    gate = gated(tmp_path)
    with Fleet(embedded, tmp_path) as fleet:
        aggregator, site = fleet.aggregator("--sites", "1"), fleet.site("a", TINY_GATE=str(gate))
        wait_for((gate / "waiting-a-1").exists, "the site trains")
        aggregator.kill()
        said = command("rounds", "stop", "--state", tmp_path / "aggregator", "--reason", "wrong part")
        assert "it will be done when one does" in said.stdout
        aggregator.start()
        assert [aggregator.wait(), site.wait()] == [1, 1]
        assert "stopped by the operator: wrong part" in aggregator.log.splitlines()[-1]
        assert "stopped by the operator: wrong part" in site.log.splitlines()[-1]


def test_rounds_end_early_by_operator_or_convergence(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = "min_available_sites = 1\nrounds = 50\n[convergence]\nmodel_change = 10.0\npatience = 2"
    with Fleet(embedded, tmp_path, config=config) as fleet:
        aggregator, site = fleet.aggregator(), fleet.site("a")
        assert [aggregator.wait(), site.wait()] == [0, 0]
        ledger = fleet.ledger()
        assert (ledger["outcome"], len(ledger["rounds"]), ledger["rounds_planned"]) == ("done", 2, 50)
        assert ledger["rounds_ended_early"]["cause"] == "converged"
        assert "the model changed by" in ledger["rounds_ended_early"]["reason"]
        assert all(0 < entry["model_relative_change"] < 10 for entry in ledger["rounds"])
    gate = gated(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with Fleet(embedded, other, config="min_available_sites = 1\nrounds = 50") as fleet:
        aggregator, site = fleet.aggregator("--new-run"), fleet.site("a", TINY_GATE=str(gate))
        wait_for((gate / "waiting-a-1").exists, "the site trains")
        told = command("rounds", "finish", "--state", other / "aggregator", "--reason", "good enough")
        assert told.stdout == "the rounds end with round 1\n"
        (gate / "go").touch()
        assert [aggregator.wait(), site.wait()] == [0, 0]
        assert fleet.ledger()["rounds_ended_early"] == {
            "cause": "operator",
            "reason": "by the operator: good enough",
        }
        assert len(fleet.ledger()["rounds"]) == 1


def test_operators_commands_name_what_is_wrong(tmp_path: Path) -> None:
    def refused(match: str, *arguments: object) -> None:
        wrong = command(*arguments, "--state", tmp_path)
        assert wrong.returncode == 2
        assert match in wrong.stderr
        assert wrong.stderr.count("\n") == 1

    refused("not a site's state folder", "site", "pause")
    refused("not an aggregator's state folder", "site", "pause", "x")
    refused("not an aggregator's state folder", "rounds", "remove", "x")
    (tmp_path / "install").write_text("x")
    assert command("site", "resume", "--state", tmp_path).stdout == "was not paused\n"
    refused("leave 'x' out", "site", "resume", "x")
    refused("at most 500 characters", "site", "pause", "--reason", "x" * 501)
    (tmp_path / "journal.sqlite").touch()
    refused("say which SITE", "site", "pause")
    refused("the site's own to ask for", "site", "pause", "x", "--release")
