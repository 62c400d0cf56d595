"""Detection metrics, by scikit-learn; pixels are counted into bins first, so that memory stays bounded.

A test set has tens of millions of pixels but its maps only a few hundred thousand cells. The pixels' values lie
between those of the cells, so bins with edges at the cells' quantiles hold about equally many pixels each, and a
weighted AUROC over the bins differs from the exact one by less than 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

F64 = npt.NDArray[np.float64]

NUM_BINS = 8192

AUPRO_MAX_FPR = 0.3
"""Up to which false-positive rate the per-region overlap is integrated, as in the MVTec AD benchmark."""


def auroc(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> float | None:
    """Area under the ROC curve of image scores; None if either kind is missing."""
    if len(good) == 0 or len(defective) == 0:
        return None
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(defective))])
    return float(roc_auc_score(labels, np.concatenate([good, defective])))


def f1_max(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> float | None:
    """The highest F1 over all thresholds, defective being positive; None if either kind is missing."""
    return best_f1(good, defective)[0] if len(good) and len(defective) else None


def best_f1(good: npt.NDArray[np.floating], defective: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The highest F1 over all thresholds, defective being positive, and a threshold that gives it.

    Neither kind may be missing. What scores above the threshold is called defective; it lies half way to the next
    lower score.
    """
    scores = np.concatenate([good, defective])
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(defective))])
    precision, recall, values = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    # scikit-learn calls positive what reaches a value; the last entry has none and calls nothing positive.
    best = int(np.argmax(f1[:-1]))
    below = scores[scores < values[best]]
    low = float(below.max()) if len(below) else float(values[best]) * (1.0 - 1e-6)
    return float(f1[best]), (low + float(values[best])) / 2.0


def bootstrap_auroc(
    good: Sequence[npt.NDArray[np.floating]],
    defective: Sequence[npt.NDArray[np.floating]],
    *,
    num_resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    """A 95% interval of the AUROC by resampling parts, each with all its photographs.

    Args:
        good: the scores of each part's good photographs.
        defective: the scores of each part's defective photographs; a part may be in both, at the same place.
        num_resamples: how often.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        chosen = rng.integers(0, len(good), len(good))
        value = auroc(
            np.concatenate([good[index] for index in chosen]), np.concatenate([defective[index] for index in chosen])
        )
        if value is not None:
            values.append(value)
    if len(values) < num_resamples // 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


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
        bins = np.arange(len(self._good))
        labels = np.concatenate([np.zeros_like(self._good), np.ones_like(self._defective)])
        weights = np.concatenate([self._good, self._defective])
        return float(roc_auc_score(labels, np.concatenate([bins, bins]), sample_weight=weights))

    def aupro(self, max_fpr: float = AUPRO_MAX_FPR) -> float | None:
        """Area under the per-region-overlap curve up to ``max_fpr``, as a share of ``max_fpr``.

        Per-region overlap: the mean over defect regions of the share of the region above the threshold. No
        library among the dependencies has it.
        """
        if not self._good.any() or self._num_regions == 0:
            return None
        fpr = np.concatenate([[0.0], np.cumsum(self._good[::-1]) / self._good.sum()])
        pro = np.concatenate([[0.0], np.cumsum(self._regions[::-1]) / self._num_regions])
        inside = fpr <= max_fpr
        fpr_cut = np.concatenate([fpr[inside], [max_fpr]])
        pro_cut = np.concatenate([pro[inside], [np.interp(max_fpr, fpr, pro)]])
        return float(auc(fpr_cut, pro_cut) / max_fpr)

    def _count(self, bins: npt.NDArray[np.intp]) -> F64:
        return np.bincount(bins, minlength=len(self._edges) + 1).astype(np.float64)


def bin_edges(maps: npt.NDArray[np.float32], num_bins: int = NUM_BINS) -> npt.NDArray[np.float32]:
    """Inner edges of bins that hold about equally many cells of ``maps [N, h, w]``."""
    quantiles = np.quantile(maps, np.linspace(0, 1, num_bins + 1)[1:-1])
    edges: npt.NDArray[np.float32] = np.unique(quantiles).astype(np.float32)
    return edges
