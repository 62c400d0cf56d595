"""Fitting the Gaussian statistics, choosing their rank, and scoring good images as if they had not been seen.

Cross-fitting: the parts are dealt into folds; the statistics of all folds but one score the one. Every image gets
an honest score, and still serves the final statistics. A fold is left out by taking its moments from the whole, so
two sets of moments are in memory at most, whatever the number of folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.errors import DataError
from edgeflame.learning import Learning, Scoring
from edgeflame.moments import MomentAccumulator, Moments
from edgeflame.statistics import LowRankGaussian, fit_gaussian, smooth_maps
from trainer.embedding import Embeddings

log = EventLog("gaussian")

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

MIN_IMAGES = 4
"""Fewer give no covariance worth the name once a fold is left out."""

MIN_GROUPS = 2
"""With one part nothing can be held out."""


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Statistics of all images, and what the images look like to statistics that did not see them.

    Attributes:
        statistics: of all images, as a package stores them.
        held_out_scores: ``[N]`` raw image scores by the statistics of the other folds.
        likelihoods: mean held-out log-likelihood per image and position for rank 0, 1, ...; None if the rank was
            given.
    """

    statistics: LowRankGaussian
    held_out_scores: F64
    likelihoods: F64 | None


def require_enough(num_images: int, num_groups: int) -> None:
    """Refuse what statistics and a threshold cannot be made of.

    Raises:
        DataError: fewer images or parts than the method needs.
    """
    if num_images < MIN_IMAGES or num_groups < MIN_GROUPS:
        msg = (
            f"the statistics need at least {MIN_IMAGES} readable good images of at least {MIN_GROUPS} parts, "
            f"got {num_images} of {num_groups}"
        )
        raise DataError(msg)


def cross_fit(
    embeddings: Embeddings, groups: Sequence[str], learning: Learning, *, progress: Progress = no_progress
) -> CrossFit:
    """Fit the statistics and score every image by those that did not see it.

    Args:
        embeddings: of the N good images.
        groups: the part that each image shows.
        learning: ``scoring``, ``calibration.folds`` and ``seed`` are used.
        progress: counts images, over all passes.

    Raises:
        DataError: fewer images or parts than the method needs.
        NumericalError: an embedding is not finite, or nothing varies between the images.
    """
    scoring = learning.scoring
    num_images = len(groups)
    require_enough(num_images, len(set(groups)))
    folds = make_folds(groups, learning.calibration.folds, learning.seed)
    grid = embeddings.network.grid
    automatic = scoring.rank == "auto"
    rank = scoring.max_rank if scoring.rank == "auto" else scoring.rank
    counter = _Counter(progress, total=num_images * (4 if automatic else 3))

    accumulator = MomentAccumulator()
    for indices, batch in embeddings.batches(range(num_images)):
        accumulator.add(batch)
        counter.add(len(indices), "moments")
    whole = accumulator.moments()

    without: list[LowRankGaussian] = []
    likelihoods = np.zeros(rank + 1)
    for fold in folds:
        moments = _leave_out(whole, embeddings, fold, counter)
        gaussian = fit_gaussian(moments, grid=grid, rank=rank, ridge=scoring.ridge)
        without.append(gaussian)
        likelihoods = likelihoods[: gaussian.rank + 1]
        if automatic:
            for indices, batch in embeddings.batches(fold):
                likelihoods += len(indices) / num_images * gaussian.log_likelihoods(batch)[: len(likelihoods)]
                counter.add(len(indices), "choosing the rank")
    if automatic:
        rank = int(np.argmax(likelihoods))
        log.info("rank_chosen", rank=rank, max_rank=scoring.max_rank, log_likelihood=float(likelihoods[rank]))

    scores = np.zeros(num_images)
    for fold, gaussian in zip(folds, without, strict=True):
        stored = gaussian.truncated(rank).as_stored()
        for indices, batch in embeddings.batches(fold):
            scores[indices] = image_scores(score_maps(stored, batch, scoring))
            counter.add(len(indices), "scoring held-out parts")
    statistics = fit_gaussian(whole, grid=grid, rank=rank, ridge=scoring.ridge).as_stored()
    return CrossFit(statistics=statistics, held_out_scores=scores, likelihoods=likelihoods if automatic else None)


def score_maps(statistics: LowRankGaussian, embeddings: F32, scoring: Scoring) -> F32:
    """Smoothed Mahalanobis distances (Eq. 18, 23): ``[N, P, C]`` to ``[N, h, w]`` float32."""
    maps = statistics.distances(embeddings).reshape(-1, *statistics.grid)
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


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int, note: str) -> None:
        self._done += count
        self._progress(self._done, self._total, note)


def _leave_out(whole: Moments, embeddings: Embeddings, fold: Iterable[int], counter: _Counter) -> Moments:
    accumulator = MomentAccumulator(whole)
    for indices, batch in embeddings.batches(list(fold)):
        accumulator.remove(batch)
        counter.add(len(indices), "leaving parts out")
    if accumulator.count < 2:
        msg = "one part holds nearly all the images; the statistics need other parts to be tested on"
        raise DataError(msg)
    return accumulator.moments()
