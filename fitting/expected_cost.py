"""The threshold of least expected cost, where some defective parts are labelled. They are in no statistics.

The cost of a threshold is the share of good parts above it, plus ``cost_of_miss`` times the share of defective parts
that are not. Shares, so that it does not depend on how many of each happen to be at hand: with one defective part in
fifty and a miss that costs 500 false rejects, ``cost_of_miss`` is 10.

- The shares of the labelled parts themselves would put the threshold right below the least of the defects, and the next
  one may lie lower. So scores count with a spread about them: a Gaussian kernel over the scores' logarithm. Its width
  is Silverman's, times 1.5, of the geometric mean of the two kinds' spreads: defects of many kinds lie far apart, those
  of one kind do not. In simulations (eight pairs of laws; 40 and 120 good parts, of which 5% may be rejected; 10 to
  100 defective ones; a miss costs 10) the threshold then cost at most 0.02 more on average than that of the good parts
  alone, and a fifth to a fourteenth of it where the two kinds lie apart; by the plain shares up to 0.4 more.
- Nobody has labelled all defects there will be. So one more defective part is reckoned with, which looks as the good
  ones do. Fewer labelled ones than ``cost_of_miss`` cannot outweigh it, and do not move the threshold.
- Good parts bound it: it is never lower than the threshold that was set by them alone, for the false-reject rate asked
  for. Where the least cost lies lower, that is said.
- The interval comes from drawing parts, good and defective, with replacement (bootstrap). It spans the cautious choice
  above and all thresholds of least cost by the plain shares: in the test's simulations both together hold the true
  optimum as often as stated, which neither does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.methods import RejectUnit
from edgeflame.tensors import F64
from edgeflame.threshold import LabelledDefects, Threshold

NUM_RESAMPLES = 1000

_NUM_THRESHOLDS = 256
"""Tried, by even steps of the scores' ranks, and as many by even ratios."""

_WIDTH = 0.9 * 1.5
"""Of the kernel; 0.9 is Silverman's factor."""

_LEAST = 1e-9
"""Scores are distances, and this is none."""


_normal_distribution = np.vectorize(NormalDist().cdf, otypes=[np.float64])


class _Parts:
    """Scores by part, each part counting alike: its photographs share its weight, or (unit part) the highest has it."""

    def __init__(self, scores: npt.NDArray[np.floating], groups: Sequence[str], unit: RejectUnit) -> None:
        values = np.maximum(np.asarray(scores, dtype=np.float64), _LEAST)
        part: npt.NDArray[np.intp]
        _, part = np.unique(np.asarray(groups), return_inverse=True)
        self.num_parts = int(part.max()) + 1
        if unit == "part":
            highest = np.full(self.num_parts, _LEAST)
            np.maximum.at(highest, part, values)
            values, part = highest, np.arange(self.num_parts)
        self.values: F64 = values
        self._part = part
        self._weights: F64 = 1.0 / np.bincount(part)[part]
        deviation, (low, high) = float(np.log(values).std()), np.quantile(np.log(values), [0.25, 0.75])
        self.spread = max(min(deviation, float(high - low) / 1.34) or deviation, 1e-3)
        """Robust standard deviation of the scores' logarithms."""

    def above(self, threshold: float) -> float:
        """The share above a threshold."""
        return float((self.values > threshold) @ self._weights / self.num_parts)

    def above_each(self, thresholds: F64) -> F64:
        """``[T, N]``: 1 where a score is above a threshold."""
        return np.less.outer(thresholds, self.values).astype(np.float64)

    def smooth_above(self, thresholds: F64, width: float) -> F64:
        """``[T, N]``: how much of each score is above each threshold, 0..1, with a kernel of ``width`` about it."""
        steps = np.subtract.outer(-np.log(thresholds), -np.log(self.values)) / width
        return np.asarray(_normal_distribution(steps), dtype=np.float64)

    def weights(self, rng: np.random.Generator | None = None) -> F64:
        """``[N]``: of each score, together 1; with ``rng`` after drawing as many parts with replacement."""
        if rng is None:
            return self._weights / self.num_parts
        counts = rng.multinomial(self.num_parts, np.full(self.num_parts, 1 / self.num_parts))
        return np.asarray(self._weights * counts[self._part] / self.num_parts)


def set_least_cost(
    by_good: Threshold,
    scores: npt.NDArray[np.floating],
    groups: Sequence[str],
    defective: npt.NDArray[np.floating],
    defective_groups: Sequence[str],
    *,
    cost_of_miss: float,
    seed: int = 0,
) -> Threshold:
    """The threshold of least expected cost, no lower than that of good parts alone; its promise holds for this one too.

    Args:
        by_good: the threshold that was set by the good parts alone, with its unit and confidence.
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each of them shows.
        defective: ``[M]`` scores of labelled defective images.
        defective_groups: the part that each of them shows.
        cost_of_miss: above 0.
        seed: of the bootstrap.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """
    if len(scores) == 0 or len(defective) == 0:
        raise DataError("the threshold of least cost needs good images and labelled defective ones")
    if not (np.isfinite(scores).all() and np.isfinite(defective).all()):
        raise NumericalError("an image has a score that is not a finite number")
    good, bad = _Parts(scores, groups, by_good.unit), _Parts(defective, defective_groups, by_good.unit)
    thresholds = _thresholds(np.concatenate([good.values, bad.values]), by_good.value)
    width = _WIDTH * np.sqrt(good.spread * bad.spread)
    rejected = good.smooth_above(thresholds, _WIDTH * good.spread * good.num_parts**-0.2)
    caught = bad.smooth_above(thresholds, float(width) * bad.num_parts**-0.2)

    def costs(of_good: F64, of_bad: F64) -> F64:
        good_share, missed = rejected @ of_good, 1.0 - caught @ of_bad
        return good_share + cost_of_miss * (bad.num_parts * missed + 1.0 - good_share) / (bad.num_parts + 1)

    cost = costs(good.weights(), bad.weights())
    free = float(thresholds[np.argmin(cost)])
    value = float(thresholds[np.argmin(np.where(thresholds < by_good.value, np.inf, cost))])
    rng = np.random.default_rng(seed)
    plainly_rejected, plainly_caught = good.above_each(thresholds), bad.above_each(thresholds)
    lowest, highest = [free], [free]
    for _ in range(NUM_RESAMPLES):
        of_good, of_bad = good.weights(rng), bad.weights(rng)
        plain = plainly_rejected @ of_good - cost_of_miss * (plainly_caught @ of_bad)
        least = (*np.flatnonzero(plain <= plain.min() + 1e-9)[[0, -1]], np.argmin(costs(of_good, of_bad)))
        lowest.append(float(thresholds[min(least)]))
        highest.append(float(thresholds[max(least)]))
    tail = (1.0 - by_good.confidence) / 2.0
    low = min(free, float(np.quantile(lowest, tail, method="inverted_cdf")))
    high = max(free, float(np.quantile(highest, 1.0 - tail, method="inverted_cdf")))
    labelled = LabelledDefects(
        cost_of_miss=cost_of_miss,
        num_groups=bad.num_parts,
        num_images=len(defective),
        missed=1.0 - bad.above(value),
        interval=(low, high),
        least_cost_at=free,
        least_cost_missed=1.0 - bad.above(free),
        least_cost_rejected=good.above(free),
    )
    if labelled.too_few:
        missed = 1.0 - bad.above(by_good.value)
        return msgspec.structs.replace(by_good, labelled=msgspec.structs.replace(labelled, missed=missed))
    return msgspec.structs.replace(
        by_good,
        value=value,
        expected_false_reject_rate=good.above(value),
        chosen_by="cost",
        with_more_parts=None,
        labelled=labelled,
    )


def _thresholds(values: F64, bound: float) -> F64:
    """``[T]``, rising: those to try, the bound of the good parts among them."""
    low, high = 0.7 * values.min(), values.max()
    by_rank = np.quantile(values, np.linspace(0, 1, _NUM_THRESHOLDS))
    return np.unique(np.concatenate([by_rank, np.geomspace(low, high, _NUM_THRESHOLDS), [bound]]))
