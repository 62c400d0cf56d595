"""Simulated fleets: the same bits as over MQTT, after being killed, and on every engine; what is written down."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aggregator.run import RunResult
from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.engines import open_simulation_engine
from aggregator.simulation.run import simulate
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, DataError, StorageError
from edgeflame.images import Preprocessing
from edgeflame.log import no_progress
from edgeflame.methods import Learning, resized_as_begun
from tests.support import tiny_simulation
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for

FLEET = "rounds = 3\nsampling = 0.5\nseed = 4\nquorum = 0.5\n"
LEARNING = 'method = "flame"\nseed = 3\n'


def toml(*, sites: int = 4, fleet: str = FLEET, engine: str = "", top: str = "") -> str:
    boards = (
        'kind = "boards"\ntrain_parts = 20\ntest_good_parts = 1\ntest_defective_parts = 5\nphotos = 1\nimage_size = 64'
    )
    return (
        f"sites = {sites}\n{top}\n[data]\n{boards}\n[partition]\nmin_groups = 1\n"
        f"[fleet]\n{fleet}\n[fleet.learning]\n{LEARNING}\n[engine]\n{engine}\n"
    )  # fmt: skip


def run(text: str, out: Path) -> RunResult:
    """In this process."""
    return run_config(parse_config(text.encode(), SimulationConfig, "test"), out)


def run_config(config: SimulationConfig, out: Path) -> RunResult:
    with open_simulation_engine(config.engine, tiny_simulation.handle) as engine:
        return simulate(config, out, engine, no_progress)


def spawn(text: str, out: Path, **env: str) -> subprocess.Popen[bytes]:
    """In a process that can be killed."""
    config = out.with_suffix(".toml")
    config.write_text(text)
    program = "from tests.support import tiny_simulation; tiny_simulation.main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(config), str(out)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
    )


def results(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """Model, figures, and the ledger without what differs from run to run."""
    ledger = json.loads((out / "ledger.json").read_bytes())
    del ledger["run"], ledger["started"]
    return (out / "global-model.safetensors").read_bytes(), (out / "metrics.json").read_bytes(), ledger


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(toml(), out).succeeded
    return results(out)


def test_everything_is_written_down(undisturbed: tuple[bytes, bytes, dict[str, Any]], tmp_path: Path) -> None:
    _, figures, ledger = undisturbed
    metrics = json.loads(figures)
    assert [one["round"] for one in metrics["rounds"]] == [0, 1, 2, 3]
    assert len({one["figures"]["image_AUROC"] for one in metrics["rounds"]}) == 4
    assert list(metrics["sites"]) == ledger["members"] == ["site-0", "site-1", "site-2", "site-3"]
    assert [len(entry["asked"]) for entry in ledger["rounds"]] == [2, 2, 2]
    assert ledger["outcome"] == "done"
    run(toml(), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "simulation.json").read_bytes())
    assert record["config"]["fleet"]["seed"] == 4
    dealt = [group for site in record["sites"] for group in site["groups"]]
    assert len(dealt) == len(set(dealt)) == 20
    for site in record["sites"]:
        files = list((tmp_path / "out" / site["data"] / "train" / "good").iterdir())
        assert len(files) == site["num_images"] == len(site["groups"])


def test_the_same_bits_as_over_mqtt(tmp_path: Path) -> None:
    run(toml(sites=2), tmp_path / "simulated")
    with BrokerProcess("embedded", tmp_path) as broker:
        config = f"{FLEET}\n[learning]\n{LEARNING}"
        with Fleet(broker, tmp_path, config=config) as fleet:
            aggregator = fleet.aggregator("--sites", "2")
            sites = [fleet.site(f"site-{number}") for number in range(2)]
            assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
            assert fleet.model() == results(tmp_path / "simulated")[0]


@pytest.mark.parametrize("gate", ["site-0-1", "site-3-3"])
def test_killed_and_continued_to_the_same_bits(
    gate: str, tmp_path: Path, undisturbed: tuple[bytes, bytes, dict[str, Any]]
) -> None:
    asked = {f"{site}-{entry['round']}" for entry in undisturbed[2]["rounds"] for site in entry["asked"]}
    gate = gate if gate in asked else min(name for name in asked if name.endswith(gate[-1]))
    gates, out = tmp_path / "gates", tmp_path / "out"
    gates.mkdir()
    process = spawn(toml(), out, TINY_GATE=str(gates))
    # Every training waits at a gate of its own; all are open but the one to be killed at.
    for name in asked - {gate}:
        (gates / f"go-{name}").touch()
    wait_for(lambda: (gates / f"waiting-{gate}").exists() or process.poll() is not None, "the site trains")
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    assert spawn(toml(), out).wait() == 0
    assert results(out) == undisturbed


def test_worker_processes_give_the_same_bits(tmp_path: Path, undisturbed: tuple[bytes, bytes, dict[str, Any]]) -> None:
    assert spawn(toml(engine="workers = 2"), tmp_path / "out").wait() == 0
    assert results(tmp_path / "out") == undisturbed


def test_ray_gives_the_same_bits(tmp_path: Path, undisturbed: tuple[bytes, bytes, dict[str, Any]]) -> None:
    pytest.importorskip("ray")
    assert spawn(toml(engine='kind = "ray"\nworkers = 2'), tmp_path / "out").wait() == 0
    assert results(tmp_path / "out") == undisturbed


def test_sites_that_learn_alone(tmp_path: Path) -> None:
    result = run(toml(top='alone = "solo"'), tmp_path)
    assert result.succeeded
    metrics = json.loads((tmp_path / "metrics.json").read_bytes())
    assert metrics["rounds"] == []
    figures = [site["figures"] for site in metrics["sites"].values()]
    assert [one["num_epochs"] for one in figures] == [3.0] * 4
    assert len({one["image_AUROC"] for one in figures}) == 4


def test_a_run_that_is_over_is_left_as_it_is(tmp_path: Path) -> None:
    run(toml(sites=2), tmp_path)
    before = results(tmp_path)
    run(toml(sites=2, engine="threads = 2"), tmp_path)
    assert results(tmp_path) == before


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run(toml(sites=2), tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration \(seed, sites\)"):
        run(toml(sites=3, top="seed = 9"), tmp_path)
    (tmp_path / "simulation.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        run(toml(sites=2), tmp_path)


def test_one_that_was_begun_before_images_were_halved_goes_on_by_area(tmp_path: Path) -> None:
    text = toml(sites=2, top='alone = "solo"')
    now = parse_config(text.encode(), SimulationConfig, "test")
    assert now.fleet.learning.input.resize == "halving"
    learning = resized_as_begun(now.fleet.learning, Learning())
    assert learning.input == Preprocessing()
    run_config(replace(now, fleet=replace(now.fleet, learning=learning)), tmp_path)
    (tmp_path / "metrics.json").unlink()
    run(text, tmp_path)
    record = json.loads((tmp_path / "simulation.json").read_bytes())
    assert "resize" not in record["config"]["fleet"]["learning"]["input"]
    assert len(json.loads((tmp_path / "metrics.json").read_bytes())["sites"]) == 2


def test_a_failing_site_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_FAIL", "site-1:1:nan")
    assert run(toml(sites=3, fleet="rounds = 2"), tmp_path / "a").succeeded
    ledger = results(tmp_path / "a")[2]
    assert [one["reason"] for one in ledger["rounds"][0]["left_out"]] == ["not_finite"]
    assert [site["site"] for site in ledger["rounds"][1]["contributed"]] == ["site-0", "site-1", "site-2"]
    monkeypatch.setenv("TINY_FAIL", "site-1:1:data")
    result = run(toml(sites=3, fleet="rounds = 2\nquorum = 1.0"), tmp_path / "b")
    assert not result.succeeded
    assert result.reason == "quorum missed in round 1: 2 of 3 sites contributed, 3 needed"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (toml().replace("[fleet]", "[fleets]"), ConfigError, r"unknown key \[fleets\]; did you mean `fleet`"),
        (toml(sites=0), ConfigError, "sites must be 1"),
        (toml(sites=30), ConfigError, "30 sites of at least 1 parts need 30, there are 20"),
        (toml(fleet='expected_sites = ["a"]'), ConfigError, "expected_sites follows from sites"),
        (toml(top='alone = "flame"'), ConfigError, "alone: one of none, fade, solo"),
        (toml(engine='address = "auto"'), ConfigError, "for ray only"),
        (toml().replace("train_parts = 20", "train_parts = 0"), ConfigError, "train_parts must be 1..1e9"),
        (toml().replace('"boards"', '"folder"'), ConfigError, "data"),
        ('[data]\nkind = "folder"\npath = "/no/such"', DataError, "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(text, tmp_path)


TORCH = """
sites = 2
cameras = "own"
[data]
kind = "boards"
textures = ["warm_white_grid", "warm_wood"]
train_parts = 8
test_good_parts = 2
test_defective_parts = 5
photos = 1
image_size = 64
[partition]
category_beta = 0.5
[evaluation]
every = 0
[fleet]
rounds = 2
"""
LEARNING_WITH_TORCH = """
method = "flame"
backbone = { name = "test_efficientnet", stages = [1, 2], weights = "random" }
input = { height = 64, width = 64 }
training = { learning_rate = 1e-2 }
scoring = { rank = 4, ridge = 0.1 }
"""


@pytest.mark.timeout(240)
def test_training_gives_the_same_bits_simulated_and_over_mqtt(tmp_path: Path) -> None:
    """The command, real images from cameras of their own, and the real worker processes."""
    config, out = tmp_path / "simulation.toml", tmp_path / "out"
    config.write_text(f"{TORCH}[fleet.learning]{LEARNING_WITH_TORCH}")
    done = subprocess.run(
        [sys.executable, "-m", "edgeflame", "simulate", "--config", str(config), "--out", str(out), "--json"],
        capture_output=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    metrics = json.loads(done.stdout)
    assert [one["round"] for one in metrics["rounds"]] == [2]
    assert 0 <= metrics["rounds"][0]["figures"]["image_AUROC"] <= 1
    assert set(metrics["sites"]) == {"site-0", "site-1"}
    with BrokerProcess("embedded", tmp_path) as broker:
        fleet_config = f"rounds = 2\n[learning]{LEARNING_WITH_TORCH}"
        with Fleet(broker, tmp_path, config=fleet_config) as fleet:
            aggregator = fleet.aggregator("--sites", "2")
            folders = {site: str(out / "data" / "sites" / site) for site in ("site-0", "site-1")}
            for site, folder in folders.items():
                fleet.site(site, "--data", folder, "--worker", "")
            # Statistics and packages follow; here it is the model that counts, by its hash.
            for number in (1, 2):
                aggregator.wait_for_log(f"model_made round={number} sha256=")
            final = hashlib.sha256((out / "global-model.safetensors").read_bytes()).hexdigest()
            assert f"model_made round=2 sha256={final[:12]}" in aggregator.log
