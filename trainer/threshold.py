"""The threshold, and what it can promise about good parts.

The lowest threshold is taken at which the share of good units that score above it is, with the confidence asked for,
no higher than the rate asked for. The part is the independent unit, whatever is judged: see :mod:`trainer.confidence`.
That doubt falls as the threshold rises, so no correction is needed for having searched: the threshold is wrong only
where the doubt is wrong at the one true quantile. No torch here, so that a line can set its threshold too.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.console import EventLog
from edgeflame.errors import DataError, NumericalError
from edgeflame.learning import Calibration
from edgeflame.threshold import Promise, Threshold, Unit
from trainer.confidence import doubt, parts_needed, tightest_promise, upper_bound
from trainer.metrics import best_f1

log = EventLog("threshold")

F64 = npt.NDArray[np.float64]

OTHER_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Promises shown beside the one asked for, so that a user sees what each costs."""


class GoodScores:
    """Scores of good images that the statistics have not seen, by the part they show.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """

    def __init__(self, scores: npt.NDArray[np.floating], groups: Sequence[str], unit: Unit) -> None:
        if len(scores) == 0:
            msg = "no good images to set a threshold with"
            raise DataError(msg)
        if not np.isfinite(scores).all():
            msg = "a good image has a score that is not a finite number"
            raise NumericalError(msg)
        self.scores = np.asarray(scores, dtype=np.float64)
        part: npt.NDArray[np.intp]
        _, part = np.unique(np.asarray(groups), return_inverse=True)
        self._part = part
        self._sizes: F64 = np.bincount(part).astype(np.float64)
        self._unit = unit
        self.candidates: F64 = np.unique(self.scores)
        """Thresholds that make a difference, rising."""

    @property
    def num_parts(self) -> int:
        return len(self._sizes)

    def shares(self, value: float) -> F64:
        """``[parts]``: the share of each part's photographs above a threshold; for whole parts 0 or 1."""
        above = np.bincount(self._part, weights=self.scores > value).astype(np.float64)
        return (above > 0).astype(np.float64) if self._unit == "part" else above / self._sizes

    def expected_rate(self, value: float) -> float:
        """Mean of the shares."""
        return float(self.shares(value).mean())

    def lowest_threshold(self, rate: float, confidence: float) -> float | None:
        """The lowest threshold that keeps a promise; None if not even the highest score does."""

        def kept(position: int) -> bool:
            return doubt(self.shares(float(self.candidates[position])), rate) <= 1.0 - confidence

        low, high = 0, len(self.candidates) - 1
        if not kept(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if kept(middle) else (middle + 1, high)
        return float(self.candidates[low])


def set_threshold(
    scores: npt.NDArray[np.floating],
    groups: Sequence[str],
    calibration: Calibration,
    *,
    groups_known: bool,
    num_left_out: int = 0,
) -> Threshold:
    """The lowest threshold that keeps the promise asked for, or the tightest promise the parts allow.

    Args:
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each image shows.
        calibration: the false-reject rate, of what, and the confidence asked for.
        groups_known: whether ``groups`` is knowledge, or every image was taken for a part of its own.
        num_left_out: images that were left out as suspects, for the record.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """
    good = GoodScores(scores, groups, calibration.unit)
    value = good.lowest_threshold(calibration.false_reject_rate, calibration.confidence)
    promised = calibration.false_reject_rate
    if value is None:
        value = float(good.candidates[-1])
        promised = tightest_promise(good.num_parts, calibration.confidence)
        log.warning(
            "too_few_parts_for_promise",
            requested_false_reject_rate=calibration.false_reject_rate,
            promised_false_reject_rate=round(promised, 4),
            confidence=calibration.confidence,
            parts=good.num_parts,
            parts_needed=parts_needed(calibration.false_reject_rate, calibration.confidence),
        )
    if not groups_known:
        log.warning("parts_unknown", note="each photograph counted as a part of its own; the promise is optimistic")
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
        others=_others(good, calibration),
    )


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
        calibration: the confidence of the promise, and of what; its rate is only noted.
        groups_known: whether ``groups`` is knowledge.

    Raises:
        DataError: no good or no defective scores.
        NumericalError: a score is not finite.
    """
    if len(defective) == 0:
        msg = "no defective images: the highest F1 needs labelled defects (test/<defect>)"
        raise DataError(msg)
    if not np.isfinite(defective).all():
        msg = "a defective image has a score that is not a finite number"
        raise NumericalError(msg)
    good = GoodScores(scores, groups, calibration.unit)
    _, value = best_f1(good.scores, np.asarray(defective, dtype=np.float64))
    confidence = 1.0 - (1.0 - calibration.confidence) / (len(good.candidates) + 1)
    promise = set_threshold(scores, groups, calibration, groups_known=groups_known)
    return msgspec.structs.replace(
        promise,
        value=value,
        false_reject_rate=upper_bound(good.shares(value), confidence),
        expected_false_reject_rate=good.expected_rate(value),
        chosen_by="f1",
    )


def _others(good: GoodScores, calibration: Calibration) -> tuple[Promise, ...]:
    promises = []
    for rate in sorted({*OTHER_RATES, calibration.false_reject_rate}):
        value = good.lowest_threshold(rate, calibration.confidence)
        expected = None if value is None else good.expected_rate(value)
        promises.append(Promise(false_reject_rate=rate, value=value, expected_false_reject_rate=expected))
    return tuple(promises)
