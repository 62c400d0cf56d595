"""FedDyMem's server strategy: the global memory is the k-means of the prototypes that the sites send.

A prototype's weight is its site's share of the round's samples times its share of the site's patches. Sites come in
sorted order, the seed is fixed, and the work is done by one thread: the same updates give the same memory, bit for
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.errors import require_extra
from edgeflame.statistics.memory import MemoryBank, read_bank, write_bank

MAX_ITERATIONS = 300


class KMeansMemory:
    """The weighted k-means of all prototypes."""

    def __init__(self, inputs: RoundInputs) -> None:
        self._learning = inputs.config.learning

    def aggregate(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
        banks = [read_bank(contribution.path) for contribution in contributions]
        prototypes = np.concatenate([bank.prototypes for bank in banks]).astype(np.float64)
        shares = [c.weight * bank.weights.astype(np.float64) for c, bank in zip(contributions, banks, strict=True)]
        weights = np.concatenate(shares)
        labels = kmeans_labels(prototypes, weights, self._learning.memory.global_prototypes, seed=self._learning.seed)
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
            rows.append((share @ prototypes[members], total, effective_patches, effective_images))
        averages = np.stack([row[0] for row in rows])
        order = np.lexsort(averages.T[::-1])
        ordered = [rows[index] for index in order]
        sums = np.array([row[1] for row in ordered])
        write_bank(
            out,
            MemoryBank(
                prototypes=averages[order].astype(np.float32),
                weights=(sums / sums.sum()).astype(np.float32),
                effective_patches=np.array([row[2] for row in ordered], dtype=np.float32),
                effective_images=np.array([row[3] for row in ordered], dtype=np.float32),
                count=sum(bank.count for bank in banks),
                space=read_bank(base).space,
            ),
        )


def kmeans_labels(
    prototypes: np.ndarray[Any, np.dtype[np.float64]],
    weights: np.ndarray[Any, np.dtype[np.float64]],
    count: int,
    *,
    seed: int,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The cluster, out of at most ``count``, of each of ``[M, C]`` prototypes with weights ``[M]``.

    Where there are no more than ``count`` prototypes, each is a cluster of its own.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    if len(prototypes) <= count:
        return np.arange(len(prototypes))
    require_scikit_learn()
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        # Weights of 1 on average: a tiny scale would fall under the method's tolerances.
        fitted = KMeans(n_clusters=count, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed).fit(
            prototypes, sample_weight=weights / weights.mean()
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
