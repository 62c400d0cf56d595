"""FedDyMem at the aggregator: checks, k-means, and whole runs in which memories travel."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.config import AggregateConfig
from aggregator.exchanges import MEMORY
from aggregator.journal import Journal
from aggregator.run import aggregate_updates, open_run
from aggregator.strategies.interface import Contribution
from aggregator.strategies.memory import PRIOR_PATCHES, kmeans_labels
from edgeflame.errors import ConfigError, MissingDependencyError
from edgeflame.methods import Learning, Memory
from edgeflame.mqtt.messages import Refusal
from edgeflame.statistics.memory import MemoryBank, empty_bank, read_bank, write_bank
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.round_driver import Driver, sha

WORKER = shlex.join([sys.executable, str(REPOSITORY / "tests" / "support" / "tiny_memory_trainer.py")])
SPACE = "a" * 64
CONFIG = AggregateConfig(
    learning=Learning(
        method="feddymem", memory=Memory(prototypes=8, global_prototypes=5, min_group=30, min_images=3, ridge=1e-6)
    )
)


def bank(size: int = 8, seed: int = 0, **changes: object) -> MemoryBank:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1, size)
    made = MemoryBank(
        prototypes=rng.normal(size=(size, 3)).astype(np.float32),
        weights=(weights / weights.sum()).astype(np.float32),
        effective_patches=np.full(size, 40, np.float32),
        effective_images=np.full(size, 4, np.float32),
        count=20,
        space=SPACE,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def written(path: Path, memory: MemoryBank) -> Path:
    write_bank(path, memory)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base", empty_bank(3, SPACE))


@pytest.mark.parametrize(
    ("changes", "samples", "reason"),
    [
        ({}, 20, None),
        ({"space": "b" * 64}, 20, "space"),
        ({}, 21, "samples"),
        ({"effective_patches": np.full(8, 29, np.float32)}, 20, "floor"),
        ({"effective_images": np.full(8, 2.9, np.float32)}, 20, "floor"),
        ({"prototypes": np.zeros((8, 4), np.float32)}, 20, "schema"),
    ],
)
def test_what_a_site_sends_is_checked(
    changes: dict[str, object], samples: int, reason: str | None, base: Path, tmp_path: Path
) -> None:
    update = written(tmp_path / "update", bank(**changes))
    assert MEMORY.validate_update(update, base, bounds=CONFIG, num_samples=samples).reason == reason


def test_more_prototypes_than_asked_for_and_far_ones_are_refused(base: Path, tmp_path: Path) -> None:
    update = written(tmp_path / "update", bank(9))
    assert MEMORY.validate_update(update, base, bounds=CONFIG, num_samples=20).reason == "schema"
    fleet = written(tmp_path / "fleet", bank(seed=1))
    far = written(tmp_path / "far", bank(prototypes=np.full((8, 3), 100, np.float32)))
    assert MEMORY.validate_update(far, fleet, bounds=CONFIG, num_samples=20).reason == "norm"
    assert (
        MEMORY.validate_update(written(tmp_path / "near", bank()), fleet, bounds=CONFIG, num_samples=20).reason is None
    )
    (tmp_path / "bytes").write_bytes(b"no bank")
    assert MEMORY.validate_update(tmp_path / "bytes", base, bounds=CONFIG, num_samples=20).reason == "not_tensors"


def test_a_run_starts_from_an_empty_memory(base: Path, tmp_path: Path) -> None:
    assert MEMORY.validate_initial(base).reason is None
    assert MEMORY.validate_initial(written(tmp_path / "full", bank())).reason == "schema"


def contributions(folder: Path, seeds: list[int]) -> list[Contribution]:
    return [
        Contribution(site=f"s{seed}", path=written(folder / f"s{seed}", bank(seed=seed)), weight=1 / len(seeds))
        for seed in seeds
    ]


def test_the_fleets_memory_is_the_weighted_k_means_of_the_sites(base: Path, tmp_path: Path) -> None:
    parts = contributions(tmp_path, [1, 2, 3])
    aggregate_updates(CONFIG, base, parts, tmp_path / "one", num_members=3)
    aggregate_updates(CONFIG, base, reversed(parts), tmp_path / "two", num_members=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    fleet, banks = read_bank(tmp_path / "one"), [bank(seed=seed) for seed in (1, 2, 3)]
    assert (len(fleet), fleet.count, fleet.space) == (5, 60, SPACE)
    assert fleet.weights.sum() == pytest.approx(1, abs=1e-6)
    # The weighted mean stays, and every prototype is its cluster's: no other is nearer to what went into it, after
    # whitening by the covariance of all.
    everything = np.concatenate([one.prototypes for one in banks])
    shares = np.concatenate([one.weights / 3 for one in banks])
    np.testing.assert_allclose(fleet.weights @ fleet.prototypes, shares @ everything, atol=1e-5)
    root = np.linalg.cholesky(np.linalg.inv(np.cov(everything.T, aweights=shares, ddof=0) + 1e-9 * np.eye(3)))
    nearest = np.square((everything[:, None] - fleet.prototypes) @ root).sum(axis=2).argmin(axis=1)
    for index, prototype in enumerate(fleet.prototypes):
        members = nearest == index
        np.testing.assert_allclose(prototype, shares[members] @ everything[members] / shares[members].sum(), atol=1e-4)
    assert fleet.effective_patches.min() >= 40 * (1 - 1e-6)
    assert fleet.effective_images.min() >= 4 * (1 - 1e-6)
    # The change from an empty base is unknown; from itself none.
    assert MEMORY.relative_change(base, tmp_path / "one") is None
    assert MEMORY.relative_change(tmp_path / "one", tmp_path / "two") == pytest.approx(0, abs=1e-6)


def test_few_prototypes_are_kept_as_they_are() -> None:
    labels = kmeans_labels(np.eye(3), np.ones(3), 5, seed=0, ridge=0.1, places=np.zeros((3, 0)))
    assert labels.tolist() == [0, 1, 2]


def test_prototypes_alike_in_other_places_stay_apart_and_places_are_averaged() -> None:
    alike, corners = np.zeros((4, 3)), np.array([[0.1, 0.1], [0.1, 0.2], [0.9, 0.9], [0.9, 0.8]])
    labels = kmeans_labels(alike, np.ones(4), 2, seed=0, ridge=0.1, places=10 * corners)
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_places_and_spreads_are_pooled_where_all_sites_send_them(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    carried = {"places": rng.uniform(size=(8, 2)).astype(np.float32), "spreads": np.full(8, 1.5, np.float32)}
    memory = msgspec.structs.replace(CONFIG.learning.memory, position_weight=4.0)
    config = AggregateConfig(learning=msgspec.structs.replace(CONFIG.learning, memory=memory))
    parts = contributions(tmp_path, [1, 2])
    for part in parts:
        write_bank(part.path, replace(read_bank(part.path), **carried))
        assert MEMORY.validate_update(part.path, base, bounds=config, num_samples=20).reason is None
    aggregate_updates(config, base, parts, tmp_path / "placed", num_members=2)
    fleet = read_bank(tmp_path / "placed")
    assert fleet.places is not None
    assert fleet.spreads is not None
    np.testing.assert_allclose(fleet.spreads, 1.5, rtol=1e-6)
    weights = sum(read_bank(part.path).weights for part in parts) / 2
    np.testing.assert_allclose(fleet.weights @ fleet.places, weights @ carried["places"], atol=1e-5)
    # One of an earlier version among them sends none.
    write_bank(parts[0].path, bank(seed=1))
    aggregate_updates(config, base, parts, tmp_path / "plain", num_members=2)
    assert read_bank(tmp_path / "plain").places is None


def test_spreads_are_those_that_all_sites_measured(base: Path, tmp_path: Path) -> None:
    settings = {"position_weight": 4.0, "measure_spreads": True, "global_prototypes": 16}
    memory = msgspec.structs.replace(CONFIG.learning.memory, **settings)
    config = AggregateConfig(learning=msgspec.structs.replace(CONFIG.learning, memory=memory))
    carried = {"places": np.full((8, 2), 0.5, np.float32), "spreads": np.ones(8, np.float32)}
    parts = contributions(tmp_path, [1, 2])

    def send(**measured: np.ndarray) -> None:
        for part in parts:
            write_bank(part.path, replace(bank(seed=int(part.site[1:])), **carried, measured=measured[part.site]))

    nothing = np.zeros((0, 2), np.float32)
    send(s1=nothing, s2=nothing)
    aggregate_updates(config, base, parts, tmp_path / "first", num_members=2)
    first = read_bank(tmp_path / "first")
    assert first.measured is not None
    assert first.measured.tolist() == [[0, 1]] * 16
    # The sites send the same again, so each prototype of the second round is one of the first.
    one, two = (np.tile(np.float32([patches, spread]), (16, 1)) for patches, spread in ((1000, 2.0), (10, 5.0)))
    one[3] = two[3] = (0, 1)
    send(s1=one, s2=two)
    for part in parts:
        assert MEMORY.validate_update(part.path, tmp_path / "first", bounds=config, num_samples=20).reason is None
    aggregate_updates(config, tmp_path / "first", parts, tmp_path / "second", num_members=2)
    second = read_bank(tmp_path / "second")
    assert second.measured is not None
    # Sites count by their share of the round, not by how many patches they say; what nobody measured stays.
    expected = np.full(16, (1010 * 3.5 + PRIOR_PATCHES) / (1010 + PRIOR_PATCHES))
    expected[3] = 1
    np.testing.assert_allclose(second.spreads, expected, rtol=1e-5)
    np.testing.assert_allclose(second.measured[:, 0], np.where(np.arange(16) == 3, 0, 1010))
    # One that measured another memory is refused; with one of an earlier version among them nothing is measured.
    send(s1=one[:4], s2=two)
    refused = MEMORY.validate_update(parts[0].path, tmp_path / "first", bounds=config, num_samples=20)
    assert (refused.reason, "4 prototypes" in str(refused.detail)) == ("schema", True)
    write_bank(parts[0].path, replace(bank(seed=1), **carried))
    aggregate_updates(config, tmp_path / "first", parts, tmp_path / "mixed", num_members=2)
    np.testing.assert_allclose(read_bank(tmp_path / "mixed").spreads, 1)


def test_without_scikit_learn_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with Journal(tmp_path / "journal.sqlite") as journal:
        with pytest.raises(MissingDependencyError, match=r"pip install 'edgeflame\[memory\]'"):
            open_run(journal, CONFIG)
        assert journal.last_run() is None
        open_run(journal, AggregateConfig())


def test_a_memory_is_pooled_already() -> None:
    with pytest.raises(ConfigError, match="pools a memory already"):
        AggregateConfig(statistics="federated", learning=Learning(method="feddymem"))
    with pytest.raises(ConfigError, match="kmeans aggregates memory, but the sites of method flame send weights"):
        AggregateConfig(strategy="kmeans", learning=Learning(method="flame"))


def test_a_memory_may_be_larger_than_the_empty_one_it_starts_from() -> None:
    run = Driver(sites=2, rounds=1, learning=CONFIG.learning)
    run.start("a", "b")
    limit = 8 * 4 * ((1 << 14) + 6) + (64 << 10)
    refused = run.deliver("a", run.offer("update", 1, sha(7), size=limit + 1))
    assert isinstance(refused, Refusal)
    assert refused.reason == "too_large"
    assert not isinstance(run.deliver("b", run.offer("update", 1, sha(8), size=limit)), Refusal)


RUN = """
min_available_sites = 3
rounds = 2
quorum = 0.5
[learning]
method = "feddymem"
[learning.memory]
global_prototypes = 8
"""


@pytest.mark.timeout(90)
def test_three_sites_share_their_memories(embedded: BrokerProcess, tmp_path: Path) -> None:
    models = []
    for disturbed in (False, True):
        folder = tmp_path / str(disturbed)
        folder.mkdir()
        with Fleet(embedded, folder, config=RUN) as fleet:
            aggregator = fleet.aggregator()
            sites = [fleet.site(name, "--worker", WORKER) for name in "abc"]
            if disturbed:
                # Two of them have trained, and one restarts from what it keeps to itself.
                aggregator.wait_for_log("round_started round=2")
                for process in (aggregator, sites[0]):
                    process.kill()
                for process in (aggregator, sites[0]):
                    process.start()
            assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0, 0]
            ledger = fleet.ledger()
            assert (ledger["method"], ledger["outcome"]) == ("feddymem", "done")
            assert [len(entry["contributed"]) for entry in ledger["rounds"]] == [3, 3]
            models.append(fleet.model())
    assert models[0] == models[1]
    assert hashlib.sha256(models[0]).hexdigest() == ledger["model_sha256"]
    fleet_memory = read_bank(tmp_path / "True" / "aggregator" / "global-model.safetensors")
    assert len(fleet_memory) == 8


@pytest.mark.timeout(90)
def test_what_is_below_the_floor_or_of_another_backbone_is_refused(embedded: BrokerProcess, tmp_path: Path) -> None:
    with Fleet(embedded, tmp_path, config=RUN.replace("rounds = 2", "rounds = 1").replace("0.5", "0.3")) as fleet:
        aggregator = fleet.aggregator()
        fleet.site("good", "--worker", WORKER)
        floor = fleet.site("floor", "--worker", WORKER, TINY_FAIL="floor:1:floor")
        fleet.site("space", "--worker", WORKER, TINY_FAIL="space:1:space")
        assert [aggregator.wait(), floor.wait()] == [0, 0]
        entry = fleet.ledger()["rounds"][0]
        assert [part["site"] for part in entry["contributed"]] == ["good"]
        assert {part["site"]: part["reason"] for part in entry["left_out"]} == {"floor": "floor", "space": "space"}
        assert "the privacy floor is 32" in floor.log
