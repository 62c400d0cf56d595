"""Per-position Gaussian statistics: fitting the low-rank form, its distance, and the map's smoothing.

Axes: N images, P = grid height x grid width positions, C embedding channels, K rank.

The distance is Mahalanobis' (FLAME Eq. 17, 18 and 23) with the covariance in low-rank form: the K leading
eigenpairs (lambda_i, u_i) and one value s2 for the rest (probabilistic PCA). With d = x - mu, t = U'd and
r = d - U t::

    distance^2 = |r|^2 / s2 + sum_i t_i^2 / lambda_i

which is non-negative by construction, also with U rounded to float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.statistics.moments import Moments, require_finite
from edgeflame.statistics.pooling import map_pooled
from edgeflame.tensors import F32, F64

DEFAULT_RIDGE = 0.01
"""Ridge added to every eigenvalue, as a share of the mean variance over positions and channels."""

SUBSPACE_STEPS = 3
"""Steps from the eigenvectors of nearly the same images; distances are then right to a few thousandths."""


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

    @property
    def mean_log_determinant(self) -> float:
        """Of the covariances with the ridge, mean over positions: twice the logarithm of an ellipsoid's volume."""
        eigenvalues, residual = (one.astype(np.float64) for one in self.variances())
        per_position = np.log(eigenvalues).sum(axis=1) + (self.num_channels - self.rank) * np.log(residual)
        return float(per_position.mean())

    def as_stored(self) -> LowRankGaussian:
        """The same with the basis rounded to float16, as a package keeps it.

        What calibrates a threshold and what the line runs are then one and the same.
        """
        return replace(self, basis=self.basis.astype(np.float16).astype(np.float32))


def fit_gaussian(
    moments: Moments,
    *,
    grid: tuple[int, int],
    rank: int,
    ridge: float = DEFAULT_RIDGE,
    radius: int = 0,
    near: LowRankGaussian | None = None,
) -> LowRankGaussian:
    """The low-rank Gaussian of accumulated moments.

    A rank above what the images can determine (N - 1) or the channels allow (C - 1) is lowered to that; with
    K = N - 1 and without pooling the form is exact.

    Args:
        moments: of the images.
        grid: height and width of the patch grid.
        rank: K.
        ridge: share of the mean variance added to every eigenvalue.
        radius: of the square of cells over which each position's moments are pooled; 0 for its own alone.
        near: of nearly the same images and of the same radius. Its eigenvectors are then improved instead of being
            computed from nothing, which takes a tenth of the time; a rank some columns below its own makes that
            accurate.

    Raises:
        DataError: fewer than two images, or a rank below zero.
        NumericalError: nothing varies between the images.
    """
    num_positions, num_channels = moments.shift.shape
    rank = _possible_rank(rank, moments.count, num_channels)
    mean = np.empty((num_positions, num_channels), dtype=np.float32)
    basis = np.empty((num_positions, num_channels, rank), dtype=np.float32)
    eigenvalues = np.empty((num_positions, rank), dtype=np.float32)
    residual = np.empty(num_positions, dtype=np.float32)

    def block(at: slice, block_mean: F64, covariance: F64) -> None:
        mean[at] = block_mean
        if near is None:
            values, vectors = np.linalg.eigh(covariance)  # ascending
        else:
            values, vectors = _improved_eigenvectors(covariance, near.basis[at])
        values = np.clip(values[:, ::-1], 0.0, None)
        basis[at] = vectors[:, :, ::-1][:, :, :rank]
        eigenvalues[at] = values[:, :rank]
        rest = np.trace(covariance, axis1=1, axis2=2) - values[:, :rank].sum(axis=1)
        residual[at] = np.clip(rest, 0.0, None) / (num_channels - rank)

    map_pooled(moments, grid=grid, radius=radius, work=block)
    return LowRankGaussian(
        grid=grid,
        count=moments.count,
        ridge=ridge,
        mean=mean,
        basis=basis,
        eigenvalues=eigenvalues,
        residual=residual,
    )


def _improved_eigenvectors(covariance: F64, start: F32) -> tuple[F32, F32]:
    """Subspace iteration, and Rayleigh and Ritz's values and vectors in its span, ascending."""
    matrices, span = covariance.astype(np.float32), start
    for _ in range(SUBSPACE_STEPS):
        span, _ = np.linalg.qr(matrices @ span)
    values, vectors = np.linalg.eigh(span.transpose(0, 2, 1) @ (matrices @ span))
    return values, span @ vectors


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


def _possible_rank(rank: int, num_images: int, num_channels: int) -> int:
    if rank < 0:
        raise DataError(f"the rank must not be negative, got {rank}")
    if num_images < 2:
        raise DataError(f"statistics need at least 2 images, got {num_images}")
    return min(rank, num_images - 1, num_channels - 1)
