"""Scoring good images as if they had not been seen: the folds, what a cross-fit gives, and scores from statistics.

Cross-fitting: the parts are dealt into folds; the statistics of all folds but one score the one. Every image gets
an honest score, and still serves the final statistics. The same held-out images choose rank and ridge, where the
configuration leaves them open, by their likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeflame.errors import DataError
from edgeflame.methods import Scoring
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian, smooth_maps
from edgeflame.statistics.moments import Moments
from edgeflame.tensors import F32, F64

MIN_IMAGES = 4
"""Fewer give no covariance worth the name once a fold is left out."""

MIN_GROUPS = 2
"""With one part nothing can be held out."""


RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried when the ridge is chosen automatically; few images call for much of it."""


@dataclass(frozen=True, kw_only=True)
class PooledStatistics:
    """Statistics of a fleet.

    Attributes:
        moments: of the images of all sites that contributed.
        holds_these: this site did, so that its parts have to be taken out where they are to be scored unseen.
    """

    moments: Moments
    holds_these: bool


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Statistics of all images, and what the images look like to statistics that did not see them.

    Attributes:
        statistics: of all images, as a package stores them.
        held_out_scores: ``[N]`` raw image scores by the statistics of the other folds.
        held_out_means: ``[N]`` means of the maps whose maxima these are.
        highest_maps: image index to raw map ``[h, w]`` of the highest of these scores, the highest first.
        likelihoods: mean held-out log-likelihood per image and position, by ridge (text), then by rank 0, 1, ...
            (where the rank was given, only that one); None if neither was to be chosen.
    """

    statistics: LowRankGaussian
    held_out_scores: F64
    held_out_means: F64
    highest_maps: dict[int, F32]
    likelihoods: dict[str, list[float]] | None


def require_enough(num_images: int, num_groups: int) -> None:
    """Refuse what statistics and a threshold cannot be made of.

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


def require_images_left(count: int) -> None:
    if count < 2:
        raise DataError("one part holds nearly all the images; the statistics need other parts to be tested on")
