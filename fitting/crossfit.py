"""Fitting Gaussian statistics to embeddings, and scoring good images as if they were unseen.

Cross-fitting: the parts are dealt into folds; the statistics of all folds but one score the one. Every image gets an
honest score, and still serves the final statistics. A fold is left out by taking its moments from those of the whole,
so that memory does not grow with the images.

The held-out scores also choose the radius over which moments are pooled, where the configuration leaves it open: the
wider one where it accepts clearly less while it keeps as many of the good parts. What is accepted at the threshold t is
an ellipsoid at every position; the mean logarithm of its volume is, but for a constant, C log t + 1/2 log det S (a
minimum-volume set: Scott and Nowak 2006, "Learning minimum volume sets"). Unlike a likelihood it does not reward a
close fit to most good parts that makes outliers of some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeflame.errors import DataError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Calibration, Learning, Scoring
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian, fit_gaussian, smooth_maps
from edgeflame.statistics.maps import shown_maps
from edgeflame.statistics.moments import MomentAccumulator, Moments
from edgeflame.statistics.shared import ScoreDeviation, StatisticsHeader
from edgeflame.tensors import F32, F64
from fitting.embeddings import Embeddings
from fitting.prior import NUM_FOLDS, FleetPrior, PriorWeights, choose_weights
from fitting.suspects import HighestMaps
from fitting.threshold import GoodScores, fleet_spread

log = EventLog("gaussian")

MIN_IMAGES = 4
"""Fewer give no useful covariance once a fold is left out."""

MIN_GROUPS = 2
"""With one part nothing can be held out."""


RADII = (0, 1)
"""Tried when the pooling radius is chosen automatically. Wider pooling takes positions apart that differ."""

LEAST_GAIN = 0.06
"""By how much the mean log-volume per channel must fall for the wider radius to be taken. Parts that lie differently
gain 0.2 to 0.5, others 0.01 to 0.07; where little is gained, positions that differ are better kept apart."""

RIDGE_IMAGES, MIN_RIDGE, MAX_RIDGE = 12.0, 0.03, 0.3
"""The automatic ridge is 12 over the number of images, within these bounds. A likelihood takes far too little of it
where parts lie differently, and one odd part is then far from normal; see docs/experiments.md."""

EXTRA_COLUMNS = 8
"""Eigenvectors of the whole that the folds' start from, beyond the rank."""


@dataclass(frozen=True, kw_only=True)
class PooledStatistics:
    """Statistics of a fleet.

    Attributes:
        moments: of the images of all sites that contributed.
        holds_these: whether this site contributed; its parts are then taken out before they are scored as unseen.
        spread: how much scores vary at its sites, where that is known.
    """

    moments: Moments
    holds_these: bool
    spread: ScoreDeviation | None = None

    @classmethod
    def of_fleet(cls, moments: Moments, header: StatisticsHeader, *, num_own: int) -> PooledStatistics:
        """What an aggregator pooled, as read from the blob; ``num_own`` of its images are this site's."""
        return cls(moments=moments, holds_these=num_own > 0, spread=fleet_spread(header.spread))


@dataclass(frozen=True, kw_only=True)
class PriorShare:
    """How much of a site's statistics is its own, and how much the fleet's.

    Attributes:
        prior: of the other sites.
        chosen: how many images it counts as.
        num_images: the site's own images.
    """

    prior: FleetPrior
    chosen: PriorWeights
    num_images: int

    @property
    def spread(self) -> ScoreDeviation | None:
        """How much scores vary there; None where the prior does not fit, or where that is not known."""
        return self.prior.spread if self.chosen.weight else None

    @property
    def share(self) -> float:
        """Of the covariance, what is the fleet's."""
        return self.chosen.weight / (self.chosen.weight + self.num_images - 1)

    @property
    def mean_share(self) -> float:
        """Of the mean, what is the fleet's."""
        return self.chosen.mean_weight / (self.chosen.mean_weight + self.num_images)

    def in_words(self) -> str:
        """A sentence without a full stop."""
        if self.chosen.weight == 0:
            return (
                f"the prior of {self.prior.num_images} images does not fit: these images are likelier without it, so "
                "the statistics are theirs alone"
            )
        return (
            f"leans on {self.prior.num_images} images of others, which count as {self.chosen.weight} beside "
            f"{self.num_images} of its own: {self.share:.0%} of how good parts vary is theirs, "
            f"{self.mean_share:.0%} of what they look like"
        )

    def describe(self) -> dict[str, Any]:
        """For a package's provenance."""
        return {
            "in_words": self.in_words(),
            **self.prior.source,
            "images_of_others": self.prior.num_images,
            "counts_as_images": self.chosen.weight,
            "mean_counts_as_images": self.chosen.mean_weight,
            "own_images": self.num_images,
            "share_of_covariance": round(self.share, 4),
            "share_of_mean": round(self.mean_share, 4),
            "log_likelihood_by_weights": {
                f"{weight}, {mean_weight}": value
                for (weight, mean_weight), value in self.chosen.log_likelihoods.items()
            },
        }


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
        radius: over which moments were pooled, in cells.
        held_out: by the statistics of the other folds.
        volumes: radius to the mean logarithm of the volume that its threshold accepts, per channel and but for a
            constant; of the radii that were tried.
        prior: how much of the statistics is the fleet's, where there was a prior.
        spread: how much scores vary at other sites, where the fleet's statistics count and that is known.
    """

    statistics: LowRankGaussian
    radius: int
    held_out: HeldOutScores
    volumes: dict[int, float]
    prior: PriorShare | None = None
    spread: ScoreDeviation | None = None


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


class HeldOutScoring:
    """Scores of N images, one fold after another, each by statistics that did not see it.

    Args:
        num_images: N.
        scoring: the configuration.
    """

    def __init__(self, num_images: int, scoring: Scoring) -> None:
        self._scoring = scoring
        self._scores, self._means, self._highest = np.zeros(num_images), np.zeros(num_images), HighestMaps()

    def add(self, indices: list[int], batch: F32, statistics: PackageStatistics) -> None:
        """Score the embeddings ``batch [n, P, C]`` of some images.

        Raises:
            NumericalError: an embedding is not finite.
        """
        unsmoothed = _unsmoothed_maps(statistics, batch)
        maps = _smoothed(unsmoothed, self._scoring)
        self._scores[indices], self._means[indices] = image_scores(maps), maps.mean(axis=(1, 2), dtype=np.float64)
        self._highest.add(indices, self._scores[indices], shown_maps(unsmoothed, self._scores[indices]))

    def result(self) -> HeldOutScores:
        """The scores, once all images were added."""
        return HeldOutScores(scores=self._scores, means=self._means, highest_maps=self._highest.by_index())


def cross_fit(
    embeddings: Embeddings,
    groups: Sequence[str],
    learning: Learning,
    *,
    pooled: PooledStatistics | FleetPrior | None = None,
    progress: Progress = no_progress,
) -> CrossFit:
    """Fit the statistics and score every image by those that did not see it.

    Args:
        embeddings: of the N good images.
        groups: the part that each image shows.
        learning: ``scoring``, ``calibration`` and ``seed`` are used.
        pooled: statistics of more images than these, to be used instead of these images' own, or as a prior for them.
        progress: counts images, over all passes.

    Raises:
        DataError: fewer images or parts than the method needs, or statistics of other embeddings.
        NumericalError: an embedding is not finite, or nothing varies between the images.
    """
    scoring, num_images = learning.scoring, len(groups)
    require_enough(num_images, len(set(groups)))
    radii = RADII if scoring.pooling_radius == "auto" else (scoring.pooling_radius,)
    counter = ProgressCounter(progress, total=num_images * 2)
    ridge = automatic_ridge if scoring.ridge == "auto" else _constant(scoring.ridge)
    own = pooled.moments if isinstance(pooled, PooledStatistics) else _moments(embeddings, counter)
    share = None
    if isinstance(pooled, FleetPrior):
        share = _weigh_prior(pooled, own, embeddings, groups, learning, ridge)
    whole = own if share is None else share.prior.added_to(own, share.chosen)
    fit = _Fit(
        grid=embeddings.grid,
        rank=scoring.max_rank if scoring.rank == "auto" else scoring.rank,
        ridge=ridge(whole.count),
    )
    wholes = {radius: fit(whole, radius, extra_columns=EXTRA_COLUMNS) for radius in radii}
    scored = {radius: HeldOutScoring(num_images, scoring) for radius in radii}
    log_determinants = dict.fromkeys(radii, 0.0)
    for fold in make_folds(groups, learning.calibration.folds, learning.seed):
        moments = own
        if not isinstance(pooled, PooledStatistics) or pooled.holds_these:
            moments = _leave_out(own, embeddings, fold)
        if share is not None:
            moments = share.prior.added_to(moments, share.chosen)
        without = {radius: fit(moments, radius, near=wholes[radius]).as_stored() for radius in radii}
        for indices, batch in embeddings.batches(fold):
            for radius, statistics in without.items():
                scored[radius].add(indices, batch, statistics)
            counter.add(len(indices), "scoring held-out parts")
        for radius, statistics in without.items():
            log_determinants[radius] += statistics.mean_log_determinant * len(fold) / num_images
    held_out = {radius: one.result() for radius, one in scored.items()}
    volumes = {
        radius: _log_volume(
            held_out[radius].scores, groups, learning.calibration, log_determinants[radius], wholes[radius]
        )
        for radius in radii
    }
    radius = radii[0]
    for wider in radii[1:]:
        if volumes[wider] < volumes[radius] - LEAST_GAIN:
            radius = wider
    log.info("pooling_radius", radius=radius, log_volume={str(one): round(value, 4) for one, value in volumes.items()})
    return CrossFit(
        statistics=replace(wholes[radius].truncated(fit.rank).as_stored(), count=own.count),
        radius=radius,
        held_out=held_out[radius],
        volumes=volumes,
        prior=share,
        spread=pooled.spread if isinstance(pooled, PooledStatistics) else None if share is None else share.spread,
    )


def _weigh_prior(
    prior: FleetPrior,
    own: Moments,
    embeddings: Embeddings,
    groups: Sequence[str],
    learning: Learning,
    ridge: Callable[[int], float],
) -> PriorShare | None:
    """The prior of the other sites, and its weight; None where there are no others."""
    prior.require_fits(embeddings)
    others = prior.without(own)
    if others is None:
        return None
    folds = make_folds(groups, NUM_FOLDS, learning.seed)
    share = PriorShare(
        prior=others, chosen=choose_weights(embeddings, folds, others, ridge=ridge), num_images=len(groups)
    )
    log.info("prior", **share.describe())
    return share


def _constant(value: float) -> Callable[[int], float]:
    return lambda _: value


def automatic_ridge(num_images: int) -> float:
    """Few images call for much of it."""
    return float(np.clip(RIDGE_IMAGES / num_images, MIN_RIDGE, MAX_RIDGE))


def _log_volume(
    scores: F64, groups: Sequence[str], calibration: Calibration, log_determinant: float, statistics: LowRankGaussian
) -> float:
    """Mean logarithm of the accepted volume, per channel."""
    threshold = GoodScores(scores, groups, calibration.unit).quantile(calibration.false_reject_rate)
    return math.log(max(threshold, np.finfo(np.float64).tiny)) + 0.5 * log_determinant / statistics.num_channels


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """What all fits have in common."""

    grid: tuple[int, int]
    rank: int
    ridge: float

    def __call__(
        self, moments: Moments, radius: int, *, extra_columns: int = 0, near: LowRankGaussian | None = None
    ) -> LowRankGaussian:
        return fit_gaussian(
            moments, grid=self.grid, rank=self.rank + extra_columns, ridge=self.ridge, radius=radius, near=near
        )


def _moments(embeddings: Embeddings, counter: ProgressCounter) -> Moments:
    accumulator = MomentAccumulator()
    for indices, batch in embeddings.batches(range(len(embeddings))):
        accumulator.add(batch)
        counter.add(len(indices), "moments")
    return accumulator.moments()


def _leave_out(whole: Moments, embeddings: Embeddings, fold: Sequence[int]) -> Moments:
    accumulator = MomentAccumulator(whole)
    for _, batch in embeddings.batches(fold):
        accumulator.remove(batch)
    if accumulator.count < 2:
        raise DataError("one part holds nearly all the images; the statistics need other parts to be tested on")
    return accumulator.moments()


class ProgressCounter:
    """Adds up what several passes over the images did, for one progress report."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int, note: str) -> None:
        self._done += count
        self._progress(self._done, self._total, note)
