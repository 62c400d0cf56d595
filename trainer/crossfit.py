"""Fitting the Gaussian statistics to embeddings, choosing rank and ridge, and scoring every image by cross-fitting.

The folds and the result are described in :mod:`fitting.crossfit`. Fewer images than channels are fitted from the
embeddings themselves; more of them from moments, whose memory does not grow with the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.statistics.gaussian import LowRankGaussian, fit_gaussian, fit_gaussian_to_samples
from edgeflame.statistics.moments import MomentAccumulator
from fitting.crossfit import (
    RIDGES,
    CrossFit,
    PooledStatistics,
    image_scores,
    make_folds,
    require_enough,
    require_images_left,
    score_maps,
)
from fitting.suspects import HighestMaps
from trainer.embedding import Embeddings

log = EventLog("gaussian")


def cross_fit(
    embeddings: Embeddings,
    groups: Sequence[str],
    learning: Learning,
    *,
    pooled: PooledStatistics | None = None,
    progress: Progress = no_progress,
) -> CrossFit:
    """Fit the statistics and score every image by those that did not see it.

    Args:
        embeddings: of the N good images.
        groups: the part that each image shows.
        learning: ``scoring``, ``calibration.folds`` and ``seed`` are used.
        pooled: statistics of more images than these, to be used instead of these images' own.
        progress: counts images, over all passes.

    Raises:
        DataError: fewer images or parts than the method needs.
        NumericalError: an embedding is not finite, or nothing varies between the images.
    """
    scoring = learning.scoring
    num_images = len(groups)
    require_enough(num_images, len(set(groups)))
    folds = make_folds(groups, learning.calibration.folds, learning.seed)
    automatic = scoring.rank == "auto" or scoring.ridge == "auto"
    rank = scoring.max_rank if scoring.rank == "auto" else scoring.rank
    ridges = RIDGES if scoring.ridge == "auto" else (scoring.ridge,)
    counter = _ProgressCounter(progress, total=num_images * (4 if automatic else 3))
    few = pooled is None and num_images <= embeddings.network.num_channels
    fitter: _Fitter = _SampleFitter(embeddings, counter) if few else _MomentFitter(embeddings, counter, pooled)

    without: list[LowRankGaussian] = []
    likelihoods = np.zeros((len(ridges), rank + 1))
    for fold in folds:
        gaussian = fitter.fit(leave_out=fold, rank=rank, ridge=ridges[0])
        without.append(gaussian)
        likelihoods = likelihoods[:, : gaussian.rank + 1]
        if automatic:
            for indices, batch in embeddings.batches(fold):
                share = len(indices) / num_images
                likelihoods += share * gaussian.log_likelihoods(batch, ridges)[:, : likelihoods.shape[1]]
                counter.add(len(indices), "choosing rank and ridge")
    ridge = ridges[0]
    if automatic:
        if scoring.rank != "auto":
            likelihoods[:, :-1] = -np.inf
        row, rank = (int(index) for index in np.unravel_index(np.argmax(likelihoods), likelihoods.shape))
        ridge = ridges[row]
        log.info("rank_and_ridge_chosen", rank=rank, ridge=ridge, log_likelihood=float(likelihoods[row, rank]))

    scores, means = np.zeros(num_images), np.zeros(num_images)
    highest = HighestMaps()
    for fold, gaussian in zip(folds, without, strict=True):
        stored = replace(gaussian.truncated(rank), ridge=ridge).as_stored()
        for indices, batch in embeddings.batches(fold):
            maps = score_maps(stored, batch, scoring)
            scores[indices], means[indices] = image_scores(maps), maps.mean(axis=(1, 2), dtype=np.float64)
            highest.add(indices, scores[indices], maps)
            counter.add(len(indices), "scoring held-out parts")
    statistics = fitter.fit(leave_out=[], rank=rank, ridge=ridge).as_stored()
    return CrossFit(
        statistics=statistics,
        held_out_scores=scores,
        held_out_means=means,
        highest_maps=highest.by_index(),
        likelihoods={
            f"{value:g}": [round(float(one), 3) for one in row if np.isfinite(one)]
            for value, row in zip(ridges, likelihoods, strict=True)
        }
        if automatic
        else None,
    )


class _ProgressCounter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int, note: str) -> None:
        self._done += count
        self._progress(self._done, self._total, note)


class _Fitter(Protocol):
    def fit(self, *, leave_out: Sequence[int], rank: int, ridge: float) -> LowRankGaussian:
        """Statistics of all images but some."""
        ...


class _SampleFitter:
    """From the embeddings themselves: for fewer images than channels, where that is far less work."""

    def __init__(self, embeddings: Embeddings, counter: _ProgressCounter) -> None:
        self._grid = embeddings.network.grid
        self._counter = counter
        batches = []
        for indices, batch in embeddings.batches(range(len(embeddings))):
            batches.append(batch)
            counter.add(len(indices), "embeddings")
        self._all = np.concatenate(batches)

    def fit(self, *, leave_out: Sequence[int], rank: int, ridge: float) -> LowRankGaussian:
        samples = np.delete(self._all, list(leave_out), axis=0)
        require_images_left(len(samples))
        self._counter.add(len(leave_out), "leaving parts out")
        return fit_gaussian_to_samples(samples, grid=self._grid, rank=rank, ridge=ridge)


class _MomentFitter:
    """From moments, whose memory does not grow with the images; a fold is left out by taking it from the whole."""

    def __init__(self, embeddings: Embeddings, counter: _ProgressCounter, pooled: PooledStatistics | None) -> None:
        self._embeddings = embeddings
        self._counter = counter
        self._holds_these = pooled is None or pooled.holds_these
        if pooled is not None:
            self._whole = pooled.moments
            return
        accumulator = MomentAccumulator()
        for indices, batch in embeddings.batches(range(len(embeddings))):
            accumulator.add(batch)
            counter.add(len(indices), "moments")
        self._whole = accumulator.moments()

    def fit(self, *, leave_out: Sequence[int], rank: int, ridge: float) -> LowRankGaussian:
        moments = self._whole
        if len(leave_out) and self._holds_these:
            accumulator = MomentAccumulator(self._whole)
            for indices, batch in self._embeddings.batches(leave_out):
                accumulator.remove(batch)
                self._counter.add(len(indices), "leaving parts out")
            require_images_left(accumulator.count)
            moments = accumulator.moments()
        return fit_gaussian(moments, grid=self._embeddings.network.grid, rank=rank, ridge=ridge)
