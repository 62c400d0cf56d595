"""The threshold's promise: against the order statistics of the binomial law, and by simulation of clustered scores."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom, lognorm, norm
from scipy.stats import t as student_t

from edgeflame.errors import DataError, NumericalError
from edgeflame.methods import Calibration
from edgeflame.statistics.shared import ScoreDeviation
from edgeflame.threshold import Threshold
from fitting.suspects import InfluentialPart, influential_parts
from fitting.threshold import (
    MAX_OTHER_PARTS,
    GoodScores,
    fleet_spread,
    robust_spread,
    rule_threshold,
    set_f1_threshold,
    set_threshold,
)

PROMISE = Calibration(mode="promise")
BY_PART = Calibration(mode="promise", unit="part")


def singles(count: int) -> list[str]:
    return [str(index) for index in range(count)]


@pytest.mark.parametrize("num_parts", [59, 100, 473, 2000])
def test_with_one_photograph_a_part_it_is_the_order_statistic_of_the_binomial_law(num_parts: int) -> None:
    scores = np.random.default_rng(num_parts).permutation(np.arange(1.0, num_parts + 1))
    value = set_threshold(scores, singles(num_parts), PROMISE, groups_known=True).value
    above = num_parts - value
    assert binom.cdf(above, num_parts, 0.05) <= 0.05 < binom.cdf(above + 1, num_parts, 0.05)


def test_no_more_is_promised_than_the_parts_allow() -> None:
    for num_parts, rate, kept in ((299, 0.01, True), (298, 0.01, False), (122, 0.025, True), (122, 0.024, False)):
        good = GoodScores(np.arange(1.0, num_parts + 1), singles(num_parts), "photograph")
        assert (good.lowest_threshold(rate, 0.95) is not None) == kept
    # More photographs of the same parts promise no more.
    many = GoodScores(np.arange(1.0, 5 * 298 + 1), [str(index % 298) for index in range(5 * 298)], "photograph")
    assert many.lowest_threshold(0.01, 0.95) is None


def test_the_expected_rate_is_a_plain_quantile_that_one_odd_photograph_does_not_move() -> None:
    scores = np.arange(1.0, 41.0)
    threshold = set_threshold(scores, singles(40), Calibration(), groups_known=True)
    assert (threshold.value, threshold.chosen_by, threshold.expected_false_reject_rate) == (38.0, "expected", 0.05)
    odd = np.where(scores == 40.0, 1e6, scores)
    assert set_threshold(odd, singles(40), Calibration(), groups_known=True).value == 38.0
    # What can be promised there is the exact binomial bound at 2 of 40.
    assert binom.cdf(2, 40, threshold.false_reject_rate) == pytest.approx(0.05, abs=1e-6)
    assert threshold.with_more_parts is not None
    parts, rate = threshold.with_more_parts
    assert (parts, binom.cdf(6, parts, rate)) == (120, pytest.approx(0.05, abs=1e-6))
    assert rate < 0.8 * threshold.false_reject_rate


def test_the_expected_rate_counts_parts_and_not_their_photographs() -> None:
    # One part of twenty with 30 photographs, all high: a twentieth of the parts, most of the photographs.
    scores = np.concatenate([np.full(30, 99.0), np.arange(1.0, 20.0)])
    threshold = set_threshold(scores, ["odd"] * 30 + singles(19), Calibration(), groups_known=True)
    assert (threshold.value, threshold.expected_false_reject_rate) == (19.0, pytest.approx(0.05))


@pytest.mark.parametrize("num_parts", [20, 30, 60, 120, 500])
@pytest.mark.parametrize("tail", ["normal", "lognormal", "student"])
def test_the_rate_realised_on_new_parts_is_about_what_was_asked_for(num_parts: int, tail: str) -> None:
    """Mean over 400 calibrations of the true rate: within a factor of two, also for heavy tails."""
    rng = np.random.default_rng(num_parts)
    draw, law = {
        "normal": (rng.normal, norm),
        "lognormal": (lambda size: rng.lognormal(0.0, 1.0, size), lognorm(1.0)),
        "student": (lambda size: rng.standard_t(2, size), student_t(2)),
    }[tail]
    values = []
    for _ in range(400):
        scores = draw(size=num_parts)
        lift = 1.0 - scores.min()  # a threshold is above zero
        values.append(rule_threshold(GoodScores(scores + lift, singles(num_parts), "photograph"), Calibration()) - lift)
    assert 0.025 < law.sf(values).mean() < 0.1
    threshold = set_threshold(scores + lift, singles(num_parts), Calibration(), groups_known=True)
    assert threshold.value - lift == values[-1]


SPREAD = ScoreDeviation(deviation=0.25, num_parts=60)
"""At other sites."""


@pytest.mark.parametrize(("num_parts", "alone"), [(5, 1 / 6), (10, 1 / 11)])
def test_few_parts_lean_on_how_scores_spread_elsewhere(num_parts: int, alone: float) -> None:
    """Realised rates of 400 calibrations, scores at twenty times those of the other site."""
    rng = np.random.default_rng(num_parts)
    values: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(400):
        scores = 20.0 * rng.lognormal(0.0, 0.25, num_parts)
        for leans, found in values.items():
            good = GoodScores(scores, singles(num_parts), "photograph", SPREAD if leans else None)
            found.append(rule_threshold(good, Calibration()))
            assert good.num_others == (MAX_OTHER_PARTS if leans else 0)
    rates = {leans: lognorm(0.25, scale=20.0).sf(found) for leans, found in values.items()}
    threshold = set_threshold(scores, singles(num_parts), Calibration(), groups_known=True, others=SPREAD)
    assert (threshold.value, threshold.num_other_parts) == (values[True][-1], MAX_OTHER_PARTS)
    assert np.mean(rates[False]) == pytest.approx(alone, abs=0.02)
    assert 0.025 < np.mean(rates[True]) < 0.1
    assert np.std(rates[True]) < 0.7 * np.std(rates[False])


def test_many_parts_hardly_lean_on_others_and_no_promise_does() -> None:
    scores = np.random.default_rng(0).lognormal(0.0, 0.5, 2000)
    alone, leaning = (
        set_threshold(scores, singles(2000), Calibration(), groups_known=True, others=others)
        for others in (None, SPREAD)
    )
    assert leaning.value == pytest.approx(alone.value, rel=0.02)
    promises = [
        set_threshold(scores, singles(2000), PROMISE, groups_known=True, others=others) for others in (None, SPREAD)
    ]
    assert promises[0] == promises[1]


def test_a_spread_is_of_parts_enough_and_of_the_unit_that_is_counted() -> None:
    assert robust_spread(np.arange(1.0, 15.0), 14) is None
    assert robust_spread(np.zeros(40), 40) is None
    # A tenth of odd photographs does not count.
    scores = np.random.default_rng(0).lognormal(2.0, 0.25, 4000)
    scores[:400] *= 5
    found = robust_spread(np.sort(scores), 40)
    assert found is not None
    assert found.deviation == pytest.approx(0.25, rel=0.2)
    assert fleet_spread(msgspec.UNSET) is None
    assert fleet_spread(ScoreDeviation(deviation=0.2, num_parts=14)) is None
    several = ["a", "a", "b", "c"]
    assert GoodScores(np.arange(1.0, 5.0), several, "part", SPREAD).num_others == 0
    assert GoodScores(np.arange(1.0, 5.0), several, "photograph", SPREAD).num_others == MAX_OTHER_PARTS


def test_what_leans_on_another_site_says_so() -> None:
    threshold = set_threshold(np.arange(20.0, 25.0), singles(5), Calibration(), groups_known=True, others=SPREAD)
    assert "of good photographs rejected, if scores spread as elsewhere; at most" in threshold.promise()
    # Where one part lies far from the rest, it moves the threshold less than it would by itself.
    odd = np.array([20.0, 21.0, 22.0, 23.0, 60.0])
    lone = set_threshold(odd, singles(5), Calibration(), groups_known=True).value
    assert set_threshold(odd, singles(5), Calibration(), groups_known=True, others=SPREAD).value < lone == 60.0


def clustered(rng: np.random.Generator, num_parts: int, sizes: npt.NDArray[np.int64], between: float):
    """Normal scores of parts with several photographs; ``between`` is the share of the variance between parts."""
    parts = np.repeat(np.arange(num_parts), sizes)
    scores = np.sqrt(between) * rng.normal(size=num_parts)[parts] + np.sqrt(1 - between) * rng.normal(size=len(parts))
    return scores + 10.0, [str(part) for part in parts]


@pytest.mark.parametrize("between", [0.0, 0.5, 1.0])
def test_the_promise_about_photographs_holds_however_alike_a_parts_photographs_are(between: float) -> None:
    """Coverage of the whole rule, 400 times: at least 95% to within three standard errors (0.033)."""
    rng = np.random.default_rng(int(10 * between))
    kept = []
    for _ in range(400):
        scores, parts = clustered(rng, 70, np.full(70, 5), between)
        value = GoodScores(scores, parts, "photograph").lowest_threshold(0.05, 0.95)
        assert value is not None  # not by promising nothing
        kept.append(norm.sf(value - 10.0) <= 0.05)
    assert np.mean(kept) >= 0.95 - 0.033


def test_counting_photographs_as_parts_would_break_the_promise() -> None:
    """What the parts are known for: the same scores, each photograph taken for a part of its own."""
    rng = np.random.default_rng(5)
    kept = []
    for _ in range(200):
        scores, parts = clustered(rng, 70, np.full(70, 5), 0.95)
        value = GoodScores(scores, singles(len(parts)), "photograph").lowest_threshold(0.05, 0.95)
        assert value is not None
        kept.append(norm.sf(value - 10.0) <= 0.05)
    assert np.mean(kept) < 0.9


def test_parts_of_different_numbers_of_photographs_count_alike() -> None:
    # One part with 90 photographs, all high; 99 with one, all low: the rate is 1%, not 90 of 189.
    scores = np.concatenate([np.full(90, 9.0), np.linspace(1, 2, 99)])
    good = GoodScores(scores, ["big"] * 90 + singles(99), "photograph")
    assert good.expected_rate(5.0) == pytest.approx(0.01)


def test_a_part_judged_as_a_whole_counts_by_its_highest_photograph(caplog: pytest.LogCaptureFixture) -> None:
    scores = np.arange(400.0)
    parts = [str(index // 4) for index in range(400)]
    with caplog.at_level(logging.WARNING, logger="edgeflame"):
        threshold = set_threshold(
            scores, parts, Calibration(mode="promise", false_reject_rate=0.01, unit="part"), groups_known=True
        )
    # 100 parts cannot promise one percent: the tightest promise instead, and a log line that says so.
    assert threshold.value == 399.0
    assert (threshold.num_groups, threshold.num_images, threshold.unit) == (100, 400, "part")
    assert threshold.requested_false_reject_rate == 0.01
    assert threshold.false_reject_rate == pytest.approx(1 - 0.05 ** (1 / 100))
    record = next(record for record in caplog.records if record.getMessage() == "too_few_parts_for_promise")
    assert record.__dict__["fields"]["parts_needed"] == 299
    whole = set_threshold(scores, parts, BY_PART, groups_known=True)
    each = set_threshold(scores, parts, PROMISE, groups_known=True)
    assert each.value < whole.value
    assert whole.expected_false_reject_rate == pytest.approx(np.mean(np.arange(3.0, 400, 4) > whole.value))


def test_enough_parts_get_what_was_asked_for_and_see_what_else_there_was() -> None:
    calibration = Calibration(mode="promise", false_reject_rate=0.03)
    threshold = set_threshold(np.arange(1.0, 201), singles(200), calibration, groups_known=False)
    assert threshold.false_reject_rate == 0.03
    assert not threshold.groups_known
    assert [one.false_reject_rate for one in threshold.others] == [0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
    assert threshold.others[0].value is None  # 1% takes 299
    values = [one.value for one in threshold.others[1:]]
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    mine = threshold.others[2]
    assert (mine.value, mine.expected_false_reject_rate) == (threshold.value, threshold.expected_false_reject_rate)
    assert all(one.expected_false_reject_rate <= one.false_reject_rate for one in threshold.others[1:])  # type: ignore[operator]


def test_the_threshold_of_the_highest_f1_promises_what_its_parts_allow() -> None:
    rng = np.random.default_rng(0)
    good, defective = rng.normal(10, 1, 120), rng.normal(14, 1, 60)
    threshold = set_f1_threshold(good, singles(120), defective, Calibration(), groups_known=True)
    assert 11.5 < threshold.value < 13.5
    assert threshold.chosen_by == "f1"
    observed = float((good > threshold.value).mean())
    assert threshold.expected_false_reject_rate == observed
    # A fixed threshold could promise this much; one chosen by the same scores must promise less.
    assert threshold.false_reject_rate > binom_upper(int(observed * 120), 120) > observed
    with pytest.raises(DataError, match="labelled defects"):
        set_f1_threshold(good, singles(120), np.array([]), Calibration(), groups_known=True)
    with pytest.raises(NumericalError, match="defective"):
        set_f1_threshold(good, singles(120), np.array([np.nan]), Calibration(), groups_known=True)


def binom_upper(rejected: int, total: int) -> float:
    rates = np.linspace(0, 1, 10001)
    return float(rates[np.argmax(binom.cdf(rejected, total, rates) <= 0.05)])


@pytest.mark.parametrize("unit", ["part", "photograph"])
@pytest.mark.parametrize("mode", ["expected", "promise"])
def test_parts_that_move_the_threshold_are_those_found_by_leaving_out_each(mode, unit) -> None:
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 4, size=rng.integers(2, 70))
        parts = np.repeat([f"part {index}" for index in range(len(sizes))], sizes)
        scores = np.exp(rng.normal(0.0, 0.4, size=len(parts)))
        scores[parts == "part 1"] *= rng.choice([1.0, 5.0])
        calibration = Calibration(mode=mode, unit=unit, false_reject_rate=float(rng.choice([0.05, 0.1])))

        def threshold(kept: npt.NDArray[np.bool_]) -> float:
            return rule_threshold(GoodScores(scores[kept], list(parts[kept]), unit), calibration)  # noqa: B023

        whole = threshold(np.ones(len(parts), bool))
        without = {name: threshold(parts != name) for name in np.unique(parts)}
        expected = {name: value for name, value in without.items() if value < 0.8 * whole}
        influential = influential_parts(scores, list(parts), calibration)
        assert {parts[one.images[0]]: one.without for one in influential} == expected
        for one in influential:
            assert sorted(one.images) == np.flatnonzero(parts == parts[one.images[0]]).tolist()
            assert scores[one.images[0]] == scores[list(one.images)].max()
        highest = [scores[one.images[0]] for one in influential]
        assert highest == sorted(highest, reverse=True)
        found.append(len(influential))
    assert 0 in found
    assert max(found) > 1


def test_a_step_of_just_a_fifth_is_not_named_and_a_larger_one_is() -> None:
    for second, named in ((8.0, ()), (7.9, (InfluentialPart(images=(0,), without=7.9),))):
        assert influential_parts(np.array([10.0, second, 2.0]), singles(3), PROMISE) == named
    # From twenty parts on one odd photograph does not set the expected rate's threshold, nor is it named.
    scores = np.append(np.linspace(9.0, 10.0, 40), 1000.0)
    assert influential_parts(scores, singles(41), Calibration()) == ()
    assert influential_parts(scores, singles(41), PROMISE) == (InfluentialPart(images=(40,), without=10.0),)
    assert influential_parts(np.array([1.0, 2.0]), ["a", "a"], PROMISE) == ()


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="no good images"):
        set_threshold(np.array([]), [], Calibration(), groups_known=True)
    with pytest.raises(NumericalError, match="finite"):
        set_threshold(np.array([1.0, np.nan]), ["a", "b"], Calibration(), groups_known=True)


def test_what_is_promised_is_said_in_words() -> None:
    threshold = Threshold(
        value=2.0, false_reject_rate=0.05, confidence=0.95, num_groups=30, num_images=98, groups_known=True,
        requested_false_reject_rate=0.01, unit="photograph", expected_false_reject_rate=0.02, num_left_out=2,
    )  # fmt: skip
    assert threshold.promise() == (
        "at most 5.00% of good photographs rejected, with 95% confidence, from 30 parts (98 images); expected 2.00%"
    )
    expected = msgspec.structs.replace(
        threshold, chosen_by="expected", expected_false_reject_rate=0.04, num_left_out=0, with_more_parts=(120, 0.021)
    )
    assert expected.promise() == (
        "about 4.0% of good photographs rejected; at most 5.0% with 95% confidence, from 30 parts (98 images)"
    )
    assert expected.caveats() == ["120 parts would promise about 2.1%"]
    assert threshold.caveats() == [
        "1.00% was asked for; that takes more parts than there are",
        "2 images were left out as suspects; had they all been good, the promise would be 7.00%",
    ]


@pytest.mark.parametrize(
    "absurd",
    [
        {"value": 1e308},
        {"value": 2e12},
        {"false_reject_rate": -0.01},
        {"false_reject_rate": 5.0},
        {"confidence": 1.5},
        {"requested_false_reject_rate": float("nan")},
    ],
)
def test_a_threshold_that_passes_everything_or_promises_nonsense_is_refused(absurd: dict[str, float]) -> None:
    sound = {"value": 2.0, "false_reject_rate": 0.05, "confidence": 0.95, "requested_false_reject_rate": 0.01}
    with pytest.raises(NumericalError, match="a threshold"):
        Threshold(**{**sound, **absurd}, num_groups=30, num_images=98, groups_known=True)
