"""Moments pooled over neighbouring positions: for parts that do not lie exactly alike.

Axes: P = grid height H x grid width W positions, C embedding channels.

Each position keeps one Gaussian, but its moments are the mean of those of the square of positions within a radius, as
if each image had been taken in all of these displacements too. With the mean ``m_q`` and the sample covariance ``S_q``
of the Q neighbours q (fewer than (2 radius + 1)^2 at the border) and N images::

    m = 1/Q sum of m_q,        S = 1/Q sum of (S_q + N/(N - 1) (m_q - m)(m_q - m)')

which is the covariance of the Q N embeddings, with 1/(Q (N - 1)). Moments of data sets are merged first and pooled
then, so that pooling changes nothing about merging.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeflame.errors import DataError
from edgeflame.statistics.moments import Moments, map_position_blocks
from edgeflame.tensors import F64

BLOCK_BYTES = 24 << 20
"""Of the covariances that are pooled at a time, in each thread."""

MAX_ROWS = 4
"""Of the grid that are pooled at a time; the covariances of ``radius`` rows on either side are needed beside them."""


def map_pooled(
    moments: Moments, *, grid: tuple[int, int], radius: int, work: Callable[[slice, F64, F64], None]
) -> None:
    """Call ``work`` on blocks of positions with their pooled ``mean [block, C]`` and ``covariance [block, C, C]``.

    Raises:
        DataError: fewer than two images, or a radius below zero.
    """
    if radius < 0:
        raise DataError(f"the pooling radius must not be negative, got {radius}")
    height, width = grid
    channels = moments.shift.shape[1]
    means = moments.mean.reshape(height, width, channels)
    pooled_means = _window_mean(_window_mean(means, 0, radius), 1, radius)
    rows = int(np.clip(BLOCK_BYTES // (width * channels**2 * 8), 1, MAX_ROWS))

    def block(at: slice) -> None:
        first, last = at.start // width, at.stop // width
        low, high = max(0, first - radius), min(height, last + radius)
        covariance = moments.covariance(slice(low * width, high * width))
        if radius:
            covariance = covariance.reshape(high - low, width, channels, channels)
            covariance = _window_mean(covariance, 0, radius)[first - low : last - low]
            covariance = _window_mean(covariance, 1, radius).reshape(-1, channels, channels)
            covariance += _spread(means, pooled_means, (first, last), radius, moments.count)
        work(at, pooled_means[first:last].reshape(-1, channels), covariance)

    map_position_blocks(height * width, block, size=rows * width)


def _window_mean(values: F64, axis: int, radius: int) -> F64:
    """The mean over all within ``radius`` along an axis, of those that there are."""
    if radius == 0:
        return values
    values = np.moveaxis(values, axis, 0)
    size = len(values)
    mean = values.copy()
    for offset in range(1, min(radius, size - 1) + 1):
        mean[offset:] += values[:-offset]
        mean[:-offset] += values[offset:]
    mean /= _window_sizes(size, radius).reshape(-1, *(1,) * (values.ndim - 1))
    return np.moveaxis(mean, 0, axis)


def _window_sizes(size: int, radius: int) -> F64:
    index = np.arange(size)
    sizes: F64 = (np.minimum(index + radius, size - 1) - np.maximum(index - radius, 0) + 1).astype(np.float64)
    return sizes


def _spread(means: F64, pooled_means: F64, rows: tuple[int, int], radius: int, count: int) -> F64:
    """``count / (count - 1)`` times the covariance of the neighbours' means, ``[block, C, C]``."""
    height, width, channels = means.shape
    first, last = rows
    centres = pooled_means[first:last]
    steps = range(-radius, radius + 1)
    deviations = np.zeros((len(steps) ** 2, last - first, width, channels))
    for index, (down, right) in enumerate((down, right) for down in steps for right in steps):
        y = slice(max(first, -down), min(last, height - down))
        x = slice(max(0, -right), min(width, width - right))
        if y.start < y.stop and x.start < x.stop:
            there = means[y.start + down : y.stop + down, x.start + right : x.stop + right]
            deviations[index, y.start - first : y.stop - first, x] = (
                there - centres[y.start - first : y.stop - first, x]
            )
    stacked = deviations.reshape(len(deviations), -1, channels).transpose(1, 0, 2)  # [block, neighbours, C]
    sizes = np.outer(_window_sizes(height, radius)[first:last], _window_sizes(width, radius)).reshape(-1, 1, 1)
    spread: F64 = stacked.transpose(0, 2, 1) @ stacked
    spread *= count / (count - 1) / sizes
    return spread
