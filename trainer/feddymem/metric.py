"""The metric that patches and prototypes are compared in: whitening, then the memory generator.

Axes: n patches, M prototypes, C embedding channels.

A linear generator *before* the whitening would be undone by it (a Mahalanobis distance does not change under linear
maps), so it comes after: T = (I + W) S^(-1/2), with S the prototypes' covariance and W = 0 at first. The root is the
symmetric one, which turns nothing, so that a generator still fits when the covariance changes from round to round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeflame.errors import NumericalError
from edgeflame.moments import F32

DISTANCES_AT_ONCE = 1 << 24
"""Elements of a distance matrix held at once: 64 MiB."""


def tensor_of(array: F32) -> Tensor:
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
    """``(x - centre) @ matrix``: ``[C]`` and ``[C, C]``, symmetric."""

    centre: Tensor
    matrix: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, C]``."""
        return (embeddings - self.centre) @ self.matrix


def whitening_of(samples: F32, weights: F32 | None, *, ridge: float, device: torch.device) -> Whitening:
    """Whitening by the covariance of ``samples [n, C]`` with ``weights [n]``, plus a ridge.

    Args:
        samples: prototypes or patches.
        weights: of each; None: all the same.
        ridge: share of the mean variance that is added to every eigenvalue.
        device: where the result lives.

    Raises:
        NumericalError: nothing varies between the samples.
    """
    share = np.full(len(samples), 1 / len(samples)) if weights is None else weights / weights.sum(dtype=np.float64)
    values = samples.astype(np.float64)
    centre = share @ values
    centred = values - centre
    covariance = (centred * share[:, None]).T @ centred
    eigenvalues, vectors = np.linalg.eigh(covariance)
    mean_variance = float(np.clip(eigenvalues, 0, None).mean())
    if not mean_variance > 0:
        msg = "nothing varies between the patches; are they all of the same picture?"
        raise NumericalError(msg)
    matrix = (vectors / np.sqrt(np.clip(eigenvalues, 0, None) + ridge * mean_variance)) @ vectors.T
    return Whitening(
        centre=tensor_of(centre.astype(np.float32)).to(device),
        matrix=tensor_of(matrix.astype(np.float32)).to(device),
    )


def transform_of(whitening: Whitening, generator: MemoryGenerator) -> F32:
    """Both as one matrix ``[C, C]``, for :class:`edgeflame.memory_statistics.MemoryStatistics`."""
    with torch.no_grad():
        both = generator.weight.double() @ whitening.matrix.double() + whitening.matrix.double()
    transform: F32 = both.float().cpu().numpy()
    return transform


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """``[n, C]`` and ``[M, C]`` to ``[n, M]``, >= 0."""
    products = rows @ columns.T
    squared = rows.square().sum(dim=1, keepdim=True) + columns.square().sum(dim=1) - 2 * products
    return squared.clamp_min(0)


def nearest(rows: Tensor, columns: Tensor) -> Tensor:
    """The index of the nearest column for each row, ``[n]`` int64."""
    at_once = max(1, DISTANCES_AT_ONCE // max(1, len(columns)))
    found = [squared_distances(part, columns).argmin(dim=1) for part in torch.split(rows, at_once)]
    return torch.cat(found)


def greedy_k_centre(points: Tensor, count: int) -> Tensor:
    """Points that lie far apart: each next one is the farthest from those before (the first: from the mean).

    Args:
        points: ``[n, C]``.
        count: how many; fewer where no more than that differ.

    Returns:
        Their indices, ``[<= count]`` int64.
    """
    distance = squared_distances(points, points.mean(dim=0, keepdim=True))[:, 0]
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        farthest = int(distance.argmax())
        if chosen and not float(distance[farthest]) > 0:
            break
        chosen.append(farthest)
        new = squared_distances(points, points[farthest : farthest + 1])[:, 0]
        # Exactly zero, also where rounding says otherwise: a point is not chosen twice.
        new[farthest] = 0
        distance = new if len(chosen) == 1 else torch.minimum(distance, new)
    return torch.tensor(chosen, dtype=torch.int64, device=points.device)
