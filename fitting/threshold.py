"""The threshold, and what it can promise about good parts. No torch here, so that a line can set its threshold too.

**The threshold.** By default the lowest one is taken above which no larger share of the held-out good units scores than
was asked for: a plain quantile, which no single odd photograph moves once there are twenty parts. The rate to expect of
it on new parts is (k + 1)/(m + 1) where k of m score above it: 6.5% of 30 parts where 5% were asked for, 5.8% of 120,
but 17% of five. So few can lean on how much scores vary at other sites (``ScoreDeviation``). What can be promised at
that threshold is told beside it.

In the mode ``promise`` it is the lowest threshold at which the share of good units above it is, with the confidence
asked for, no higher than the rate asked for. The probability that the rate is exceeded falls as the threshold rises, so
no correction is needed for having searched: the threshold is wrong only where that probability is wrong at the one true
quantile. In both, the part is the independent unit, whether parts or photographs are rejected.

**The confidence bound**, where a few parts were photographed several times each. Part g of m shows the share ``z_g``
of its photographs above a threshold: 0 or 1 where it was photographed once, anything between otherwise. The
photographs of a part may depend on each other in any way; the parts are independent. Wanted is an upper confidence
bound of the mean share, which is the rate at which photographs of the product are rejected. Gaffke's bound
[Gaffke 2005; Learned-Miller and Thomas, arXiv 1905.06208] is a quantile of::

    D_0 · 1 + D_1 · z_1 + … + D_m · z_m,        (D_0, …, D_m) uniform on the simplex

a Bayesian bootstrap over the parts with one more part that is rejected whole. For shares of 0 and 1 it *is* the exact
binomial bound of Clopper and Pearson; for shares between it is tighter. Its coverage is proven for 0 and 1 alone; for
the rest it is a conjecture without a known counterexample, which the test suite holds against hard distributions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.log import EventLog
from edgeflame.methods import Calibration, RejectUnit
from edgeflame.statistics.shared import MAX_DEVIATION, ScoreDeviation
from edgeflame.tensors import F64
from edgeflame.threshold import Threshold, ThresholdPromise
from fitting.metrics import best_f1

_ACCURACY = 1e-9
"""Absolute error of the probabilities computed by numerical inversion."""


def exceedance_probability(shares: Sequence[float] | F64, rate: float) -> float:
    """The probability, in the sense above, that the mean share is higher than ``rate``.

    A rate is an upper bound with confidence one minus this probability, which never falls when a share rises and
    falls when the rate rises.

    Args:
        shares: one a part, each 0..1.
        rate: 0..1, both excluded.
    """
    values, counts = np.unique(np.asarray(shares, dtype=np.float64), return_counts=True)
    if set(values) <= {0.0, 1.0}:
        rejected = int(counts[values == 1.0].sum())
        if rejected == len(shares):
            return 1.0
        return _binomial_probability(rejected, len(shares), rate)
    # D is a vector of exponential variables over their sum, so the sum above exceeds the rate where
    # sum over g of E_g (z_g - rate) + E_0 (1 - rate) is positive.
    return _probability_positive(np.append(values - rate, 1.0 - rate), np.append(counts, 1))


def upper_confidence_bound(shares: Sequence[float] | F64, confidence: float) -> float:
    """The lowest rate whose :func:`exceedance_probability` is ``1 - confidence``."""
    if min(shares) >= 1.0:
        return 1.0
    edge = 1e-12
    return _root(lambda rate: exceedance_probability(shares, rate) - (1.0 - confidence), edge, 1.0 - edge)


def _binomial_probability(at_most: int, trials: int, rate: float) -> float:
    """P(X <= at_most) of a binomial variable: the tail of a beta distribution above the rate."""
    k = np.arange(at_most + 1)
    log_ways = np.concatenate([[0.0], np.cumsum(np.log((trials - k[:-1]) / (k[:-1] + 1.0)))])
    logs = log_ways + k * math.log(rate) + (trials - k) * math.log1p(-rate)
    return min(1.0, float(np.exp(logs).sum()))


def _root(function: Callable[[float], float], low: float, high: float, *, tolerance: float = 1e-10) -> float:
    """Where a falling function crosses zero between two points, by Ridders' method (1979)."""
    at_low, at_high = function(low), function(high)
    root, before = low, high
    while at_low > 0.0 > at_high and high - low > tolerance and abs(root - before) > tolerance:
        middle = (low + high) / 2.0
        at_middle = function(middle)
        before, root = root, middle + (middle - low) * at_middle / math.sqrt(at_middle**2 - at_low * at_high)
        for point, value in ((middle, at_middle), (root, function(root))):
            if value > 0.0 and point > low:
                low, at_low = point, value
            elif value <= 0.0 and point < high:
                high, at_high = point, value
    return root


def confidence_interval(shares: Sequence[float] | F64, confidence: float) -> tuple[float, float]:
    """A lower and an upper bound of the mean share; each may fail in half of the cases left over."""
    shares = np.asarray(shares, dtype=np.float64)
    one_sided = 1.0 - (1.0 - confidence) / 2.0
    return 1.0 - upper_confidence_bound(1.0 - shares, one_sided), upper_confidence_bound(shares, one_sided)


def tightest_rate(num_parts: int, confidence: float) -> float:
    """The lowest rate that ``num_parts`` parts without a single rejection can promise: 1 - (1 - y)^(1/m)."""
    return float(-math.expm1(math.log1p(-confidence) / num_parts))


def parts_needed(rate: float, confidence: float) -> int:
    """How many good parts a promise takes: 299 for 1% with 95% confidence."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def _probability_positive(weights: F64, counts: npt.NDArray[np.int64]) -> float:
    """P(sum of weights_j · Gamma(counts_j) > 0), by inverting the characteristic function.

    The midpoint rule with step ``2π/T`` errs by less than the probability that the sum lies beyond ``±T`` (Davies
    1980, "The distribution of a linear combination of chi-squared random variables").
    """
    mean, deviation = float(weights @ counts), math.sqrt(float(weights**2 @ counts))
    period = abs(mean) + 12.0 * deviation + 30.0 * float(np.abs(weights).max())
    step = 2.0 * math.pi / period
    total, start, block = 0.0, 0, 4096
    while True:
        index = np.arange(start, start + block) + 0.5
        angles = np.outer(index * step, weights)
        size = np.exp(-0.5 * (np.log1p(angles**2) @ counts)) / (math.pi * index)
        total += float((size * np.sin(np.arctan(angles) @ counts)).sum())
        start += block
        # What is left is less than the sum of sizes that fall at least as 1/index².
        if size[-1] * start < _ACCURACY or start >= 1 << 20:
            return min(1.0, max(0.0, 0.5 + total))


log = EventLog("threshold")

OTHER_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Promises shown beside the one asked for, so that a user sees what each costs."""


MAX_OTHER_PARTS = 20
"""As how many parts those of other sites count at most: with 5 parts of one's own the spread is mostly theirs, with 500
hardly."""

MIN_OTHER_PARTS = 15
"""Fewer parts say too little of how scores spread."""

_NORMAL: F64 = np.array([NormalDist().inv_cdf((rank + 0.5) / 64) for rank in range(64)])
"""Quantiles that stand for a normal distribution."""


def robust_spread(quantiles: Sequence[float], num_parts: int) -> ScoreDeviation | None:
    """How much the scores of good parts vary, by their middle half: a few odd ones do not count.

    Args:
        quantiles: of scores, at even steps from the least to the greatest.
        num_parts: behind them.

    Returns:
        None where there are fewer than ``MIN_OTHER_PARTS``, or a score is 0.
    """
    low, high = np.quantile(np.asarray(quantiles, dtype=np.float64), (0.25, 0.75))
    if num_parts < MIN_OTHER_PARTS or low <= 0:
        return None
    deviation = math.log(high / low) / (2 * NormalDist().inv_cdf(0.75))
    return ScoreDeviation(deviation=min(deviation, MAX_DEVIATION), num_parts=num_parts)


def fleet_spread(told: ScoreDeviation | msgspec.UnsetType) -> ScoreDeviation | None:
    """What a fleet pooled; None where it did not, or of fewer than ``MIN_OTHER_PARTS``."""
    return None if told is msgspec.UNSET or told.num_parts < MIN_OTHER_PARTS else told


def measure_spread(scores: npt.NDArray[np.floating], groups: Sequence[str]) -> ScoreDeviation | msgspec.UnsetType:
    """How much the held-out scores ``[N]`` of good images vary; unset for fewer than two parts, or a score of 0."""
    _, part, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(sizes) < 2 or np.min(scores) <= 0:
        return msgspec.UNSET
    logs, weights = np.log(np.asarray(scores, dtype=np.float64)), 1.0 / sizes[part]
    around = logs - np.average(logs, weights=weights)
    deviation = math.sqrt(float(weights @ around**2) / (len(sizes) - 1))
    return ScoreDeviation(deviation=min(deviation, MAX_DEVIATION), num_parts=len(sizes))


class GoodScores:
    """Scores of good images that the statistics have not seen, by the part they show.

    Args:
        scores: ``[N]``.
        groups: the part that each image shows.
        unit: what rates count.
        others: how much scores vary at other sites. Normal logarithms about the mean of these count as further parts
            in what is to be expected, at most as ``MAX_OTHER_PARTS``, but not in what is promised. Not used where whole
            parts are counted that have several images.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """

    def __init__(
        self,
        scores: npt.NDArray[np.floating],
        groups: Sequence[str],
        unit: RejectUnit,
        others: ScoreDeviation | None = None,
    ) -> None:
        if len(scores) == 0:
            raise DataError("no good images to set a threshold with")
        if not np.isfinite(scores).all():
            raise NumericalError("a good image has a score that is not a finite number")
        self.scores = np.asarray(scores, dtype=np.float64)
        part: npt.NDArray[np.intp]
        _, part = np.unique(np.asarray(groups), return_inverse=True)
        self._part = part
        self._sizes: F64 = np.bincount(part).astype(np.float64)
        self._unit = unit
        self.candidates: F64 = np.unique(self.scores)
        """Thresholds that make a difference, rising."""
        self.num_others = 0
        """As how many parts the others count."""
        self._others: F64 = np.zeros(0)
        if others is not None and self.scores.min() > 0 and (unit == "photograph" or self._sizes.max() == 1):
            centre = np.average(np.log(self.scores), weights=1.0 / self._sizes[part])
            self._others = np.exp(centre + others.deviation * _NORMAL)
            self.num_others = min(others.num_parts, MAX_OTHER_PARTS)

    @property
    def num_parts(self) -> int:
        return len(self._sizes)

    def shares(self, value: float) -> F64:
        """``[parts]``, by name: the share of a part's photographs above a threshold; for whole parts 0 or 1."""
        above = np.bincount(self._part, weights=self.scores > value).astype(np.float64)
        return (above > 0).astype(np.float64) if self._unit == "part" else above / self._sizes

    def expected_rate(self, value: float) -> float:
        """Mean of the shares, the others' among them."""
        above = float(self.shares(value).sum())
        if self.num_others:
            above += self.num_others * float((self._others > value).mean())
        return above / (self.num_parts + self.num_others)

    def quantile(self, rate: float) -> float:
        """The lowest threshold whose expected rate is no higher than ``rate``."""
        candidates = np.union1d(self.candidates, self._others)

        def kept(position: int) -> bool:
            # Rates are sums of shares: half a unit in the last place must not cost a photograph.
            return self.expected_rate(float(candidates[position])) <= rate + 1e-12

        return float(candidates[_lowest(len(candidates), kept)])

    def lowest_threshold(self, rate: float, confidence: float) -> float | None:
        """The lowest threshold that keeps a promise; None if not even the highest score does."""

        def kept(position: int) -> bool:
            return exceedance_probability(self.shares(float(self.candidates[position])), rate) <= 1.0 - confidence

        last = len(self.candidates) - 1
        return float(self.candidates[_lowest(last + 1, kept)]) if kept(last) else None


def _lowest(count: int, kept: Callable[[int], bool]) -> int:
    """The lowest of ``count`` positions that is ``kept``; all above it are, and at least the last."""
    return bisect.bisect_left(range(count - 1), True, key=kept)


def set_threshold(
    scores: npt.NDArray[np.floating],
    groups: Sequence[str],
    calibration: Calibration,
    *,
    groups_known: bool,
    num_left_out: int = 0,
    others: ScoreDeviation | None = None,
) -> Threshold:
    """The threshold at the rate asked for, and what it promises.

    In the mode ``promise`` it is the lowest that keeps the promise asked for, or the tightest that the parts allow.

    Args:
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each image shows.
        calibration: the false-reject rate asked for, what it means, its unit (parts or photographs), the confidence.
        groups_known: whether ``groups`` are known, or every image was taken for a part of its own.
        num_left_out: images that were left out as suspects, for the record.
        others: how much scores vary at other sites; without effect in the mode ``promise``.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """
    good = GoodScores(scores, groups, calibration.unit, others if calibration.mode == "expected" else None)
    value = rule_threshold(good, calibration)
    promised = _promise_at(good, value, calibration)
    if not groups_known:
        log.warning(
            "parts_unknown",
            note="no groups file; where more photographs show one part than were found, the promise is optimistic",
            parts=good.num_parts,
            photographs=len(good.scores),
        )
    return Threshold(
        value=value,
        false_reject_rate=promised,
        confidence=calibration.confidence,
        num_groups=good.num_parts,
        num_images=len(good.scores),
        groups_known=groups_known,
        requested_false_reject_rate=calibration.false_reject_rate,
        unit=calibration.unit,
        expected_false_reject_rate=good.expected_rate(value),
        num_left_out=num_left_out,
        num_other_parts=good.num_others,
        chosen_by=calibration.mode,
        with_more_parts=_with_more_parts(good, value, calibration.confidence),
        others=_other_promises(good, calibration),
    )


MORE_PARTS = (60, 120, 300, 1000)
"""Of these the first that would tighten a promise by a fifth is told."""


def rule_threshold(good: GoodScores, calibration: Calibration) -> float:
    """The threshold by the rule asked for; the highest score where the parts are too few for a promise."""
    if calibration.mode == "expected":
        return good.quantile(calibration.false_reject_rate)
    value = good.lowest_threshold(calibration.false_reject_rate, calibration.confidence)
    return float(good.candidates[-1]) if value is None else value


def _promise_at(good: GoodScores, value: float, calibration: Calibration) -> float:
    """What the threshold promises: what was asked for, or what it happens to keep."""
    if calibration.mode == "expected":
        return upper_confidence_bound(good.shares(value), calibration.confidence)
    if exceedance_probability(good.shares(value), calibration.false_reject_rate) <= 1.0 - calibration.confidence:
        return calibration.false_reject_rate
    promised = tightest_rate(good.num_parts, calibration.confidence)
    log.warning(
        "too_few_parts_for_promise",
        requested_false_reject_rate=calibration.false_reject_rate,
        promised_false_reject_rate=round(promised, 4),
        confidence=calibration.confidence,
        parts=good.num_parts,
        parts_needed=parts_needed(calibration.false_reject_rate, calibration.confidence),
    )
    return promised


def _with_more_parts(good: GoodScores, value: float, confidence: float) -> tuple[int, float] | None:
    """How many parts would promise a fifth less, and how much; None if no number in ``MORE_PARTS`` would."""
    shares = good.shares(value)
    now = upper_confidence_bound(shares, confidence)
    for count in MORE_PARTS:
        if count > good.num_parts:
            rate = upper_confidence_bound(np.resize(np.sort(shares)[::-1], count), confidence)
            if rate < 0.8 * now:
                return count, rate
    return None


def set_f1_threshold(
    scores: npt.NDArray[np.floating],
    groups: Sequence[str],
    defective: npt.NDArray[np.floating],
    calibration: Calibration,
    *,
    groups_known: bool,
) -> Threshold:
    """The threshold of the highest F1 on labelled images, and what it promises about good parts.

    It was chosen by the very scores that the promise rests on, so each score counts as a threshold that might have
    been chosen (Bonferroni): the promise is wide where parts are few.

    Args:
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each of them shows.
        defective: ``[M]`` scores of defective images.
        calibration: confidence and unit of the promise; its rate is only noted.
        groups_known: whether ``groups`` are known.

    Raises:
        DataError: no good or no defective scores.
        NumericalError: a score is not finite.
    """
    if len(defective) == 0:
        raise DataError("no defective images: the highest F1 needs labelled defects (test/<defect>)")
    if not np.isfinite(defective).all():
        raise NumericalError("a defective image has a score that is not a finite number")
    good = GoodScores(scores, groups, calibration.unit)
    _, value = best_f1(good.scores, np.asarray(defective, dtype=np.float64))
    confidence = 1.0 - (1.0 - calibration.confidence) / (len(good.candidates) + 1)
    promise = set_threshold(scores, groups, calibration, groups_known=groups_known)
    return msgspec.structs.replace(
        promise,
        value=value,
        false_reject_rate=upper_confidence_bound(good.shares(value), confidence),
        expected_false_reject_rate=good.expected_rate(value),
        chosen_by="f1",
        with_more_parts=None,
    )


def _other_promises(good: GoodScores, calibration: Calibration) -> tuple[ThresholdPromise, ...]:
    promises = []
    for rate in sorted({*OTHER_RATES, calibration.false_reject_rate}):
        value = good.lowest_threshold(rate, calibration.confidence)
        expected = None if value is None else good.expected_rate(value)
        promises.append(ThresholdPromise(false_reject_rate=rate, value=value, expected_false_reject_rate=expected))
    return tuple(promises)
