"""Detection metrics, and their confidence intervals, by the cluster bootstrap.

**Metrics.** A test set has tens of millions of pixels but its maps only a few hundred thousand cells, so pixels are
counted into bins first and memory stays bounded. The pixels' values lie between those of the cells, so bins with edges
at the cells' quantiles hold about equally many pixels each, and a weighted AUROC over the bins differs from the exact
one by less than 1e-4.

**Intervals.** Parts are resampled, each with all its photographs (the cluster bootstrap), all resamples at once. A
resample is the number of times each part was drawn. So what each part contributes, counted once (its photographs by
score, its pixels by bin), times those numbers gives every resample's counts, by one matrix product; and the metrics of
all resamples follow from their cumulative sums. The tests hold all of them against scikit-learn, which would take
minutes for a thousand resamples of ten metrics, and which a line does not have.

Axes: ``R`` resamples, ``G`` parts, ``K`` values or bins in rising order of the score.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.tensors import F64

NUM_BINS = 8192

NUM_COARSE_BINS = 1024
"""Bins kept for every part, for the intervals: these need the figures' spread, not their last digits."""

AUPRO_MAX_FPR = 0.3
"""Up to which false-positive rate the per-region overlap is integrated, as in the MVTec AD benchmark."""


def auroc(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> float | None:
    """Area under the ROC curve of image scores; None if either kind is missing."""
    if len(good) == 0 or len(defective) == 0:
        return None
    _, counts = _counts_by_value(good, defective)
    return float(auroc_of_counts(*counts[:, None])[0])


def f1_max(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> float | None:
    """The highest F1 over all thresholds, defective being positive; None if either kind is missing."""
    return best_f1(good, defective)[0] if len(good) and len(defective) else None


def best_f1(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The highest F1 over all thresholds, defective being positive, and a threshold that gives it.

    Neither kind may be missing. What scores above the threshold is called defective; it lies half way to the next
    lower score.
    """
    values, (of_good, of_defective) = _counts_by_value(good, defective)
    f1, at = _best_f1(of_good, of_defective)
    value = float(values[at])
    low = float(values[at - 1]) if at else value * (1.0 - 1e-6)
    return f1, (low + value) / 2.0


def caught_and_rejected(
    good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """``[K]`` each: how many defective and good scores reach each of the K distinct values, the highest first."""
    _, counts = _counts_by_value(good, defective)
    rejected, caught = np.cumsum(counts[:, ::-1], axis=1).astype(np.intp)
    return caught, rejected


def _counts_by_value(
    good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.floating], F64]:
    """The distinct scores, rising ``[K]``, and how many of the good and of the defective have each ``[2, K]``."""
    values, which = np.unique(np.concatenate([good, defective]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(values)) for part in (which[: len(good)], which[len(good) :])]
    return values, np.stack(counts).astype(np.float64)


class PixelCounts:
    """Counts of good and defective pixels by score, and the mean overlap of defect regions.

    Args:
        edges: rising inner edges of the bins, see :func:`bin_edges`.
    """

    def __init__(self, edges: npt.NDArray[np.float32]) -> None:
        self._edges = edges
        self._good = np.zeros(len(edges) + 1)
        self._defective = np.zeros(len(edges) + 1)
        self._regions = np.zeros(len(edges) + 1)
        self._num_regions = 0

    def add(self, anomaly_map: npt.NDArray[np.float32], mask: npt.NDArray[np.uint8] | None) -> None:
        """Count one image.

        Args:
            anomaly_map: ``[H, W]``.
            mask: ``[H, W]``, above 0 where defective; None for a good image.
        """
        bins = np.searchsorted(self._edges, anomaly_map, side="right")
        if mask is None:
            self._good += self._count(bins.ravel())
            return
        defective = mask > 0
        self._good += self._count(bins[~defective])
        self._defective += self._count(bins[defective])
        num_labels, labels = cv2.connectedComponents(mask, connectivity=8)
        for label in range(1, num_labels):
            region = bins[labels == label]
            self._regions += self._count(region) / len(region)
            self._num_regions += 1

    def merge(self, other: PixelCounts) -> None:
        """Add what another has counted in the same bins."""
        self._good += other._good
        self._defective += other._defective
        self._regions += other._regions
        self._num_regions += other._num_regions

    def auroc(self) -> float | None:
        """Area under the ROC curve over pixels; None if either kind is missing."""
        if not self._good.any() or not self._defective.any():
            return None
        return float(auroc_of_counts(self._good[None], self._defective[None])[0])

    def best_f1(self) -> tuple[float, float] | None:
        """The highest F1 over pixels and the threshold that gives it; None if either kind is missing."""
        if not self._good.any() or not self._defective.any() or not len(self._edges):
            return None
        f1, value = _best_f1(self._good, self._defective)
        # Bin b begins at edge b - 1.
        return f1, float(self._edges[max(0, value - 1)])

    def aupro(self, max_fpr: float = AUPRO_MAX_FPR) -> float | None:
        """Area under the per-region-overlap curve up to ``max_fpr``, as a share of ``max_fpr``.

        Per-region overlap: the mean over defect regions of the share of the region above the threshold. No
        library among the dependencies has it.
        """
        if not self._good.any() or self._num_regions == 0:
            return None
        return overlap_area(self._good, self._regions, self._num_regions, max_fpr)

    def coarse(self) -> F64:
        """``[3, NUM_COARSE_BINS or fewer]``: good and defective pixels and shares of regions in wider bins."""
        size = len(self._good)
        starts = np.unique(np.linspace(0, size, NUM_COARSE_BINS, endpoint=False).astype(np.intp))
        counts: F64 = np.add.reduceat(np.stack([self._good, self._defective, self._regions]), starts, axis=1)
        return counts

    @property
    def num_regions(self) -> int:
        """Connected defect regions counted."""
        return self._num_regions

    def _count(self, bins: npt.NDArray[np.intp]) -> F64:
        return np.bincount(bins, minlength=len(self._edges) + 1).astype(np.float64)


def overlap_area(good: F64, regions: F64, num_regions: float, max_fpr: float) -> float:
    """Area under the per-region-overlap curve of counts ``[K]`` by rising bin, as a share of ``max_fpr``."""
    fpr = np.concatenate([[0.0], np.cumsum(good[::-1]) / good.sum()])
    pro = np.concatenate([[0.0], np.cumsum(regions[::-1]) / num_regions])
    inside = fpr <= max_fpr
    fpr_cut = np.concatenate([fpr[inside], [max_fpr]])
    pro_cut = np.concatenate([pro[inside], [np.interp(max_fpr, fpr, pro)]])
    area = float((np.diff(fpr_cut) * (pro_cut[1:] + pro_cut[:-1])).sum() / 2.0)
    return area / max_fpr


def bin_edges(maps: npt.NDArray[np.float32], num_bins: int = NUM_BINS) -> npt.NDArray[np.float32]:
    """Inner edges of bins that hold about equally many cells of ``maps [N, h, w]``."""
    quantiles = np.quantile(maps, np.linspace(0, 1, num_bins + 1)[1:-1])
    edges: npt.NDArray[np.float32] = np.unique(quantiles).astype(np.float32)
    return edges


def _best_f1(good: F64, defective: F64) -> tuple[float, int]:
    """The highest F1 of counts ``[K]`` by rising value, and the lowest value, by its index, that it calls positive."""
    caught, rejected = np.cumsum(defective[::-1])[::-1], np.cumsum(good[::-1])[::-1]
    # 2 TP / (2 TP + FP + FN), where TP + FN is the number of defective ones; nothing is called positive by no score.
    f1 = np.where(good + defective > 0, 2 * caught / (caught + rejected + defective.sum()), -1.0)
    best = int(np.argmax(f1))
    return float(f1[best]), best


NUM_RESAMPLES = 1000

MAX_DISTINCT_SCORES = 2048
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
    """Rising values that tell the scores apart, at most ``MAX_DISTINCT_SCORES``."""
    values = np.unique(scores)
    if len(values) <= MAX_DISTINCT_SCORES:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_DISTINCT_SCORES).astype(np.intp)]


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
        regions: ``[R, K]`` shares of regions, see :class:`fitting.metrics.PixelCounts`.
        num_regions: ``[R]``.
        max_fpr: up to which false-positive rate.
    """
    return np.array(
        [
            np.nan if not one_good.any() or number == 0 else overlap_area(one_good, one_regions, number, max_fpr)
            for one_good, one_regions, number in zip(good, regions, num_regions, strict=True)
        ]
    )


def bootstrap_interval(values: F64) -> tuple[float, float] | None:
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
