"""Heads for marked defects at the aggregator: what is checked, and which rules average them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from aggregator.config import AggregateConfig
from aggregator.exchanges import HEAD
from aggregator.run import aggregate_updates
from aggregator.strategies import STRATEGIES
from aggregator.strategies.interface import Contribution
from edgeflame.errors import ConfigError
from edgeflame.methods import Learning
from fitting.shared_head import SharedHead, initial_head, read_head, write_head

CONFIG = AggregateConfig(learning=Learning(method="feedback"))
CHANNELS = 6


def head(seed: int = 0, **changes: object) -> SharedHead:
    made = initial_head(CHANNELS, space="a" * 64, seed=seed)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_head(tmp_path / "base", head())
    return tmp_path / "base"


def checked(tmp_path: Path, base: Path, update: SharedHead) -> tuple[str | None, str]:
    write_head(tmp_path / "update", update)
    result = HEAD.validate_update(tmp_path / "update", base, num_samples=10, bounds=CONFIG)
    return result.reason, result.detail


def test_what_a_site_sends_is_checked(tmp_path: Path, base: Path) -> None:
    assert HEAD.validate_initial(base).is_valid
    assert checked(tmp_path, base, head(1)) == (None, "")
    reason, detail = checked(tmp_path, base, head(space="b" * 64))
    assert (reason, detail) == (
        "space",
        "a head of the embeddings bbbbbbbbbbbb; this run's are aaaaaaaaaaaa: another backbone?",
    )
    assert checked(tmp_path, base, initial_head(CHANNELS + 1, space="a" * 64, seed=0))[0] == "schema"
    parameters = head().parameters
    assert checked(tmp_path, base, head(parameters=np.full_like(parameters, np.nan)))[0] == "not_finite"
    assert checked(tmp_path, base, head(parameters=parameters * 100))[0] == "norm"
    (tmp_path / "bytes").write_bytes(b"no head")
    assert HEAD.validate_update(tmp_path / "bytes", base, num_samples=10, bounds=CONFIG).reason == "not_tensors"
    safetensors.numpy.save_file({"weights": np.zeros(3, np.float32)}, tmp_path / "other", {"space": "a" * 64})
    assert HEAD.validate_update(tmp_path / "other", base, num_samples=10, bounds=CONFIG).reason == "schema"


@pytest.mark.parametrize("strategy", ["auto", "median", "trimmed_mean", "norm_clipping"])
def test_heads_are_averaged_by_the_runs_rule(tmp_path: Path, base: Path, strategy: str) -> None:
    config = msgspec.structs.replace(CONFIG, strategy=strategy)
    parts = []
    for seed in (1, 2, 3):
        write_head(tmp_path / f"{seed}", head(seed, marked=float(seed == 1)))
        parts.append(Contribution(site=f"s{seed}", path=tmp_path / f"{seed}", weight=1 / 3, relative_change=1.0))
    aggregate_updates(config, base, parts, tmp_path / "one", num_members=3)
    aggregate_updates(config, base, reversed(parts), tmp_path / "two", num_members=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    result = read_head(tmp_path / "one", num_channels=CHANNELS)
    assert result.space == "a" * 64
    updates = np.stack([head(seed).parameters for seed in (1, 2, 3)])
    # With three sites, one is cut off at either end.
    robust = strategy in ("median", "trimmed_mean")
    expected = np.median(updates, axis=0) if robust else updates.mean(axis=0)
    np.testing.assert_allclose(result.parameters, expected, atol=1e-6)
    # What one site of three has marked does not get past a rule that distrusts minorities.
    assert result.marked == pytest.approx(0.0 if robust else 1 / 3)


@pytest.mark.parametrize("strategy", ["fednova", "scaffold", "kmeans"])
def test_rules_that_do_not_take_heads_are_refused(strategy: str) -> None:
    assert "head" not in STRATEGIES[strategy].exchanges
    with pytest.raises(ConfigError, match=r"method feedback send head; choose one of auto, fedavg, median"):
        AggregateConfig(strategy=strategy, learning=Learning(method="feedback"))
