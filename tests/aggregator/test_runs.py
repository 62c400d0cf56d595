"""Whole runs with real processes on real brokers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)


def test_three_sites_two_rounds(broker: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(broker, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "3", "--rounds", "2", "--method", "flame")
        sites = {name: fleet.site(name, "--json") for name in "abc"}
        assert aggregator.wait() == 0
        assert {name: process.wait() for name, process in sites.items()} == {"a": 0, "b": 0, "c": 0}
        ledger = fleet.ledger()
        assert ledger["outcome"] == "done"
        assert ledger["members"] == ["a", "b", "c"]
        assert [len(entry["contributed"]) for entry in ledger["rounds"]] == [3, 3]
        assert [package["site"] for package in ledger["packages"]] == ["a", "b", "c"]
        for name, process in sites.items():
            summary = json.loads(process.out.read_text())
            assert summary["site"] == name
            assert summary["model_sha256"] == ledger["model_sha256"]
            assert summary["summary"] == {"rounds": 2.0, "kind": "tiny"}
            assert Path(summary["package"]).read_bytes().startswith(b"package of " + name.encode())
        assert "global model:" in aggregator.out.read_text()

        # The average, computed anew from what the sites kept.
        model = fleet.model()
        assert hashlib.sha256(model).hexdigest() == ledger["model_sha256"]
        weights = {c["site"]: c["weight"] for c in ledger["rounds"][-1]["contributed"]}
        assert sum(weights.values()) == pytest.approx(1)
        updates = {
            site: safetensors.numpy.load_file(
                next(fleet.site_state(site).glob("runs/*/round-000002")) / "update.safetensors"
            )
            for site in weights
        }
        for tensor, values in safetensors.numpy.load(model).items():
            expected = sum(weights[site] * updates[site][tensor].astype(np.float64) for site in weights)
            np.testing.assert_allclose(
                values, expected, rtol=1e-3 if values.dtype == np.float16 else 1e-6, atol=0.5 * (tensor == "count")
            )

        # A finished run is told again, not begun again.
        aggregator.start()
        assert aggregator.wait() == 0
        assert fleet.model() == model


def test_steps_reach_the_servers_rule(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(
        embedded, tmp_path, config="[learning]\nmethod = 'fednova'\n[learning.training]\nmomentum = 0.0"
    ) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "1")
        sites = {name: fleet.site(name) for name in ("a", "bb")}
        assert aggregator.wait() == 0
        assert [process.wait() for process in sites.values()] == [0, 0]
        ledger = fleet.ledger()
        assert ledger["strategy"] == "fednova"
        contributed = ledger["rounds"][0]["contributed"]
        steps = {c["site"]: c["num_steps"] for c in contributed}
        assert len(set(steps.values())) == 2, "sites of other sizes take other numbers of steps"
        weights = {c["site"]: c["weight"] for c in contributed}
        base, *_ = fleet.site_state("a").glob(f"blobs/{ledger['rounds'][0]['base_sha256']}*")
        before = safetensors.numpy.load_file(base)["weight"].astype(np.float64)
        update = {
            site: safetensors.numpy.load_file(next(fleet.site_state(site).glob("runs/*/round-000001/update.*")))
            for site in steps
        }
        direction = sum(weights[s] * (before - update[s]["weight"]) / steps[s] for s in steps)
        expected = before - sum(weights[s] * steps[s] for s in steps) * direction
        np.testing.assert_allclose(safetensors.numpy.load(fleet.model())["weight"], expected, rtol=1e-5, atol=1e-6)


def test_one_bad_site_does_not_end_the_run(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path, config="min_available_sites = 4\nquorum = 0.25") as fleet:
        aggregator = fleet.aggregator()
        fleet.site("good")
        nan = fleet.site("nan", TINY_FAIL="nan:1:nan")
        shape = fleet.site("shape", TINY_FAIL="shape:2:shape")
        data = fleet.site("data", TINY_FAIL="data:1:data")
        assert aggregator.wait() == 0
        assert [nan.wait(), shape.wait(), data.wait()] == [0, 0, 3]
        assert data.log.rstrip().splitlines()[-1] == "edgeflame: the images are gone"
        first, second = fleet.ledger()["rounds"]
        assert [c["site"] for c in first["contributed"]] == ["good", "shape"]
        assert {m["site"]: m["reason"] for m in first["left_out"]} == {"nan": "not_finite", "data": "failed"}
        assert [c["site"] for c in second["contributed"]] == ["good", "nan"]
        assert {m["site"]: m["reason"] for m in second["left_out"]} == {"shape": "schema"}
        assert "reason=not_finite" in nan.log
        # What a refused training left for the next round does not count either.
        kept = {site: {p.name for p in fleet.site_state(site).glob("runs/*/private-*")} for site in ("good", "nan")}
        assert kept["good"] == {"private-000001.safetensors", "private-000002.safetensors"}
        assert kept["nan"] == {"private-000002.safetensors"}


def test_a_missed_quorum_fails_visibly(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path, config="min_available_sites = 2\nquorum = 1.0") as fleet:
        aggregator = fleet.aggregator()
        good, bad = fleet.site("good"), fleet.site("bad", TINY_FAIL="bad:2:nan")
        assert [aggregator.wait(), good.wait(), bad.wait()] == [1, 1, 1]
        assert "quorum missed in round 2: 1 of 2 sites contributed, 2 needed" in aggregator.log.splitlines()[-1]
        assert "quorum missed" in good.log.splitlines()[-1]
        assert fleet.ledger()["outcome"] == "failed"


def test_a_silent_site_is_left_out_and_a_late_one_taken_in(embedded: BrokerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    # The deadline leaves the late one time to start, also on a busy machine.
    with Fleet(embedded, tmp_path, config="min_available_sites = 3\ndeadline_s = 7") as fleet:
        aggregator = fleet.aggregator()
        fleet.site("a")
        fleet.site("b")
        stuck = fleet.site("stuck", TINY_GATE=str(gate))
        wait_for((gate / "waiting-stuck-1").exists, "the stuck site trains")
        late = fleet.site("late")
        aggregator.wait_for_log("round_closed")
        # Left out, it drops what it did, and makes its package from the final model like the others.
        assert [aggregator.wait(), stuck.wait(), late.wait()] == [0, 0, 0]
        first, second = fleet.ledger()["rounds"]
        assert [c["site"] for c in first["contributed"]] == ["a", "b"]
        assert [(m["site"], m["reason"]) for m in first["left_out"]] == [("stuck", "no progress until the deadline")]
        assert {c["site"] for c in second["contributed"]} >= {"a", "b", "late"}
        assert (tmp_path / "stuck.edgeflame").exists()


def test_a_second_site_of_the_same_name_is_refused_and_the_first_undisturbed(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    with Fleet(broker, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "1", "--rounds", "1")
        first = fleet.site("a", TINY_GATE=str(gate))
        wait_for((gate / "waiting-a-1").exists, "the first trains")
        second = fleet.site("a", process="second")
        assert second.wait() == 8
        last_line = second.log.rstrip().splitlines()[-1]
        assert last_line.startswith("edgeflame: another site named 'a' is connected")
        assert "Traceback" not in second.log
        (gate / "go").touch()
        assert [aggregator.wait(), first.wait()] == [0, 0]
        assert first.log.count("broker_lost") == 0


def test_two_processes_of_one_state_directory_are_refused(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator, site = fleet.aggregator(), fleet.site("a")
        aggregator.wait_for_log("broker_connected")
        site.wait_for_log("waiting")
        other_aggregator = fleet.aggregator("--state", str(tmp_path / "aggregator"), name="other-aggregator")
        other_site = fleet.site("b", state="state-a")
        assert [other_aggregator.wait(), other_site.wait()] == [10, 10]
        assert "the state directory is in use by another process" in other_site.log
        assert "the state directory is in use by another process" in other_aggregator.log


def test_a_broker_that_is_not_there_is_one_line_and_an_exit_code(embedded: BrokerProcess, tmp_path: Path) -> None:
    embedded.kill()
    with Fleet(embedded, tmp_path) as fleet:
        processes = [fleet.aggregator("--connect-timeout", "0.5"), fleet.site("a", "--connect-timeout", "0.5")]
        for process in processes:
            assert process.wait() == 7
            assert "broker_unreachable" in process.log
            assert embedded.url in process.log.rstrip().splitlines()[-1]
            assert "Traceback" not in process.log


def test_an_unfinished_run_is_not_continued_with_another_configuration(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        first = fleet.aggregator("--rounds", "3")
        first.wait_for_log("broker_connected")
        first.kill()
        second = fleet.aggregator("--rounds", "4")
        assert second.wait() == 5
        assert "unfinished run with another configuration (rounds)" in second.log


def test_a_worker_that_dies_is_restarted(embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        crashing = fleet.site("a", TINY_FAIL="a:1:crash-once")
        fleet.site("b")
        assert [aggregator.wait(), crashing.wait()] == [0, 0]
        assert crashing.log.count("worker_died") == 1
        assert fleet.model() == undisturbed_model


def test_a_worker_that_always_dies_is_given_up(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path) as fleet:
        aggregator = fleet.aggregator("--sites", "1", "--rounds", "1")
        site = fleet.site("a", TINY_FAIL="a:1:crash")
        assert [aggregator.wait(), site.wait()] == [1, 8]
        assert site.log.count("worker_died") == 3
        assert "the worker process died 3 times" in site.log.rstrip().splitlines()[-1]


def test_ctrl_c_ends_both_at_once(embedded: BrokerProcess, tmp_path: Path) -> None:
    import signal

    with Fleet(embedded, tmp_path) as fleet:
        processes = [fleet.aggregator(), fleet.site("a")]
        processes[0].wait_for_log("site_joined")
        for process in processes:
            process.interrupt(signal.SIGINT)
        assert [process.wait() for process in processes] == [130, 130]
        assert all("Traceback" not in process.log for process in processes)
