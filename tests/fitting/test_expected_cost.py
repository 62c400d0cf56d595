"""The threshold of least expected cost against a slow reference, its bound by the good parts, and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from edgeflame.errors import DataError, NumericalError
from edgeflame.methods import RejectUnit
from edgeflame.threshold import LabelledDefects, Threshold
from fitting.expected_cost import set_least_cost


def by_good(value: float, unit: RejectUnit = "photograph") -> Threshold:
    return Threshold(
        value=value,
        false_reject_rate=0.12,
        confidence=0.95,
        num_groups=40,
        num_images=40,
        groups_known=True,
        requested_false_reject_rate=0.12,
        unit=unit,
    )


def own(scores: Sequence[float] | np.ndarray) -> list[str]:
    return [str(index) for index in range(len(scores))]


def labelled(threshold: Threshold) -> LabelledDefects:
    assert threshold.labelled is not None
    return threshold.labelled


def slow_share(scores: np.ndarray, groups: Sequence[str], threshold: float, unit: RejectUnit, width: float) -> float:
    """The smoothed share above a threshold, part by part; plain for width 0."""
    shares = []
    for part in set(groups):
        own_scores = [score for score, group in zip(scores, groups, strict=True) if group == part]
        if unit == "part":
            own_scores = [max(own_scores)]
        steps = [math.log(score / threshold) for score in own_scores]
        above = [NormalDist().cdf(step / width) if width else float(step > 0) for step in steps]
        shares.append(sum(above) / len(above))
    return float(np.mean(shares))


def slow_spread(scores: np.ndarray, groups: Sequence[str], unit: RejectUnit) -> float:
    values = scores
    if unit == "part":
        values = np.array([max(s for s, g in zip(scores, groups, strict=True) if g == part) for part in set(groups)])
    quartiles = np.quantile(np.log(values), [0.25, 0.75])
    return float(min(np.log(values).std(), (quartiles[1] - quartiles[0]) / 1.34))


@pytest.mark.parametrize("unit", ["photograph", "part"])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_a_slow_search_finds_costs_less(seed: int, unit: RejectUnit) -> None:
    rng = np.random.default_rng(seed)
    good, bad = rng.gamma(20, 1, 60), rng.gamma(45, 1, 50)
    parts = [str(one) for one in rng.integers(0, 25, len(good))]
    bad_parts = [str(one) for one in rng.integers(0, 30, len(bad))]
    num_good, num_bad = len(set(parts)), len(set(bad_parts))
    start = float(np.quantile(good, rng.uniform(0.3, 1.0)))
    spreads = slow_spread(good, parts, unit), slow_spread(bad, bad_parts, unit)

    def cost(threshold: float) -> float:
        rejected = slow_share(good, parts, threshold, unit, 1.35 * spreads[0] * num_good**-0.2)
        width = 1.35 * math.sqrt(spreads[0] * spreads[1]) * num_bad**-0.2
        missed = 1 - slow_share(bad, bad_parts, threshold, unit, width)
        return rejected + 6 * (num_bad * missed + (1 - rejected)) / (num_bad + 1)

    found = set_least_cost(by_good(start, unit), good, parts, bad, bad_parts, cost_of_miss=6)
    tried = np.geomspace(5, 90, 200)
    said = labelled(found)
    assert found.value >= start
    assert cost(found.value) <= min(cost(one) for one in (*tried[tried >= start], start)) + 1e-3
    assert cost(said.least_cost_at) <= min(map(cost, tried)) + 1e-3
    assert found.expected_false_reject_rate == pytest.approx(slow_share(good, parts, found.value, unit, 0))
    assert said.missed == pytest.approx(1 - slow_share(bad, bad_parts, found.value, unit, 0))
    assert (said.num_groups, said.num_images) == (num_bad, 50)
    # What the good parts promise holds for every higher threshold as well.
    assert (found.false_reject_rate, found.confidence, found.chosen_by) == (0.12, 0.95, "cost")


def test_it_is_never_lower_than_good_parts_allow_and_says_where_it_would_be() -> None:
    rng = np.random.default_rng(1)
    good, bad = rng.gamma(20, 1, 300), rng.gamma(32, 1, 100)
    bound = float(good.max())
    found = set_least_cost(by_good(bound), good, own(good), bad, own(bad), cost_of_miss=10)
    assert found.value == bound
    said = labelled(found)
    assert said.interval[0] <= said.least_cost_at <= said.interval[1]
    assert said.least_cost_at < bound
    assert said.least_cost_rejected == pytest.approx((good > said.least_cost_at).mean())
    assert said.least_cost_missed == pytest.approx((bad <= said.least_cost_at).mean())
    rate = math.ceil(said.least_cost_rejected * 100) / 100
    assert any(f"--false-reject-rate {rate:g} allows it" in note for note in found.caveats())
    allowed = by_good(float(np.quantile(good, 1 - rate, method="lower")))
    free = set_least_cost(allowed, good, own(good), bad, own(bad), cost_of_miss=10)
    assert free.value == pytest.approx(said.least_cost_at, rel=0.02)
    assert not any("allows it" in note for note in free.caveats())


@pytest.mark.parametrize("count", [1, 5, 9])
def test_a_few_glaring_defects_do_not_raise_it(count: int) -> None:
    """Faint ones that nobody has labelled would pass then."""
    good = np.random.default_rng(0).gamma(20, 1, 100)
    bound = float(np.quantile(good, 0.8))
    glaring = np.full(count, 1000.0)
    found = set_least_cost(by_good(bound), good, own(good), glaring, own(glaring), cost_of_miss=10)
    assert (found.value, found.chosen_by) == (bound, "promise")
    assert any("so few labelled defects do not move the threshold" in note for note in found.caveats())


def test_many_defects_raise_it_above_the_good_ones() -> None:
    good = np.random.default_rng(0).gamma(20, 1, 100)
    glaring = np.random.default_rng(1).normal(1000, 100, 60)
    found = set_least_cost(by_good(15.0), good, own(good), glaring, own(glaring), cost_of_miss=10)
    assert good.max() <= found.value < 0.5 * glaring.min()
    assert (found.expected_false_reject_rate, labelled(found).missed) == (0, 0)


@pytest.mark.parametrize(("bad_mean", "gain"), [(28, 0.0), (36, 0.0), (60, 0.03)])
def test_on_average_it_costs_no_more_than_the_threshold_of_good_parts_alone(bad_mean: float, gain: float) -> None:
    """Not where the two kinds overlap either; where they lie apart it saves the false rejects."""
    rng = np.random.default_rng(3)
    new_good, new_bad = rng.gamma(20, 1, 20000), rng.gamma(bad_mean, 1, 20000)

    def realised(threshold: float) -> float:
        return float((new_good > threshold).mean() + 10 * (new_bad <= threshold).mean())

    saved, covered, best = [], [], min(np.linspace(15, 60, 301), key=realised)
    for _ in range(60):
        good, bad = rng.gamma(20, 1, 60), rng.gamma(bad_mean, 1, 30)
        bound = by_good(float(np.quantile(good, 0.95)))
        found = set_least_cost(bound, good, own(good), bad, own(bad), cost_of_miss=10)
        saved.append(realised(bound.value) - realised(found.value))
        low, high = labelled(found).interval
        covered.append(low <= best <= high)
    assert np.mean(saved) >= gain
    assert np.mean(covered) >= 0.95


def test_what_cannot_be_weighed() -> None:
    some = np.array([1.0, 2.0])
    with pytest.raises(DataError, match="labelled defective"):
        set_least_cost(by_good(1.5), some, own(some), np.zeros(0), [], cost_of_miss=10)
    with pytest.raises(NumericalError, match="not a finite number"):
        set_least_cost(by_good(1.5), some, own(some), np.array([np.nan]), ["0"], cost_of_miss=10)
