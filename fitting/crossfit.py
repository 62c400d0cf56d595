"""Fitting Gaussian statistics to embeddings, choosing rank and ridge, and scoring good images as if they were unseen.

Cross-fitting: the parts are dealt into folds; the statistics of all folds but one score the one. Every image gets
an honest score, and still serves the final statistics. The same held-out images choose rank and ridge, where the
configuration leaves them open, by their likelihood. Fewer images than channels are fitted from the embeddings
themselves; more of them from moments, whose memory does not grow with the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edgeflame.errors import DataError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning, Scoring
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian, fit_gaussian, fit_gaussian_to_samples, smooth_maps
from edgeflame.statistics.maps import shown_maps
from edgeflame.statistics.moments import MomentAccumulator, Moments
from edgeflame.tensors import F32, F64
from fitting.embeddings import Embeddings
from fitting.suspects import HighestMaps

log = EventLog("gaussian")

MIN_IMAGES = 4
"""Fewer give no useful covariance once a fold is left out."""

MIN_GROUPS = 2
"""With one part nothing can be held out."""


RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried when the ridge is chosen automatically; few images call for much of it."""


@dataclass(frozen=True, kw_only=True)
class PooledStatistics:
    """Statistics of a fleet.

    Attributes:
        moments: of the images of all sites that contributed.
        holds_these: whether this site contributed; its parts are then taken out before they are scored as unseen.
    """

    moments: Moments
    holds_these: bool


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """Scores of N images by statistics that did not see their parts.

    Attributes:
        scores: ``[N]`` raw image scores.
        means: ``[N]`` means of the maps whose maxima these are.
        highest_maps: image index to the map ``[h, w]`` to show of the highest of these scores, the highest first.
    """

    scores: F64
    means: F64
    highest_maps: dict[int, F32]


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Statistics of all images, and the images' scores by statistics that did not see them.

    Attributes:
        statistics: of all images, as a package stores them.
        held_out: by the statistics of the other folds.
        likelihoods: mean held-out log-likelihood per image and position, by ridge (text), then by rank 0, 1, ...
            (where the rank was given, only that one); None if neither was to be chosen.
    """

    statistics: LowRankGaussian
    held_out: HeldOutScores
    likelihoods: dict[str, list[float]] | None


def require_enough(num_images: int, num_groups: int) -> None:
    """Refuse too few images or parts for statistics and a threshold.

    Raises:
        DataError: fewer images or parts than the method needs.
    """
    if num_images < MIN_IMAGES or num_groups < MIN_GROUPS:
        raise DataError(
            f"the statistics need at least {MIN_IMAGES} readable good images of at least {MIN_GROUPS} parts, "
            f"got {num_images} of {num_groups}"
        )


def score_maps(statistics: PackageStatistics, embeddings: F32, scoring: Scoring) -> F32:
    """Smoothed distances (Eq. 18, 23): ``[N, P, C]`` to ``[N, h, w]`` float32."""
    return _smoothed(_unsmoothed_maps(statistics, embeddings), scoring)


def _unsmoothed_maps(statistics: PackageStatistics, embeddings: F32) -> F32:
    return statistics.distances(embeddings).reshape(-1, *statistics.grid).astype(np.float32)


def _smoothed(maps: F32, scoring: Scoring) -> F32:
    return smooth_maps(maps, scoring.smoothing_sigma).astype(np.float32)


def image_scores(maps: F32) -> F32:
    """The highest value of each map (Eq. 22): ``[N, h, w]`` to ``[N]``."""
    scores: F32 = maps.max(axis=(1, 2))
    return scores


def make_folds(groups: Sequence[str], num_folds: int, seed: int) -> list[list[int]]:
    """Deal whole parts into folds of about equal numbers of images.

    Args:
        groups: the part that each image shows.
        num_folds: at most; fewer when there are fewer parts.
        seed: of the order in which parts of one size are dealt.

    Returns:
        Image indices of each fold, rising.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    # The largest parts first, each into the emptiest fold.
    dealt = sorted((names[i] for i in order), key=lambda name: -len(members[name]))
    folds: list[list[int]] = [[] for _ in range(min(num_folds, len(names)))]
    for name in dealt:
        min(folds, key=len).extend(members[name])
    return [sorted(fold) for fold in folds]


def require_images_left(count: int) -> None:
    if count < 2:
        raise DataError("one part holds nearly all the images; the statistics need other parts to be tested on")


def score_held_out(
    embeddings: Embeddings,
    folds: Iterable[tuple[list[int], PackageStatistics]],
    scoring: Scoring,
    *,
    counter: ProgressCounter,
) -> HeldOutScores:
    """Score each fold's images by statistics that did not see them.

    Args:
        embeddings: of all images.
        folds: image indices, and the statistics of the others; together they are all images.
        scoring: the configuration.
        counter: counts images.

    Raises:
        NumericalError: an embedding is not finite.
    """
    scores, means, highest = np.zeros(len(embeddings)), np.zeros(len(embeddings)), HighestMaps()
    for fold, statistics in folds:
        for indices, batch in embeddings.batches(fold):
            unsmoothed = _unsmoothed_maps(statistics, batch)
            maps = _smoothed(unsmoothed, scoring)
            scores[indices], means[indices] = image_scores(maps), maps.mean(axis=(1, 2), dtype=np.float64)
            highest.add(indices, scores[indices], shown_maps(unsmoothed, scores[indices]))
            counter.add(len(indices), "scoring held-out parts")
    return HeldOutScores(scores=scores, means=means, highest_maps=highest.by_index())


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
    counter = ProgressCounter(progress, total=num_images * (4 if automatic else 3))
    few = pooled is None and num_images <= embeddings.num_channels
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

    stored = (replace(one.truncated(rank), ridge=ridge).as_stored() for one in without)
    held_out = score_held_out(embeddings, zip(folds, stored, strict=True), scoring, counter=counter)
    statistics = fitter.fit(leave_out=[], rank=rank, ridge=ridge).as_stored()
    return CrossFit(
        statistics=statistics,
        held_out=held_out,
        likelihoods={
            f"{value:g}": [round(float(one), 3) for one in row if np.isfinite(one)]
            for value, row in zip(ridges, likelihoods, strict=True)
        }
        if automatic
        else None,
    )


class ProgressCounter:
    """Adds up what several passes over the images did, for one progress report."""

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

    def __init__(self, embeddings: Embeddings, counter: ProgressCounter) -> None:
        self._grid = embeddings.grid
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

    def __init__(self, embeddings: Embeddings, counter: ProgressCounter, pooled: PooledStatistics | None) -> None:
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
        return fit_gaussian(moments, grid=self._embeddings.grid, rank=rank, ridge=ridge)
