"""The metric of FedDyMem, in which patches and prototypes are compared, and groups of what lies near in it.

The metric is whitening, then the memory generator. A linear generator
*before* the whitening would be undone by it (a Mahalanobis distance does not change under linear maps), so it comes
after: T = (I + W) S^(-1/2), with S the covariance of patches about their nearest prototypes and W = 0 at first. The
root is the symmetric one, which turns nothing, so that a generator still fits when the covariance changes from round
to round. To the squared distance so measured is added that between a patch's place in the picture and the prototype's.

Axes: n points, C embedding channels, D coordinates of a point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeflame.errors import NumericalError
from edgeflame.tensors import F32

DISTANCES_AT_ONCE = 1 << 24
"""Elements of a distance matrix held at once: 64 MiB."""


GROUPING_STEPS = 8
"""Of k-means, when a memory is reduced."""


def aligned_tensor(array: F32) -> Tensor:
    """A tensor of its own: in memory that torch aligns, so that its products are the same bits every time.

    The products of a tensor that shares numpy's memory depend on where that happens to lie.
    """
    return torch.from_numpy(array).clone()


class MemoryGenerator(nn.Module):
    """A residual linear projection, the identity at first. It is trained at a site and never leaves it."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, num_channels))

    def forward(self, whitened: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, C]``."""
        return whitened + whitened @ self.weight.T


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """``(x - centre) @ matrix``: ``[C]`` and ``[C, C]``, symmetric.

    Attributes:
        place_scale: what the length of the picture's side counts for in whitened units; 0 where places are ignored.
    """

    centre: Tensor
    matrix: Tensor
    place_scale: float = 0.0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, C]``."""
        return (embeddings - self.centre) @ self.matrix


def fit_whitening(
    samples: F32, nearest: F32 | None, *, ridge: float, device: torch.device, place_scale: float = 0.0
) -> Whitening:
    """Whitening by the covariance of patches about their mean, or about their nearest prototypes, plus a ridge.

    Args:
        samples: ``[n, C]`` patches.
        nearest: ``[n, C]`` the prototype nearest to each; None takes the mean of all.
        ridge: share of the mean variance that is added to every eigenvalue.
        device: where the result lives.
        place_scale: of the result.

    Raises:
        NumericalError: nothing varies between the samples.
    """
    centre = samples.mean(axis=0, dtype=np.float64)
    centred = samples.astype(np.float64) - (centre if nearest is None else nearest)
    covariance = centred.T @ centred / len(samples)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    mean_variance = float(np.clip(eigenvalues, 0, None).mean())
    if not mean_variance > 0:
        raise NumericalError("nothing varies between the patches; are they all of the same picture?")
    matrix = (vectors / np.sqrt(np.clip(eigenvalues, 0, None) + ridge * mean_variance)) @ vectors.T
    return Whitening(
        centre=aligned_tensor(centre.astype(np.float32)).to(device),
        matrix=aligned_tensor(matrix.astype(np.float32)).to(device),
        place_scale=place_scale,
    )


def combined_transform(whitening: Whitening, generator: MemoryGenerator) -> F32:
    """Both as one matrix ``[C, C]``, for :class:`edgeflame.statistics.memory.MemoryStatistics`."""
    with torch.no_grad():
        both = generator.weight.double() @ whitening.matrix.double() + whitening.matrix.double()
    transform: F32 = both.float().cpu().numpy()
    return transform


def comparable(whitening: Whitening, generator: MemoryGenerator, values: Tensor, places: Tensor) -> Tensor:
    """``values [n, C]`` at ``places [n, 2]`` as points ``[n, C + 2]`` whose Euclidean distances are the metric's."""
    with torch.no_grad():
        return torch.cat([generator(whitening(values)), whitening.place_scale * places], dim=1)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """``[n, C]`` and ``[M, C]`` to ``[n, M]``, >= 0."""
    products = rows @ columns.T
    squared = rows.square().sum(dim=1, keepdim=True) + columns.square().sum(dim=1) - 2 * products
    return squared.clamp_min(0)


def nearest_index(rows: Tensor, columns: Tensor) -> Tensor:
    """The index of the nearest column for each row, ``[n]`` int64."""
    at_once = max(1, DISTANCES_AT_ONCE // max(1, len(columns)))
    found = [squared_distances(part, columns).argmin(dim=1) for part in torch.split(rows, at_once)]
    return torch.cat(found)


def grouped(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """Groups of points that lie near one another: weighted k-means, from the heaviest points on.

    Args:
        points: ``[n, D]``.
        weights: ``[n]`` float64.
        count: how many groups, at most.

    Returns:
        The group of each point, ``[n]`` int64.
    """
    if len(points) <= count:
        return torch.arange(len(points))
    centres = points[weights.argsort(descending=True, stable=True)[:count].to(points.device)]
    group = nearest_index(points, centres).cpu()
    for _ in range(GROUPING_STEPS):
        centres = means_of_groups(points, group, count, weights, empty=centres)
        group = nearest_index(points, centres).cpu()
    return group


def means_of_groups(
    values: Tensor, group_of: Tensor, count: int, weights: Tensor | None = None, *, empty: Tensor
) -> Tensor:
    """The (weighted) mean of the ``values [n, D]`` of each group, ``[count, D]``; ``empty`` where a group has none."""
    # On the CPU, where the order of additions is always the same.
    shares = torch.ones(len(values), dtype=torch.float64) if weights is None else weights.cpu().double()
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, group_of, values.cpu().double() * shares[:, None])
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, group_of, shares)[:, None]
    means = (sums / totals.where(totals > 0, 1.0)).float().to(values.device)
    return torch.where((totals > 0).to(values.device), means, empty)
