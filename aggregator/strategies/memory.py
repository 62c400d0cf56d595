"""FedDyMem's server strategy: the global memory is the k-means of the prototypes that the sites send.

A prototype's weight is its site's share of the round's samples times its share of the site's patches. Near are those
that are near after whitening by the covariance of all prototypes, and that have near places, where they carry them. If
a site's carry none, as those of earlier versions, the result carries none. Where the sites have measured the memory
that the round began with, a new prototype has the spread, by all sites, of the nearest old one: what its own members
carry is each of one site, whose parts differ less than all sites' do. Sites come in sorted order, the seed is
fixed, and the work is done by one thread: the same updates give the same memory, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.errors import require_extra
from edgeflame.methods import Memory
from edgeflame.statistics.memory import MemoryBank, read_bank, write_bank

MAX_ITERATIONS = 300
PRIOR_PATCHES = 30.0
"""How many patches the spread that a prototype's own members carry is worth beside what was measured."""

F64 = np.ndarray[Any, np.dtype[np.float64]]


class KMeansMemory:
    """The weighted k-means of all prototypes."""

    def __init__(self, inputs: RoundInputs) -> None:
        self._learning = inputs.config.learning

    def aggregate(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
        banks = [read_bank(contribution.path) for contribution in contributions]
        prototypes = np.concatenate([bank.prototypes for bank in banks]).astype(np.float64)
        shares = [c.weight * bank.weights.astype(np.float64) for c, bank in zip(contributions, banks, strict=True)]
        weights = np.concatenate(shares)
        settings = self._learning.memory
        placed = all(bank.places is not None for bank in banks)
        # Places, and with them the spreads.
        carried = np.concatenate([_carried(bank) for bank in banks]) if placed else np.zeros((len(prototypes), 0))
        labels = kmeans_labels(
            prototypes,
            weights,
            settings.global_prototypes,
            seed=self._learning.seed,
            ridge=settings.ridge,
            places=settings.position_weight * prototypes.shape[1] ** 0.5 * carried[:, :2],
        )
        patches = np.concatenate([bank.effective_patches for bank in banks]).astype(np.float64)
        images = np.concatenate([bank.effective_images for bank in banks]).astype(np.float64)
        rows = []
        for label in np.unique(labels):
            members = labels == label
            total = weights[members].sum()
            share = weights[members] / total
            # Prototypes share no patch, so their weights' squares add up; images they may share, so those of images
            # are bounded by the triangle inequality.
            effective_patches = 1 / (np.square(share) / patches[members]).sum()
            effective_images = 1 / np.square((share / np.sqrt(images[members])).sum())
            averages = (share @ prototypes[members], share @ carried[members])
            rows.append((*averages, total, effective_patches, effective_images))
        order = np.lexsort(np.stack([row[0] for row in rows]).T[::-1])
        ordered = [rows[index] for index in order]
        centres, merged = np.stack([row[0] for row in ordered]), np.stack([row[1] for row in ordered])
        sums = np.array([row[2] for row in ordered])
        measured = None
        if placed and settings.measure_spreads:
            from threadpoolctl import threadpool_limits

            with threadpool_limits(limits=1):
                whiten = PrototypeWhitening.of(prototypes, weights, ridge=settings.ridge)
                measured = _measured_by_all(read_bank(base), banks, contributions, whiten, centres, merged, settings)
            merged[:, 2] = measured[:, 1]
        merged = merged.astype(np.float32)
        write_bank(
            out,
            MemoryBank(
                prototypes=centres.astype(np.float32),
                weights=(sums / sums.sum()).astype(np.float32),
                effective_patches=np.array([row[3] for row in ordered], dtype=np.float32),
                effective_images=np.array([row[4] for row in ordered], dtype=np.float32),
                count=sum(bank.count for bank in banks),
                space=read_bank(base).space,
                places=np.clip(merged[:, :2], 0, 1) if placed else None,
                spreads=merged[:, 2] if placed else None,
                measured=None if measured is None else measured.astype(np.float32),
            ),
        )


def _measured_by_all(
    base: MemoryBank,
    banks: list[MemoryBank],
    contributions: tuple[Contribution, ...],
    whiten: PrototypeWhitening,
    centres: F64,
    carried: F64,
    settings: Memory,
) -> F64:
    """Patches and spread of each new prototype, ``[M, 2]``: those of the nearest prototype of the base.

    A site counts as much as its share of the round, whatever number of patches it says.

    Args:
        base: the memory that the round began with.
        banks: what the sites sent.
        contributions: theirs, for their weights.
        whiten: in which prototypes are compared.
        centres: ``[M, C]``, the new prototypes.
        carried: ``[M, 3]``, their places and the spreads of what they were made of.
        settings: of the run.
    """
    plain = np.column_stack([np.zeros(len(centres)), carried[:, 2]])
    measures = [bank.measured for bank in banks]
    if not len(base) or base.places is None or any(one is None for one in measures):
        return plain
    patches = np.zeros(len(base))
    shares, spreads = np.zeros(len(base)), np.zeros(len(base))
    for one, contribution in zip(measures, contributions, strict=True):
        assert one is not None
        told = one.astype(np.float64)
        share = contribution.weight * told[:, 0] / max(1.0, float(told[:, 0].sum()))
        patches += np.minimum(told[:, 0], settings.max_patches)
        shares += share
        spreads += share * told[:, 1]
    scale = settings.position_weight * centres.shape[1] ** 0.5
    old = np.hstack([whiten(base.prototypes.astype(np.float64)), scale * base.places])
    new = np.hstack([whiten(centres), scale * carried[:, :2]])
    squared = np.square(new).sum(axis=1)[:, None] + np.square(old).sum(axis=1) - 2 * new @ old.T
    nearest = squared.argmin(axis=1)
    known = patches[nearest]
    spread = (spreads / np.maximum(shares, 1e-30))[nearest]
    mixed = (known * spread + PRIOR_PATCHES * plain[:, 1]) / (known + PRIOR_PATCHES)
    return np.column_stack([known, np.where(known > 0, mixed, plain[:, 1])])


def _carried(bank: MemoryBank) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Places and spreads side by side, ``[M, 3]``."""
    assert bank.places is not None
    assert bank.spreads is not None
    return np.column_stack([bank.places, bank.spreads]).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class PrototypeWhitening:
    """``(x - centre) @ matrix``: ``[C]`` and ``[C, C]``."""

    centre: F64
    matrix: F64

    @classmethod
    def of(cls, prototypes: F64, weights: F64, *, ridge: float) -> PrototypeWhitening:
        """It turns the weighted covariance of ``[M, C]`` prototypes into the identity, but for the ridge."""
        share = weights / weights.sum()
        centre = share @ prototypes
        centred = prototypes - centre
        eigenvalues, vectors = np.linalg.eigh((centred * share[:, None]).T @ centred)
        eigenvalues = np.clip(eigenvalues, 0, None)
        mean = float(eigenvalues.mean()) or 1.0
        return cls(centre=centre, matrix=vectors / np.sqrt(eigenvalues + ridge * mean))

    def __call__(self, prototypes: F64) -> F64:
        whitened: F64 = (prototypes - self.centre) @ self.matrix
        return whitened


def kmeans_labels(
    prototypes: np.ndarray[Any, np.dtype[np.float64]],
    weights: np.ndarray[Any, np.dtype[np.float64]],
    count: int,
    *,
    seed: int,
    ridge: float,
    places: np.ndarray[Any, np.dtype[np.float64]],
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The cluster of each prototype. Where there are no more than ``count``, each is a cluster of its own.

    Args:
        prototypes: ``[M, C]``; they are whitened first.
        weights: ``[M]``.
        count: of clusters, at most.
        seed: of their first centres.
        ridge: share of the mean variance that is added to every eigenvalue of the prototypes' covariance.
        places: ``[M, 2]``, in whitened units, or ``[M, 0]``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    if len(prototypes) <= count:
        return np.arange(len(prototypes))
    require_scikit_learn()
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        points = np.hstack([PrototypeWhitening.of(prototypes, weights, ridge=ridge)(prototypes), places])
        # Weights of 1 on average: a tiny scale would fall under the method's tolerances.
        fitted = KMeans(n_clusters=count, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed).fit(
            points, sample_weight=weights / weights.mean()
        )
    labels: np.ndarray[Any, np.dtype[np.int64]] = fitted.labels_.astype(np.int64)
    return labels


def require_scikit_learn() -> None:
    """Check that scikit-learn is installed; called before a run begins, not after its first round.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    with require_extra("memory", "the strategy kmeans (method feddymem) needs scikit-learn"):
        import sklearn.cluster  # noqa: F401 - whether it is there
        import threadpoolctl  # noqa: F401
