"""Per-position Gaussian statistics: fitting the low-rank form, its distance and likelihoods, and the map's smoothing.

Axes: N images, P = grid height x grid width positions, C embedding channels, K rank.

The distance is Mahalanobis' (FLAME Eq. 17, 18 and 23) with the covariance in low-rank form: the K leading
eigenpairs (lambda_i, u_i) and one value s2 for the rest (probabilistic PCA). With d = x - mu, t = U'd and
r = d - U t::

    distance^2 = |r|^2 / s2 + sum_i t_i^2 / lambda_i

which is non-negative by construction, also with U rounded to float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.statistics.moments import Moments, map_position_blocks, require_finite
from edgeflame.tensors import F32, F64

DEFAULT_RIDGE = 0.01
"""Ridge added to every eigenvalue, as a share of the mean variance over positions and channels."""


@dataclass(frozen=True, kw_only=True)
class LowRankGaussian:
    """One Gaussian per position: mean, K leading eigenpairs, one variance for the rest. Without ridge.

    Attributes:
        grid: height and width of the patch grid; P is their product.
        count: number of images behind it.
        ridge: share of the mean variance that is added to every eigenvalue when distances are taken. It is
            kept apart so that merging adds it once.
        mean: ``[P, C]`` float32.
        basis: ``[P, C, K]`` float32, orthonormal columns, by falling eigenvalue.
        eigenvalues: ``[P, K]`` float32, variances along the columns, >= 0.
        residual: ``[P]`` float32, mean variance along the C - K remaining directions, >= 0.
    """

    grid: tuple[int, int]
    count: int
    ridge: float
    mean: F32
    basis: F32
    eigenvalues: F32
    residual: F32

    def __post_init__(self) -> None:
        positions, channels = self.mean.shape
        rank = self.eigenvalues.shape[1]
        expected = {
            "basis": (positions, channels, rank),
            "eigenvalues": (positions, rank),
            "residual": (positions,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise DataError(f"statistics: {name} should be {list(shape)}, is {list(getattr(self, name).shape)}")
        if self.grid[0] * self.grid[1] != positions:
            raise DataError(f"statistics: a grid of {self.grid[0]}x{self.grid[1]} does not have {positions} positions")
        for name in ("mean", *expected):
            if not np.isfinite(getattr(self, name)).all():
                raise NumericalError(f"statistics: {name} holds NaN or infinite values")
        if (self.eigenvalues < 0).any() or (self.residual < 0).any() or self.ridge <= 0:
            raise NumericalError("statistics: variances must not be negative and the ridge must be positive")
        if self.mean_variance <= 0:
            raise NumericalError("statistics: nothing varies between the images; are they all the same picture?")

    @property
    def num_channels(self) -> int:
        return int(self.mean.shape[1])

    @property
    def rank(self) -> int:
        return int(self.eigenvalues.shape[1])

    @property
    def num_prototypes(self) -> int:
        """Gaussian statistics have none."""
        return 0

    @property
    def mean_variance(self) -> float:
        """Mean variance over positions and channels, without ridge."""
        rest = self.num_channels - self.rank
        total = self.eigenvalues.sum(dtype=np.float64) + rest * self.residual.sum(dtype=np.float64)
        return float(total / self.mean.size)

    @property
    def ridge_variance(self) -> float:
        """What is added to every eigenvalue."""
        return self.ridge * self.mean_variance

    def variances(self) -> tuple[F32, F32]:
        """With the ridge: ``eigenvalues [P, K]`` and ``residual [P]``, both > 0."""
        ridge = np.float32(self.ridge_variance)
        return self.eigenvalues + ridge, self.residual + ridge

    def distances(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Mahalanobis distances.

        Args:
            embeddings: ``[N, P, C]`` float32, or float64 for a reference computed in float64 throughout.

        Returns:
            ``[N, P]`` of the same type, >= 0.

        Raises:
            NumericalError: an embedding holds NaN or infinite values: a fault is never a pass.
        """
        dtype = embeddings.dtype
        require_finite(embeddings)
        eigenvalues, residual = self.variances()
        basis = self.basis.astype(dtype)
        delta = (embeddings - self.mean.astype(dtype)).transpose(1, 0, 2)  # [P, N, C]
        along = np.matmul(delta, basis)  # [P, N, K]
        rest = delta - np.matmul(along, basis.transpose(0, 2, 1))
        squared = (rest**2).sum(axis=2) / residual.astype(dtype)[:, None]
        squared += (along**2 / eigenvalues.astype(dtype)[:, None, :]).sum(axis=2)
        distances: npt.NDArray[np.floating] = np.sqrt(squared).T
        return distances

    def truncated(self, rank: int) -> LowRankGaussian:
        """The same with fewer eigenpairs; what is cut goes into the residual variance."""
        if rank >= self.rank:
            return self
        rest = self.num_channels - self.rank
        cut = self.eigenvalues[:, rank:].sum(axis=1, dtype=np.float64) + rest * self.residual.astype(np.float64)
        return replace(
            self,
            basis=np.ascontiguousarray(self.basis[:, :, :rank]),
            eigenvalues=np.ascontiguousarray(self.eigenvalues[:, :rank]),
            residual=(cut / (self.num_channels - rank)).astype(np.float32),
        )

    def log_likelihoods(self, embeddings: F32, ridges: Sequence[float] | None = None) -> F64:
        """Mean log-likelihood per image and position, up to the constant -C/2 log(2 pi), of this Gaussian truncated to
        each rank 0..K, and with each ridge; for choosing the two.

        Args:
            embeddings: ``[N, P, C]`` float32 of images the statistics have not seen.
            ridges: shares of the mean variance to try in place of ``ridge``; by default that alone.

        Returns:
            ``[len(ridges), K + 1]`` float64.
        """
        ranks = np.arange(self.rank + 1)
        eigenvalues = self.eigenvalues.astype(np.float64)
        rest = (self.num_channels - self.rank) * self.residual.astype(np.float64)
        tails = np.concatenate([np.cumsum(eigenvalues[:, ::-1], axis=1)[:, ::-1], np.zeros((len(rest), 1))], axis=1)
        residuals = (tails + rest[:, None]) / (self.num_channels - ranks)  # [P, K + 1]

        delta = (embeddings - self.mean).transpose(1, 0, 2)  # [P, N, C]
        along = (np.matmul(delta, self.basis).astype(np.float64) ** 2).mean(axis=1)  # [P, K] mean over images
        # One orthonormal basis, so the residual's square is a difference; float64 keeps it exact enough to rank.
        norm = (delta.astype(np.float64) ** 2).sum(axis=2).mean(axis=1)  # [P]
        beyond = np.clip(norm[:, None] - _cumulative(along), 0.0, None)
        likelihoods = []
        for ridge in (self.ridge,) if ridges is None else ridges:
            added = ridge * self.mean_variance
            squared = beyond / (residuals + added) + _cumulative(along / (eigenvalues + added))
            log_det = _cumulative(np.log(eigenvalues + added))
            log_det = log_det + (self.num_channels - ranks) * np.log(residuals + added)
            likelihoods.append(-0.5 * (log_det + squared).mean(axis=0))
        return np.stack(likelihoods)

    def as_stored(self) -> LowRankGaussian:
        """The same with the basis rounded to float16, as a package keeps it.

        What calibrates a threshold and what the line runs are then one and the same.
        """
        return replace(self, basis=self.basis.astype(np.float16).astype(np.float32))


def fit_gaussian(
    moments: Moments, *, grid: tuple[int, int], rank: int, ridge: float = DEFAULT_RIDGE
) -> LowRankGaussian:
    """The low-rank Gaussian of accumulated moments.

    A rank above what the images can determine (N - 1) or the channels allow (C - 1) is lowered to that; with
    K = N - 1 the form is exact.

    Raises:
        DataError: fewer than two images, or a rank below zero.
        NumericalError: nothing varies between the images.
    """
    num_positions, num_channels = moments.shift.shape
    rank = _possible_rank(rank, moments.count, num_channels)
    basis = np.empty((num_positions, num_channels, rank), dtype=np.float32)
    eigenvalues = np.empty((num_positions, rank), dtype=np.float32)
    residual = np.empty(num_positions, dtype=np.float32)

    def block(at: slice) -> None:
        values, vectors = np.linalg.eigh(moments.covariance(at))  # ascending
        values = np.clip(values[:, ::-1], 0.0, None)
        basis[at] = vectors[:, :, ::-1][:, :, :rank]
        eigenvalues[at] = values[:, :rank]
        residual[at] = values[:, rank:].mean(axis=1)

    map_position_blocks(num_positions, block)
    return LowRankGaussian(
        grid=grid,
        count=moments.count,
        ridge=ridge,
        mean=moments.mean.astype(np.float32),
        basis=basis,
        eigenvalues=eigenvalues,
        residual=residual,
    )


def fit_gaussian_to_samples(
    embeddings: F32, *, grid: tuple[int, int], rank: int, ridge: float = DEFAULT_RIDGE
) -> LowRankGaussian:
    """What :func:`fit_gaussian` gives for the moments of ``embeddings``, for fewer images than channels.

    The N x N products between images have the same non-zero eigenvalues as the C x C covariance, so that with a
    third as many images as channels the work is a tenth.

    Args:
        embeddings: ``[N, P, C]`` float32.
        grid: height and width of the patch grid.
        rank: as in :func:`fit_gaussian`.
        ridge: as in :func:`fit_gaussian`.

    Raises:
        DataError: fewer than two images, or a rank below zero.
        NumericalError: a value is NaN or infinite, or nothing varies between the images.
    """
    num_images, num_positions, num_channels = embeddings.shape
    rank = _possible_rank(rank, num_images, num_channels)
    require_finite(embeddings)
    mean = embeddings.mean(axis=0, dtype=np.float64)
    basis = np.zeros((num_positions, num_channels, rank), dtype=np.float32)
    eigenvalues = np.empty((num_positions, rank), dtype=np.float32)
    residual = np.empty(num_positions, dtype=np.float32)

    def block(at: slice) -> None:
        centred = (embeddings[:, at] - mean[at]).transpose(1, 0, 2) / np.sqrt(num_images - 1)  # [block, N, C]
        values, vectors = np.linalg.eigh(centred @ centred.transpose(0, 2, 1))  # ascending
        values = np.clip(values[:, ::-1], 0.0, None)
        leading = vectors[:, :, ::-1][:, :, :rank]
        # A direction without variance has no column to normalise; QR completes the basis there.
        columns, _ = np.linalg.qr(centred.transpose(0, 2, 1) @ leading)
        basis[at] = columns
        eigenvalues[at] = values[:, :rank]
        residual[at] = values[:, rank:].sum(axis=1) / (num_channels - rank)

    map_position_blocks(num_positions, block)
    return LowRankGaussian(
        grid=grid,
        count=num_images,
        ridge=ridge,
        mean=mean.astype(np.float32),
        basis=basis,
        eigenvalues=eigenvalues,
        residual=residual,
    )


def smoothing_matrix(size: int, sigma: float) -> F32:
    """A Gaussian along one axis of the map, as a matrix.

    ``smoothed = smoothing_matrix(H, sigma) @ map @ smoothing_matrix(W, sigma).T``; each row sums to one, so
    the border is neither darkened nor reflected. ``sigma`` in cells; 0 leaves the map as it is.

    Returns:
        ``[size, size]`` float32.
    """
    if sigma <= 0:
        return np.eye(size, dtype=np.float32)
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    weights[np.abs(distance) > np.ceil(4 * sigma)] = 0.0
    matrix: F32 = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def smooth_maps(maps: npt.NDArray[np.floating], sigma: float) -> npt.NDArray[np.floating]:
    """Gaussian smoothing of maps ``[N, H, W]``; see :func:`smoothing_matrix`."""
    height, width = maps.shape[1:]
    rows = smoothing_matrix(height, sigma).astype(maps.dtype)
    columns = smoothing_matrix(width, sigma).astype(maps.dtype)
    smoothed: npt.NDArray[np.floating] = rows @ maps @ columns.T
    return smoothed


def _cumulative(values: F64) -> F64:
    """Sums of the first 0, 1, ... columns: ``[P, K]`` to ``[P, K + 1]``."""
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _possible_rank(rank: int, num_images: int, num_channels: int) -> int:
    if rank < 0:
        raise DataError(f"the rank must not be negative, got {rank}")
    if num_images < 2:
        raise DataError(f"statistics need at least 2 images, got {num_images}")
    return min(rank, num_images - 1, num_channels - 1)
