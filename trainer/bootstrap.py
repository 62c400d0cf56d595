"""Intervals by resampling parts, each with all its photographs (the cluster bootstrap), all resamples at once.

A resample is the number of times each part was drawn. So what each part contributes, counted once (its photographs by
score, its pixels by bin), times those numbers gives every resample's counts, by one matrix product; and the figures of
all resamples follow from their cumulative sums. scikit-learn computes the figures themselves; a thousand resamples of
ten figures would take it minutes, so here they are written out, and held against it in the tests.

Axes: ``R`` resamples, ``G`` parts, ``K`` values or bins in rising order of the score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.metrics import AUPRO_MAX_FPR, overlap_area

F64 = npt.NDArray[np.float64]

NUM_RESAMPLES = 1000

MAX_VALUES = 2048
"""Distinct image scores kept apart; beyond that they are binned by rank, so that memory stays bounded."""


class Resamples:
    """Which parts were drawn, and how often.

    Attributes:
        drawn: ``[R, G]``.
    """

    def __init__(self, num_parts: int, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> None:
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(num_parts, np.full(num_parts, 1.0 / num_parts), size=num_resamples)
        self.drawn: F64 = drawn.astype(np.float64)

    def counts(self, per_part: npt.NDArray[np.floating]) -> F64:
        """``[G, ...]`` of each part to ``[R, ...]`` of each resample."""
        counts: F64 = np.tensordot(self.drawn, per_part.astype(np.float64), axes=1)
        return counts


def image_counts(
    scores: npt.NDArray[np.floating], parts: npt.NDArray[np.intp], num_parts: int, values: npt.NDArray[np.floating]
) -> F64:
    """``[G, K]``: how many images of each part have each of the rising ``values``, or lie between it and the next.

    Args:
        scores: ``[N]``, none below the first value.
        parts: ``[N]`` index of the part of each image.
        num_parts: G.
        values: ``[K]``, see :func:`distinct_values`.
    """
    counts = np.zeros((num_parts, len(values)))
    np.add.at(counts, (parts, np.searchsorted(values, scores, side="right") - 1), 1.0)
    return counts


def distinct_values(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Rising values that tell the scores apart, at most ``MAX_VALUES``."""
    values = np.unique(scores)
    if len(values) <= MAX_VALUES:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_VALUES).astype(np.intp)]


def auroc_of_counts(good: F64, defective: F64) -> F64:
    """Area under the ROC curve of each resample, by Mann and Whitney; NaN where a kind is missing.

    Args:
        good: ``[R, K]``.
        defective: ``[R, K]``.
    """
    below = np.cumsum(good, axis=1) - good
    wins = ((below + 0.5 * good) * defective).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: F64 = wins / (good.sum(axis=1) * defective.sum(axis=1))
    return area


def f1_of_counts(good: F64, defective: F64) -> F64:
    """The highest F1 over all thresholds of each resample ``[R, K]``; NaN where a kind is missing."""
    caught = np.cumsum(defective[:, ::-1], axis=1)
    rejected = np.cumsum(good[:, ::-1], axis=1)
    total = defective.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        # 2 TP / (2 TP + FP + FN), where TP + FN is the number of defective ones.
        best: F64 = (2 * caught / (caught + rejected + total)).max(axis=1)
    best[(total[:, 0] == 0) | (rejected[:, -1] == 0)] = np.nan
    return best


def aupro_of_counts(good: F64, regions: F64, num_regions: F64, max_fpr: float = AUPRO_MAX_FPR) -> F64:
    """Area under the per-region-overlap curve of each resample; NaN where good pixels or regions are missing.

    Args:
        good: ``[R, K]`` good pixels.
        regions: ``[R, K]`` shares of regions, see :class:`trainer.metrics.PixelCounts`.
        num_regions: ``[R]``.
        max_fpr: up to which false-positive rate.
    """
    return np.array(
        [
            np.nan if not one_good.any() or number == 0 else overlap_area(one_good, one_regions, number, max_fpr)
            for one_good, one_regions, number in zip(good, regions, num_regions, strict=True)
        ]
    )


def interval(values: F64) -> tuple[float, float] | None:
    """The middle 95% of the defined ones among ``[R]`` values; None if fewer than half are."""
    defined = values[np.isfinite(values)]
    if len(defined) < max(1.0, len(values) / 2):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def mean_over_classes(per_class: Sequence[F64]) -> F64:
    """``[R]``: the mean over classes in each resample; NaN where one is not defined, for it would be another mean."""
    mean: F64 = np.mean(np.stack(list(per_class)), axis=0)
    return mean
