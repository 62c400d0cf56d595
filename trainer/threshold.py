"""The threshold, and what it can promise: an order statistic with a distribution-free confidence bound.

With the scores of m good parts in rising order, put the threshold at the k-th. The share F of good parts that
will score above it satisfies, whatever the scores' (continuous) distribution::

    P(F > x) = P(Binomial(m, x) <= m - k)

The part is the independent unit, not the photograph: a part's score is the highest of its photographs'. No torch
here, so that a line can set its threshold too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeflame.console import EventLog
from edgeflame.errors import DataError, NumericalError
from edgeflame.learning import Calibration
from edgeflame.package import Threshold

log = EventLog("threshold")


def set_threshold(
    scores: npt.NDArray[np.floating], groups: Sequence[str], calibration: Calibration, *, groups_known: bool
) -> Threshold:
    """The lowest threshold that keeps the promise asked for, or the tightest promise the parts allow.

    Args:
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each image shows.
        calibration: the false-reject rate and the confidence asked for.
        groups_known: whether ``groups`` is knowledge, or every image was taken for a part of its own.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """
    if len(scores) == 0:
        msg = "no good images to set a threshold with"
        raise DataError(msg)
    if not np.isfinite(scores).all():
        msg = "a good image has a score that is not a finite number"
        raise NumericalError(msg)
    part_scores = np.sort(highest_per_group(scores, groups))
    num_parts = len(part_scores)
    position = order_statistic(num_parts, calibration.false_reject_rate, calibration.confidence)
    if position is None:
        position, promised = num_parts, tightest_promise(num_parts, calibration.confidence)
        log.warning(
            "too_few_parts_for_promise",
            requested_false_reject_rate=calibration.false_reject_rate,
            promised_false_reject_rate=round(promised, 4),
            confidence=calibration.confidence,
            parts=num_parts,
            parts_needed=parts_needed(calibration.false_reject_rate, calibration.confidence),
        )
    else:
        promised = calibration.false_reject_rate
    if not groups_known:
        log.warning("parts_unknown", note="each photograph counted as a part of its own; the promise is optimistic")
    return Threshold(
        value=float(part_scores[position - 1]),
        false_reject_rate=promised,
        confidence=calibration.confidence,
        num_groups=num_parts,
        num_images=len(scores),
        groups_known=groups_known,
        requested_false_reject_rate=calibration.false_reject_rate,
    )


def highest_per_group(scores: npt.NDArray[np.floating], groups: Sequence[str]) -> npt.NDArray[np.float64]:
    """The highest score of each part, in the order of the parts' names."""
    highest: dict[str, float] = {}
    for score, group in zip(scores, groups, strict=True):
        highest[group] = max(highest.get(group, -math.inf), float(score))
    return np.array([highest[group] for group in sorted(highest)])


def order_statistic(num_parts: int, false_reject_rate: float, confidence: float) -> int | None:
    """The lowest k (from 1) whose k-th lowest score keeps the promise; None if not even the highest does."""
    best = None
    for position in range(num_parts, 0, -1):
        if binomial_cdf(num_parts - position, num_parts, false_reject_rate) > 1 - confidence:
            break
        best = position
    return best


def tightest_promise(num_parts: int, confidence: float) -> float:
    """The lowest false-reject rate that the highest of ``num_parts`` scores can promise: 1 - (1 - y)^(1/m)."""
    return float(-math.expm1(math.log1p(-confidence) / num_parts))


def parts_needed(false_reject_rate: float, confidence: float) -> int:
    """How many good parts a promise takes: 299 for 1% with 95% confidence."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-false_reject_rate))


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(Binomial(trials, probability) <= successes), summed from logarithms so that nothing underflows early."""
    log_p, log_q = math.log(probability), math.log1p(-probability)
    log_factorial = math.lgamma(trials + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(
                log_factorial - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
            )
            for k in range(successes + 1)
        ),
    )
