"""Runs whose updates travel encoded: real processes, real brokers, kills."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aggregator.config import AggregateConfig
from edgeflame.errors import ConfigError
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)


def test_updates_sent_without_loss_give_the_model_of_raw_ones(
    embedded: BrokerProcess, tmp_path: Path, undisturbed_model: bytes
) -> None:
    with Fleet(embedded, tmp_path, config='compression = "zstd"\n') as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
        assert fleet.model() == undisturbed_model
        for entry in fleet.ledger()["rounds"]:
            for part in entry["contributed"]:
                folder = next(fleet.site_state(part["site"]).glob(f"runs/*/round-{entry['round']:06}"))
                hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in
                          ("update.encoded", "update.safetensors")]  # fmt: skip
                assert [part["sha256"], part["decoded_sha256"]] == hashes, "the receipt names what was sent"
                assert part["metrics"]["codec_error"] == 0


def lossy_run(broker: BrokerProcess, folder: Path, *, kill: bool) -> tuple[bytes, list[float]]:
    folder.mkdir()
    gate = folder / "gate"
    gate.mkdir()
    with Fleet(broker, folder, config='compression = "float16_zstd"\n') as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        first, second = fleet.site("a"), fleet.site("b", TINY_GATE=str(gate))
        if kill:
            aggregator.wait_for_log("update_accepted round=1 site=a")
            aggregator.kill()
            wait_for((gate / "waiting-b-1").exists, "the second site trains")
            second.kill()
        (gate / "go").touch()
        if kill:
            aggregator.start()
            second.start()
        assert [process.wait() for process in (aggregator, first, second)] == [0, 0, 0]
        parts = [part for entry in fleet.ledger()["rounds"] for part in entry["contributed"]]
        return fleet.model(), [part["metrics"]["codec_error"] for part in parts]


def test_encoded_updates_survive_kills_to_the_same_bits(broker: BrokerProcess, tmp_path: Path) -> None:
    undisturbed = lossy_run(broker, tmp_path / "1", kill=False)
    assert all(0 < error < 1e-2 for error in undisturbed[1])
    assert lossy_run(broker, tmp_path / "2", kill=True) == undisturbed


def test_an_update_that_cannot_be_encoded_is_refused_for_what_it_is(embedded: BrokerProcess, tmp_path: Path) -> None:
    config = 'compression = "float16"\nquorum = 0.5\n'
    with Fleet(embedded, tmp_path, config=config, env={"TINY_FAIL": "b:1:nan"}) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "1")
        sites = [fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
        (entry,) = fleet.ledger()["rounds"]
        assert [(out["site"], out["reason"]) for out in entry["left_out"]] == [("b", "not_finite")]


def test_a_codec_that_is_not_there_is_refused_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.config.has_zstd", lambda: False)
    AggregateConfig(compression="float16")
    with pytest.raises(ConfigError, match=r"zstandard here \(pip install 'edgeflame\[zstd\]'\).*not zstd"):
        AggregateConfig(compression="zstd")
