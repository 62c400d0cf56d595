"""Statistics of the fleet: the phase of a run in which they are gathered and pooled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.config import AggregateConfig
from aggregator.events import apply_event, initial_state
from aggregator.exchanges import ValidationResult
from aggregator.ledger import build_ledger
from aggregator.outputs import AggregateRound, PublishState
from aggregator.rounds import RoundMachine
from aggregator.validation import validate_statistics
from edgeflame.config import load_config
from edgeflame.errors import ConfigError
from edgeflame.methods import Learning, Training
from edgeflame.mqtt.messages import Receipt, Refusal, TaskFailed
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.statistics.shared import StatisticsFile, read_moments, write_site_statistics
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.round_driver import DEADLINE_S, RUN, Driver, sha
from tests.support.tiny_trainer import images_of


def trained(**more: object) -> Driver:
    """A run of three sites whose only round is over."""
    run = Driver(rounds=1, statistics="federated", **more)
    run.start("a", "b", "c")
    for site in "abc":
        assert isinstance(run.update(site, 1), Receipt)
    assert run.state.phase == "statistics"
    return run


def statistics(run: Driver, site: str, verdict: ValidationResult | None = None, **more: int) -> Receipt | Refusal:
    return run.deliver(site, run.offer("statistics", 0, sha(next(run.counter)), **more), verdict)


def test_statistics_are_gathered_after_the_last_round_and_then_handed_out() -> None:
    run = trained()
    model = run.state.model
    for site in "cab":
        assert isinstance(statistics(run, site), Receipt)
    assert run.state.phase == "finish"
    assert run.state.statistics is not None
    assert run.state.servable_blobs == {model, run.state.statistics.result_sha256}
    assert build_ledger(run.state)["statistics"]["truncation_error"] == {"measured_max": 0.25}
    run.finish("a", "b", "c")
    assert run.state.phase == "done"
    # The journal alone gives the same state.
    assert run.facts[0].config == run.state.config  # type: ignore[union-attr]
    state = initial_state(run.facts[0])  # type: ignore[arg-type]
    for fact in run.facts[1:]:
        state = apply_event(state, fact)
    assert state == run.state


def test_what_a_site_sends_too_early_or_twice_is_answered() -> None:
    run = Driver(rounds=1, statistics="federated")
    run.start("a", "b", "c")
    early = statistics(run, "a")
    assert isinstance(early, Refusal)
    assert (early.reason, early.detail) == ("stale_round", "the statistics phase has not begun")
    for site in "abc":
        run.update(site, 1)
    offer = run.offer("statistics", 0, sha(70))
    assert isinstance(run.deliver("a", offer), Receipt)
    assert isinstance(run.deliver("a", offer), Receipt)
    second = run.deliver("a", run.offer("statistics", 0, sha(71)))
    assert isinstance(second, Refusal)
    assert second.reason == "duplicate"
    late = run.deliver("b", run.offer("update", 1, sha(72)))
    assert isinstance(late, Refusal)


def test_who_cannot_contribute_is_left_out_above_the_quorum_and_the_run_fails_below() -> None:
    run = trained(quorum=0.5)
    refused = statistics(run, "b", ValidationResult(reason="space", detail="of another model"))
    assert isinstance(refused, Refusal)
    assert refused.reason == "space"
    failure = TaskFailed(run=RUN, purpose="statistics", round=0, detail="no images left")
    run.take(run.machine.task_failed("c", failure, 0.0))
    assert run.state.phase == "statistics"
    statistics(run, "a")
    assert run.state.ended is not None
    assert run.state.ended.reason == ("quorum missed in the statistics phase: 1 of 3 sites contributed, 2 needed")

    run = trained(quorum=0.5)
    for site in "ab":
        statistics(run, site)
    run.take(run.machine.tick(DEADLINE_S + 1))
    assert run.state.phase == "finish"
    left_out = build_ledger(run.state)["statistics"]["left_out"]
    assert [(entry["site"], entry["reason"]) for entry in left_out] == [("c", "no progress until the deadline")]


def test_a_restarted_machine_pools_what_was_gathered() -> None:
    run = trained(quorum=1.0)
    for site in "ab":
        statistics(run, site)
    state = run.state
    checked = run.machine.upload_validated("c", run.offer("statistics", 0, sha(80)), ValidationResult(), 0.0)
    for output in checked:
        if hasattr(output, "event"):
            state = apply_event(state, output.event)
    outputs = RoundMachine(state, now=0.0).restart(0.0)
    assert [type(output) for output in outputs] == [PublishState, AggregateRound]
    assert outputs[1].round.purpose == "statistics"  # type: ignore[union-attr]


def test_a_rank_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="statistics_rank must be 1"):
        load_config(None, AggregateConfig, {"statistics": "federated", "statistics_rank": 0})


def test_sites_with_batch_norms_of_their_own_share_no_statistics() -> None:
    local = Learning(method="flame", training=Training(batch_norm="local"))
    assert AggregateConfig(learning=local).statistics == "site"
    with pytest.raises(ConfigError, match="need one embedding space"):
        AggregateConfig(statistics="federated", learning=local)


@pytest.mark.parametrize(
    ("sent", "wanted", "detail"),
    [
        (("moments", 0), ("low_rank", 2), "as moments of rank 0; asked for was low_rank of rank 2 at most"),
        (("low_rank", 2), ("moments", 48), "as low_rank of rank 2; asked for was moments"),
        (("low_rank", 3), ("low_rank", 2), "as low_rank of rank 3; asked for was low_rank of rank 2 at most"),
        (("low_rank", 2), ("low_rank", 3), ""),
    ],
)
def test_the_first_statistics_cannot_decide_the_form_of_all_others(
    sent: tuple[Any, int], wanted: tuple[Any, int], detail: str, tmp_path: Path
) -> None:
    accumulator = MomentAccumulator()
    accumulator.add(images_of("a", 30))
    path = tmp_path / "statistics"
    form, rank = sent
    write_site_statistics(path, accumulator.moments(), grid=(2, 3), model=sha(1), form=form, rank=rank)
    config = AggregateConfig(statistics="federated", statistics_form=wanted[0], statistics_rank=wanted[1])
    result = validate_statistics(path, config=config, model=sha(1), num_samples=30, like=None)
    assert result.is_valid == (not detail)
    assert result.detail.removeprefix("statistics ") == detail


@pytest.mark.timeout(90)
@pytest.mark.parametrize("form", ["moments", "low_rank"])
def test_a_fleet_shares_its_statistics(form: str, embedded: BrokerProcess, tmp_path: Path) -> None:
    config = (
        "min_available_sites = 3\nrounds = 1\n"
        f'statistics = "federated"\nstatistics_form = "{form}"\nstatistics_rank = 2'
    )
    with Fleet(embedded, tmp_path, config=config) as fleet:
        aggregator = fleet.aggregator()
        sites = {name: fleet.site(name, "--json") for name in "abc"}
        assert [aggregator.wait(), *(process.wait() for process in sites.values())] == [0, 0, 0, 0]
        entry = fleet.ledger()["statistics"]
        counts = {part["site"]: part["num_samples"] for part in entry["contributed"]}
        assert sorted(counts) == ["a", "b", "c"]
        assert sum(part["weight"] for part in entry["contributed"]) == pytest.approx(1)
        for process in sites.values():
            assert json.loads(process.out.read_text())["summary"]["pooled_images"] == sum(counts.values())

        # Against the statistics of all images in one place.
        accumulator = MomentAccumulator()
        accumulator.add(np.concatenate([images_of(site, count) for site, count in counts.items()]))
        pooled, header = read_moments(fleet.folder / "aggregator" / "blobs" / entry["sha256"])
        assert header.sites == counts
        np.testing.assert_allclose(pooled.mean, accumulator.moments().mean, atol=1e-6)
        expected = accumulator.moments().covariance()
        error = np.linalg.norm(pooled.covariance() - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2))
        truncation = entry["truncation_error"]
        if form == "moments":
            assert error.max() < 1e-6
            assert truncation["bound_max"] == 0
        else:
            assert 0.01 < error.max() <= truncation["measured_max"] + 1e-6 <= truncation["bound_max"] + 2e-6


@pytest.mark.timeout(90)
def test_a_fleet_pools_a_prior(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = 'min_available_sites = 2\nrounds = 1\nstatistics = "prior"\nstatistics_form = "moments"'
    with Fleet(embedded, tmp_path, config=config) as fleet:
        processes = [fleet.aggregator(), fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in processes] == [0, 0, 0]
        entry = fleet.ledger()["statistics"]
        counts = {part["site"]: part["num_samples"] for part in entry["contributed"]}
        pooled, header = read_moments(fleet.folder / "aggregator" / "blobs" / entry["sha256"])
    assert (header.centre, header.sites) == ("site", counts)
    scatter = np.zeros((6, 5, 5))
    for site, count in counts.items():
        accumulator = MomentAccumulator()
        accumulator.add(images_of(site, count))
        scatter += (count - 1) * accumulator.moments().covariance()
    np.testing.assert_allclose(pooled.covariance(), scatter / (sum(counts.values()) - 2), atol=1e-5)


@pytest.mark.timeout(90)
def test_everybody_killed_while_statistics_are_gathered(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = 'min_available_sites = 2\nrounds = 1\nstatistics = "federated"'
    results = []
    for disturbed in (False, True):
        folder = tmp_path / str(disturbed)
        folder.mkdir()
        with Fleet(embedded, folder, config=config) as fleet:
            processes = (fleet.aggregator(), fleet.site("a"), fleet.site("b"))
            aggregator = processes[0]
            if disturbed:
                aggregator.wait_for_log("round_started round=0")
                for process in processes:
                    process.kill()
                for process in processes:
                    process.start()
            assert [process.wait() for process in processes] == [0, 0, 0]
            assert aggregator.log.count("statistics_made") == 1
            blob = folder / "aggregator" / "blobs" / fleet.ledger()["statistics"]["sha256"]
            with StatisticsFile(blob) as file:
                results.append((file.header.sites, fleet.model(), blob.read_bytes()))
    assert results[0] == results[1]


@pytest.mark.timeout(90)
def test_statistics_of_another_model_are_refused_in_words(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = 'min_available_sites = 3\nrounds = 1\nstatistics = "federated"'
    with Fleet(embedded, tmp_path, config=config) as fleet:
        aggregator = fleet.aggregator()
        fleet.site("a")
        fleet.site("b")
        other = fleet.site("other", TINY_FAIL="other:0:other-model")
        assert [aggregator.wait(), other.wait()] == [0, 0]
        entry = fleet.ledger()["statistics"]
        assert [part["site"] for part in entry["contributed"]] == ["a", "b"]
        assert [(part["site"], part["reason"]) for part in entry["left_out"]] == [("other", "space")]
        assert "statistics of the embeddings of model 000000000000; the final model is" in other.log
