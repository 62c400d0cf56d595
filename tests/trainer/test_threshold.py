"""The threshold's promise, against the binomial formula and by simulation."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy.stats import binom

from edgeflame.errors import DataError, NumericalError
from edgeflame.learning import Calibration
from trainer.threshold import (
    binomial_cdf,
    highest_per_group,
    order_statistic,
    parts_needed,
    set_threshold,
    tightest_promise,
)


@pytest.mark.parametrize("trials", [1, 7, 299, 5000])
@pytest.mark.parametrize("probability", [0.001, 0.01, 0.3])
def test_binomial_sums_are_scipys(trials: int, probability: float) -> None:
    for successes in {0, 1, min(5, trials), trials}:
        expected = binom.cdf(successes, trials, probability)
        assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_one_percent_with_95_percent_confidence_takes_299_parts() -> None:
    assert parts_needed(0.01, 0.95) == 299
    assert order_statistic(299, 0.01, 0.95) == 299
    assert order_statistic(298, 0.01, 0.95) is None


def test_122_parts_promise_two_and_a_half_percent() -> None:
    assert tightest_promise(122, 0.95) == pytest.approx(0.0243, abs=5e-5)
    assert order_statistic(122, 0.025, 0.95) == 122
    assert order_statistic(122, 0.024, 0.95) is None


def test_the_order_statistic_is_the_lowest_that_keeps_the_promise() -> None:
    for num_parts in (59, 100, 473, 2000):
        position = order_statistic(num_parts, 0.05, 0.95)
        assert position is not None
        assert binom.cdf(num_parts - position, num_parts, 0.05) <= 0.05
        assert binom.cdf(num_parts - position + 1, num_parts, 0.05) > 0.05
    assert order_statistic(473, 0.01, 0.95) == 472


def test_the_promise_holds_in_simulation() -> None:
    """In 95% of repetitions no more than the promised share of the population lies above the threshold."""
    rng = np.random.default_rng(0)
    calibration = Calibration(false_reject_rate=0.05, confidence=0.95)
    kept = []
    for _ in range(2000):
        scores = rng.exponential(size=130)
        threshold = set_threshold(scores, [str(i) for i in range(130)], calibration, groups_known=True)
        kept.append(np.exp(-threshold.value) <= threshold.false_reject_rate)
    assert 0.94 <= np.mean(kept) <= 0.985


def test_the_part_is_the_unit_not_the_photograph(caplog: pytest.LogCaptureFixture) -> None:
    scores = np.arange(400.0)
    parts = [str(index // 4) for index in range(400)]
    np.testing.assert_array_equal(np.sort(highest_per_group(scores, parts)), np.arange(3.0, 400.0, 4.0))
    with caplog.at_level(logging.WARNING, logger="edgeflame"):
        threshold = set_threshold(scores, parts, Calibration(false_reject_rate=0.01), groups_known=True)
    # 100 parts cannot promise one percent: the tightest promise instead, and a log line that says so.
    assert threshold.value == 399.0
    assert (threshold.num_groups, threshold.num_images) == (100, 400)
    assert threshold.requested_false_reject_rate == 0.01
    assert threshold.false_reject_rate == pytest.approx(1 - 0.05 ** (1 / 100))
    record = next(record for record in caplog.records if record.getMessage() == "too_few_parts_for_promise")
    assert record.__dict__["fields"]["parts_needed"] == 299


def test_enough_parts_get_what_was_asked_for() -> None:
    calibration = Calibration(false_reject_rate=0.01)
    threshold = set_threshold(np.arange(1000.0), [str(i) for i in range(1000)], calibration, groups_known=False)
    assert threshold.false_reject_rate == 0.01
    assert threshold.value < 999
    assert not threshold.groups_known


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="no good images"):
        set_threshold(np.array([]), [], Calibration(), groups_known=True)
    with pytest.raises(NumericalError, match="finite"):
        set_threshold(np.array([1.0, np.nan]), ["a", "b"], Calibration(), groups_known=True)
