"""Robust rules against slow references, and against sites that send what they like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.config import AggregateConfig
from aggregator.events import Round, UpdateAccepted
from aggregator.exchanges import validate_weights
from aggregator.run import aggregate_updates, round_contributions
from aggregator.strategies import STRATEGIES, blocks
from aggregator.strategies.blocks import MIN_BLOCK_ELEMENTS, blockwise
from aggregator.strategies.interface import Contribution, Rule
from aggregator.strategies.robust import Median, TrimmedMean
from edgeflame.config import load_config
from edgeflame.errors import ConfigError

ROBUST = ("median", "trimmed_mean", "norm_clipping")


def save(path: Path, values: np.ndarray, **more: np.ndarray) -> Path:
    safetensors.numpy.save_file({"w": values, **more}, path)
    return path


def merged(folder: Path, base: np.ndarray, updates: list[np.ndarray], **config: Any) -> np.ndarray:
    """What a rule makes of updates; each is measured as the aggregator would."""
    base_path = save(folder / "base", base)
    parts = []
    for number, values in enumerate(updates):
        path = save(folder / f"s{number:03}", values)
        verdict = validate_weights(path, base_path, max_relative_change=np.inf)
        assert verdict.reason is None
        parts.append(
            Contribution(site=path.name, path=path, weight=1 / len(updates), relative_change=verdict.relative_change)
        )
    aggregate_updates(AggregateConfig(**config), base_path, parts[::-1], folder / "out", num_members=len(updates))
    return safetensors.numpy.load_file(folder / "out")["w"]


def changes(num_sites: int, *, size: int = 300) -> tuple[np.ndarray, list[np.ndarray]]:
    generator = np.random.default_rng(num_sites)
    base = generator.normal(size=size).astype(np.float32)
    return base, [base + generator.normal(size=size).astype(np.float32) for _ in range(num_sites)]


@pytest.mark.parametrize("num_sites", [1, 2, 3, 4, 5, 11])
def test_median_and_trimmed_mean_are_what_their_definitions_say(tmp_path: Path, num_sites: int) -> None:
    base, updates = changes(num_sites)
    columns = np.stack(updates).astype(np.float64).T
    median = merged(tmp_path, base, updates, strategy="median")
    np.testing.assert_array_equal(median, [np.float32(np.median(column)) for column in columns])
    trimmed = merged(tmp_path, base, updates, strategy="trimmed_mean", trim=0.2)
    cut = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 11: 3}[num_sites]
    expected = [np.mean(sorted(column)[cut : len(column) - cut]) for column in columns]
    np.testing.assert_allclose(trimmed, expected, rtol=1e-6)


def test_norm_clipping_shortens_the_long_changes_and_no_others(tmp_path: Path) -> None:
    base, updates = changes(5)
    updates[4] = base + 100 * (updates[4] - base)
    result = merged(tmp_path, base, updates, strategy="norm_clipping")
    lengths = [float(np.linalg.norm(u.astype(np.float64) - base)) for u in updates]
    bound = sorted(lengths)[2]
    factors = [min(1, bound / length) for length in lengths]
    moved = [factor * (u.astype(np.float64) - base) for factor, u in zip(factors, updates, strict=True)]
    expected = base + np.mean(moved, axis=0)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    fixed = merged(tmp_path, base, updates, strategy="norm_clipping", clip_norm=1e-3)
    assert np.linalg.norm(fixed - base) <= 1.001e-3 * np.linalg.norm(base)


def test_sites_that_change_nothing_are_no_division_by_zero(tmp_path: Path) -> None:
    base, _ = changes(3)
    np.testing.assert_array_equal(merged(tmp_path, base, [base] * 3, strategy="norm_clipping"), base)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_bad=st.integers(0, 2),
    bad=st.lists(st.integers(-(10**30), 10**30), min_size=6, max_size=6),
    rule=st.sampled_from(["median", "trimmed_mean"]),
)
def test_whatever_two_of_five_send_the_values_stay_among_the_honest(
    tmp_path: Path, num_bad: int, bad: list[int], rule: str
) -> None:
    base, honest = changes(5, size=3)
    honest = honest[num_bad:]
    evil = [np.array(bad[3 * n : 3 * n + 3], dtype=np.float32) for n in range(num_bad)]
    result = merged(tmp_path, base, [*evil, *honest], strategy=rule, trim=0.4, max_relative_change=1e38)
    lowest, highest = np.min(honest, axis=0), np.max(honest, axis=0)
    assert ((lowest <= result) & (result <= highest)).all()


def test_one_of_five_moves_the_average_anywhere(tmp_path: Path) -> None:
    # What the rules above are for; and that the test of them can fail.
    base, honest = changes(5, size=3)
    result = merged(tmp_path, base, [*honest[1:], np.full(3, 1e30, dtype=np.float32)])
    assert (result > np.max(honest, axis=0)).all()


@pytest.mark.parametrize("rule", ROBUST)
def test_a_claimed_number_of_samples_gives_no_weight(rule: str) -> None:
    accepted = {
        site: UpdateAccepted(round=1, site=site, sha256="a", num_samples=number, metrics={}, relative_change=0.1)
        for site, number in (("a", 10), ("b", 9_999_990))
    }
    entry = Round(number=1, base_sha256="0", asked=("a", "b"), accepted=accepted)
    weights = {
        name: [part.weight for part in round_contributions(entry, AggregateConfig(strategy=name), Path)]
        for name in (rule, "fedavg")
    }
    assert weights[rule] == [0.5, 0.5]
    assert weights["fedavg"][1] > 0.99


@pytest.mark.parametrize(("rule", "build"), [("median", Median), ("trimmed_mean", TrimmedMean)])
def test_what_is_held_of_all_sites_does_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, build: Any
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * MIN_BLOCK_ELEMENTS)
    held: list[int] = []

    class Watched:
        def __init__(self, inputs: Any) -> None:
            self._rule: Any = build(inputs)

        def combine(self, name: str, base: np.ndarray, updates: Any) -> np.ndarray:
            read = list(updates)
            held.append(sum(block.size for _, block in read))
            combined: np.ndarray = self._rule.combine(name, base, iter(read))
            return combined

    base, updates = changes(16, size=20 * MIN_BLOCK_ELEMENTS + 5)
    plain = merged(tmp_path, base, updates, strategy=rule)
    watched = Rule(build=blockwise(Watched, holds_all_sites=True), equal_votes=True)
    monkeypatch.setitem(STRATEGIES, rule, watched)
    np.testing.assert_array_equal(merged(tmp_path, base, updates, strategy=rule), plain)
    assert max(held) == 16 * MIN_BLOCK_ELEMENTS
    assert len(held) == 21


def test_a_negative_variance_does_not_count(tmp_path: Path) -> None:
    base, updates = changes(1)
    variance = np.full(4, 1e-3, dtype=np.float32)
    before = save(tmp_path / "base", base, **{"bn.running_var": variance})
    for sign, reason in ((1, None), (-1, "schema")):
        after = save(tmp_path / "update", updates[0], **{"bn.running_var": sign * variance})
        assert validate_weights(after, before, max_relative_change=10).reason == reason


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trim": 0.5}, r"trim must be in \[0, 0.5\), not 0.5"),
        ({"clip_norm": 0.0}, r'clip_norm must be "median" or in \(0, 1e12\], not 0.0'),
        (
            {"strategy": "krum"},
            'strategy must be one of auto, fedavg, .*median, trimmed_mean, norm_clipping.*, not "krum"',
        ),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, AggregateConfig, config)
