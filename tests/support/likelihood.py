"""The likelihood of one Gaussian, the long way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeflame.statistics.gaussian import LowRankGaussian


def log_likelihood(gaussian: LowRankGaussian, embeddings: npt.NDArray[np.float32]) -> float:
    """Mean log-likelihood per image and position of ``[N, P, C]``, up to the constant -C/2 log(2 pi)."""
    eigenvalues, residual = gaussian.variances()
    rest = gaussian.num_channels - gaussian.rank
    log_det = np.log(eigenvalues.astype(np.float64)).sum(axis=1) + rest * np.log(residual.astype(np.float64))
    squared = gaussian.distances(embeddings).astype(np.float64) ** 2
    return float(-0.5 * (log_det[None, :] + squared).mean())
