"""The fleet's statistics as a prior for one site's, so that a site with few photographs leans on the others (empirical
Bayes).

A site's mean is its own: what differs between cameras, such as gain, colour and vignetting, is in the mean. How good
parts vary about it differs little between sites, and is what few photographs cannot tell. So the prior is a covariance
W of other sites' photographs, those of each site about their own mean. It counts as ``weight`` further photographs::

    S' = (weight W + (n - 1) S) / (weight + n - 1)

which is the posterior mean of a covariance with an inverse-Wishart prior, for n photographs of covariance S (Gelman et
al. 2013, "Bayesian Data Analysis", section 3.6). The weight is the one under which the site's own held-out parts are
most likely, among 0 and some up to the photographs behind the prior. So a site with five parts leans on the fleet, one
with a thousand on itself, and one unlike the others is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeflame.errors import DataError
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.merge import StatisticsHeader, shared_weight
from edgeflame.statistics.moments import Moments, map_position_blocks
from edgeflame.tensors import F32, F64
from fitting.embeddings import Embeddings

WEIGHTS = (5, 10, 20, 40, 80, 160, 320, 640)
"""Numbers of photographs that a prior may count as; 0, for none, is tried as well."""

NUM_POSITIONS = 32
"""Positions at which the weight is chosen, spread over the grid; it is one number for all of them."""

MAX_IMAGES = 320
"""Photographs by which it is chosen, of parts spread over all."""

NUM_FOLDS = 5
"""Folds of parts by which it is chosen."""


@dataclass(frozen=True, kw_only=True)
class FleetPrior:
    """How good parts vary about their site's mean, at other sites.

    Attributes:
        grid: rows and columns of the P positions.
        covariance: ``[P, C, C]`` float32.
        num_images: photographs behind it.
        num_own: how many of those are this site's own; their part is taken out before anything is fitted.
        total_weight: the sum of the weights (:func:`edgeflame.statistics.merge.shared_weight`) of the sites behind it;
            needed where ``num_own`` is not 0.
        source: where it came from, for a package's provenance.
    """

    grid: tuple[int, int]
    covariance: F32
    num_images: int
    num_own: int = 0
    total_weight: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_statistics(cls, statistics: LowRankGaussian, source: dict[str, Any]) -> FleetPrior:
        """The covariances of a package's statistics."""
        positions, channels = statistics.mean.shape
        covariance = np.empty((positions, channels, channels), dtype=np.float32)

        def block(at: slice) -> None:
            basis, residual = statistics.basis[at], statistics.residual[at]
            above = np.maximum(statistics.eigenvalues[at] - residual[:, None], 0.0)
            covariance[at] = (basis * above[:, None, :]) @ basis.transpose(0, 2, 1)
            covariance[at, range(channels), range(channels)] += residual[:, None]

        map_position_blocks(positions, block)
        return cls(grid=statistics.grid, covariance=covariance, num_images=statistics.count, source=source)

    @classmethod
    def of_fleet(cls, moments: Moments, header: StatisticsHeader, *, num_own: int) -> FleetPrior:
        """What an aggregator pooled as a prior.

        Args:
            moments: as read from the blob.
            header: of the blob.
            num_own: how many of its images are this site's.
        """
        return cls(
            grid=header.grid,
            covariance=moments.covariance().astype(np.float32),
            num_images=header.count,
            num_own=num_own,
            total_weight=sum(shared_weight(count) for count in header.sites.values()),
            source={"sites": len(header.sites)},
        )

    def require_fits(self, embeddings: Embeddings) -> None:
        """Refuse a prior of other embeddings than these.

        Raises:
            DataError: its grid or its number of channels is another.
        """
        channels = self.covariance.shape[1]
        if (self.grid, channels) != (embeddings.grid, embeddings.num_channels):
            (rows, columns), (own_rows, own_columns) = self.grid, embeddings.grid
            raise DataError(
                f"the prior has {channels} channels on a grid of {rows}x{columns}, these embeddings have "
                f"{embeddings.num_channels} on {own_rows}x{own_columns}: another backbone, or another size of its input"
            )

    def without(self, moments: Moments) -> FleetPrior | None:
        """The prior of the other sites alone.

        Args:
            moments: this site's own.

        Returns:
            None where no other site is behind it.
        """
        if self.num_own == 0:
            return self
        own, others = shared_weight(self.num_own), self.total_weight - shared_weight(self.num_own)
        if others <= 0:
            return None
        covariance = np.empty_like(self.covariance)

        def block(at: slice) -> None:
            covariance[at] = (self.total_weight * self.covariance[at] - own * moments.covariance(at)) / others

        map_position_blocks(len(covariance), block)
        return replace(self, covariance=covariance, num_images=self.num_images - self.num_own, num_own=0)

    def added_to(self, moments: Moments, weight: int) -> Moments:
        """Moments with their own mean, and their covariance shrunk towards this one.

        Args:
            moments: of n photographs.
            weight: how many photographs the prior counts as; 0 leaves the moments as they are.
        """
        if weight == 0:
            return moments
        outer = np.empty_like(moments.outer)

        def block(at: slice) -> None:
            outer[at] = (moments.count - 1) * moments.covariance(at) + weight * self.covariance[at]

        map_position_blocks(len(outer), block)
        mean = moments.mean
        return Moments(count=moments.count + weight, shift=mean, total=np.zeros_like(mean), outer=outer)


@dataclass(frozen=True, kw_only=True)
class PriorWeight:
    """How much a site leans on the prior.

    Attributes:
        weight: photographs that the prior counts as; 0 where held-out parts are likelier without it.
        log_likelihoods: each weight that was tried, to the mean log-likelihood of held-out photographs, per channel and
            but for a constant.
    """

    weight: int
    log_likelihoods: dict[int, float]


def choose_weight(
    embeddings: Embeddings, folds: Sequence[Sequence[int]], prior: FleetPrior, *, ridge: Callable[[int], float]
) -> PriorWeight:
    """The weight under which held-out parts are most likely.

    Args:
        embeddings: of the site's N photographs.
        folds: their indices, of whole parts.
        prior: the prior.
        ridge: number of photographs to the share of the mean variance that is added to every eigenvalue.

    Raises:
        DataError: the prior is of other embeddings.
        NumericalError: an embedding is not finite.
    """
    prior.require_fits(embeddings)
    folds = _thinned(folds)
    chosen = [index for fold in folds for index in fold]
    positions = len(prior.covariance)
    at = np.unique(np.linspace(0, positions - 1, NUM_POSITIONS + 2).round().astype(int)[1:-1])
    values = np.concatenate([batch[:, at] for _, batch in embeddings.batches(chosen)]).astype(np.float64)
    starts = np.cumsum([0, *(len(fold) for fold in folds)])
    weights = [0, *(one for one in WEIGHTS if one <= max(prior.num_images, WEIGHTS[0]))]
    covariance = prior.covariance[at].astype(np.float64)
    sums = np.zeros((len(weights), len(at)))

    def block(positions: slice) -> None:
        for first, last in itertools.pairwise(starts):
            held_out = values[first:last, positions]
            others = np.delete(values[:, positions], slice(first, last), axis=0)
            if len(others) > 1:
                sums[:, positions] += _log_likelihoods(others, held_out, covariance[positions], weights, ridge)

    map_position_blocks(len(at), block, size=max(1, len(at) // 4))
    means = sums.sum(axis=1) / (len(chosen) * len(at) * values.shape[2])
    best = int(np.argmax(means))
    return PriorWeight(
        weight=weights[best],
        log_likelihoods={weight: round(float(mean), 4) for weight, mean in zip(weights, means, strict=True)},
    )


def _log_likelihoods(
    others: F64, held_out: F64, prior: F64, weights: Sequence[int], ridge: Callable[[int], float]
) -> F64:
    """The summed log-likelihood of photographs ``[m, P, C]``, by the mean of ``[n, P, C]``: ``[weights, P]``."""
    count, _, channels = others.shape
    mean = others.mean(axis=0)
    centred = (others - mean).transpose(1, 0, 2)
    scatter = centred.transpose(0, 2, 1) @ centred
    deviations = (held_out - mean).transpose(1, 2, 0)
    found = np.empty((len(weights), others.shape[1]))
    for row, weight in enumerate(weights):
        covariance = (scatter + weight * prior) / (count - 1 + weight)
        variance = np.trace(covariance, axis1=1, axis2=2).mean() / channels
        covariance[:, range(channels), range(channels)] += max(ridge(count + weight) * variance, np.finfo(float).tiny)
        # What an approximation of the prior left below zero counts as nothing.
        eigenvalues, vectors = np.linalg.eigh(covariance)
        eigenvalues = np.maximum(eigenvalues, ridge(count + weight) * variance)
        along = vectors.transpose(0, 2, 1) @ deviations
        distances = (along**2 / eigenvalues[:, :, None]).sum(axis=(1, 2))
        found[row] = -0.5 * (distances + held_out.shape[0] * np.log(eigenvalues).sum(axis=1))
    return found


def _thinned(folds: Sequence[Sequence[int]]) -> list[list[int]]:
    """The folds with fewer photographs where there are very many."""
    step = -(-sum(len(fold) for fold in folds) // MAX_IMAGES)
    return [list(fold[::step]) for fold in folds]
