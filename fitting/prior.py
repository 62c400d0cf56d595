"""The fleet's statistics as a prior for one site's, so that a site with few photographs leans on the others (empirical
Bayes).

The prior is a covariance W of other sites' photographs, those of each site about their own mean, and the mean m of all
of them. How good parts vary about their mean differs little between sites, and is what few photographs cannot tell.
Means differ with the cameras' gain, colour and vignetting, so they have a weight of their own. W counts as ``weight``
further photographs and m as ``mean_weight`` of them (a normal-inverse-Wishart prior, Gelman et al. 2013, "Bayesian Data
Analysis", section 3.6), for n photographs of mean x and covariance S::

    m' = (mean_weight m + n x) / (mean_weight + n)
    S' = (weight W + (n - 1) S + n mean_weight / (n + mean_weight) (x - m)(x - m)') / (weight + n - 1)

The weights are those under which the site's own held-out parts are most likely, among none and some up to the
photographs behind the prior. So a site with five parts leans on the fleet, one with a thousand on itself, one with
another camera keeps its own mean, and one unlike the others is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeflame.errors import DataError, UsageError
from edgeflame.images import printable_name
from edgeflame.package import Package, read_package
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.moments import Moments, map_position_blocks
from edgeflame.statistics.shared import ScoreDeviation, StatisticsHeader, shared_weight
from edgeflame.tensors import F32, F64
from fitting.embeddings import Embeddings
from fitting.threshold import fleet_spread, robust_spread

WEIGHTS = (5, 10, 20, 40, 80, 160, 320, 640)
"""Numbers of photographs that a prior's covariance may count as; 0, for none, is tried as well."""

MEAN_WEIGHTS = (2, 5, 10, 20, 40, 80)
"""The same of its mean, which is tried once the covariance counts."""

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
        mean: ``[P, C]`` float32, of all photographs behind it.
        covariance: ``[P, C, C]`` float32.
        num_images: photographs behind it.
        num_own: how many of those are this site's own; their part is taken out before anything is fitted.
        total_weight: the sum of the weights (:func:`edgeflame.statistics.shared.shared_weight`) of the sites behind it;
            needed where ``num_own`` is not 0.
        source: where it came from, for a package's provenance.
        spread: how much the scores of good parts vary there; None where that is not known, or of too few parts.
    """

    grid: tuple[int, int]
    mean: F32
    covariance: F32
    num_images: int
    num_own: int = 0
    total_weight: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    spread: ScoreDeviation | None = None

    @classmethod
    def of_package(cls, package: Package, source: dict[str, Any]) -> FleetPrior:
        """A package's statistics, and how its scores spread.

        Raises:
            UsageError: it scores by a memory.
        """
        if not isinstance(package.statistics, LowRankGaussian):
            raise UsageError("it scores by a memory, which is no prior for Gaussian statistics")
        scores = package.condition.streams.get("score") if package.condition is not None else None
        spread = None if scores is None else robust_spread(scores.quantiles, int(scores.count))
        return replace(cls.of_statistics(package.statistics, source), spread=spread)

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
        return cls(
            grid=statistics.grid,
            mean=statistics.mean,
            covariance=covariance,
            num_images=statistics.count,
            source=source,
        )

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
            mean=moments.mean.astype(np.float32),
            covariance=moments.covariance().astype(np.float32),
            num_images=header.count,
            num_own=num_own,
            total_weight=sum(shared_weight(count) for count in header.sites.values()),
            source={"sites": len(header.sites)},
            spread=fleet_spread(header.spread),
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
        rest = self.num_images - self.num_own
        mean = ((self.num_images * self.mean - self.num_own * moments.mean) / rest).astype(np.float32)
        return replace(self, mean=mean, covariance=covariance, num_images=rest, num_own=0)

    def added_to(self, moments: Moments, weights: PriorWeights) -> Moments:
        """Moments that are shrunk towards this prior.

        Args:
            moments: of n photographs.
            weights: how many photographs the prior counts as; a weight of 0 leaves the moments as they are.
        """
        if weights.weight == 0:
            return moments
        own, count, kappa = moments.mean, moments.count, weights.mean_weight
        step = self.mean - own
        outer = np.empty_like(moments.outer)

        def block(at: slice) -> None:
            outer[at] = (count - 1) * moments.covariance(at) + weights.weight * self.covariance[at]
            outer[at] += count * kappa / (count + kappa) * step[at, :, None] * step[at, None, :]

        map_position_blocks(len(outer), block)
        mean = own + kappa / (count + kappa) * step
        return Moments(count=count + weights.weight, shift=mean, total=np.zeros_like(mean), outer=outer)


def read_prior(path: Path) -> FleetPrior:
    """A package's statistics, as a prior.

    Raises:
        UsageError: the package scores by a memory.
        EdgeFlameError: it cannot be read.
    """
    package = read_package(path)
    manifest = package.manifest
    name = printable_name(path.name)
    source = {"file": name, "sha256": package.sha256, "product": manifest.product, "site": manifest.site}
    try:
        return FleetPrior.of_package(package, source)
    except UsageError as exc:
        raise UsageError(f"--prior {path}: {exc}") from exc


@dataclass(frozen=True, kw_only=True)
class PriorWeights:
    """How much a site leans on the prior.

    Attributes:
        weight: photographs that the prior's covariance counts as; 0 where held-out parts are likelier without it.
        mean_weight: photographs that its mean counts as.
        log_likelihoods: ``weight, mean_weight`` to the mean log-likelihood of held-out photographs, per channel and but
            for a constant, of all that were tried.
    """

    weight: int
    mean_weight: int = 0
    log_likelihoods: dict[tuple[int, int], float] = field(default_factory=dict)


def choose_weights(
    embeddings: Embeddings, folds: Sequence[Sequence[int]], prior: FleetPrior, *, ridge: Callable[[int], float]
) -> PriorWeights:
    """The weights under which held-out parts are most likely; that of the covariance first, then that of the mean.

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
    at = np.unique(np.linspace(0, len(prior.covariance) - 1, NUM_POSITIONS + 2).round().astype(int)[1:-1])
    values = np.concatenate([batch[:, at] for _, batch in embeddings.batches(chosen)]).astype(np.float64)
    starts = np.cumsum([0, *(len(fold) for fold in folds)])
    mean, covariance = prior.mean[at].astype(np.float64), prior.covariance[at].astype(np.float64)
    most = max(prior.num_images, WEIGHTS[0])

    def evaluate(tried: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        sums = np.zeros((len(tried), len(at)))

        def block(positions: slice) -> None:
            for first, last in itertools.pairwise(starts):
                held_out = values[first:last, positions]
                others = np.delete(values[:, positions], slice(first, last), axis=0)
                if len(others) > 1:
                    sums[:, positions] += _log_likelihoods(
                        others, held_out, mean[positions], covariance[positions], tried, ridge
                    )

        map_position_blocks(len(at), block, size=max(1, len(at) // 4))
        means = sums.sum(axis=1) / (len(chosen) * len(at) * values.shape[2])
        return {pair: round(float(one), 4) for pair, one in zip(tried, means, strict=True)}

    found = evaluate([(0, 0), *((one, 0) for one in WEIGHTS if one <= most)])
    weight, _ = max(found, key=lambda pair: found[pair])
    if weight:
        found.update(evaluate([(weight, one) for one in MEAN_WEIGHTS if one <= most]))
    weight, mean_weight = max(found, key=lambda pair: found[pair])
    return PriorWeights(weight=weight, mean_weight=mean_weight, log_likelihoods=found)


def _log_likelihoods(
    others: F64,
    held_out: F64,
    prior_mean: F64,
    prior: F64,
    tried: Sequence[tuple[int, int]],
    ridge: Callable[[int], float],
) -> F64:
    """The summed log-likelihood of photographs ``[m, P, C]`` by ``[n, P, C]`` and the prior: ``[len(tried), P]``."""
    count, _, channels = others.shape
    own = others.mean(axis=0)
    centred = (others - own).transpose(1, 0, 2)
    scatter = centred.transpose(0, 2, 1) @ centred
    step = prior_mean - own
    between = step[:, :, None] * step[:, None, :]
    found = np.empty((len(tried), others.shape[1]))
    for row, (weight, kappa) in enumerate(tried):
        covariance = scatter + weight * prior + count * kappa / (count + kappa) * between
        covariance /= count - 1 + weight
        variance = np.trace(covariance, axis1=1, axis2=2).mean() / channels
        added = max(ridge(count + weight) * variance, float(np.finfo(np.float64).tiny))
        eigenvalues, vectors = np.linalg.eigh(covariance)
        # What an approximation of the prior left below zero counts as nothing.
        eigenvalues = np.maximum(eigenvalues, 0.0) + added
        deviations = (held_out - (own + kappa / (count + kappa) * step)).transpose(1, 2, 0)
        along = vectors.transpose(0, 2, 1) @ deviations
        distances = (along**2 / eigenvalues[:, :, None]).sum(axis=(1, 2))
        found[row] = -0.5 * (distances + held_out.shape[0] * np.log(eigenvalues).sum(axis=1))
    return found


def _thinned(folds: Sequence[Sequence[int]]) -> list[list[int]]:
    """The folds with fewer photographs where there are very many."""
    step = -(-sum(len(fold) for fold in folds) // MAX_IMAGES)
    return [list(fold[::step]) for fold in folds]
