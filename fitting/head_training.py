"""Training a head on marked defects: what it needs of images, and two layers by logistic regression.

Axes: N good images, M marked bad ones, Q cells, C channels, H hidden units of each of E members.

Where in a bad picture the defect is, nobody need have said: the cells that the Gaussian statistics find least normal
stand for it, or those within the marked region. Against them stand cells of good pictures, half of them their least
normal ones, half drawn. On cells in whitened coordinates, about each cell's own mean, two layers are fitted by logistic
regression (L-BFGS, gradients by hand), E times from different beginnings, all at once. The mean of their logits is the
head's: with few marks each one alone depends on where it began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.head import DefectHead, pooled_cells, top_mean
from edgeflame.tensors import F32, F64

HIDDEN, MEMBERS = 16, 4
UNITS = HIDDEN * MEMBERS
"""Hidden units of a member, and members; together one layer of 64."""
GOOD_CELLS, LEAST_PER_GOOD, MOST_PER_GOOD = 6000, 8, 16
"""Cells of good images that are learnt from, all together, and from each image."""
CELLS_PER_BAD = 12
PENALTY = 0.003
"""Of the sum of squares of all weights, beside the mean logistic loss in which good and bad count alike."""
WHITENING = 0.05
"""Share of the mean variance that is added before cells are whitened."""
STEPS = 40
PAIRS, MAX_HALVINGS = 10, 20
"""Steps that L-BFGS remembers; halvings of one before it ends."""
TOP_SHARE = 0.04
"""Share of the cells whose logits are averaged."""
MIN_CELLS_ALONG = 12
"""A grid is pooled as long as this many cells are left along either axis."""


@dataclass(frozen=True, kw_only=True)
class HeadImages:
    """What the head needs of some images.

    Attributes:
        cells: ``[N, Q, C]`` float16, mean embeddings of the cells.
        distances: ``[N, Q]``, mean distances of the cells before smoothing.
        scores: ``[N]`` by statistics that did not see them.
        groups: the part that each shows.
        kinds: of defects; ``""`` where it is not known, or the image is good.
        regions: for each ``[Q]``, the share of each cell that was marked, or None.
    """

    cells: npt.NDArray[np.float16]
    distances: F32
    scores: F64
    groups: Sequence[str]
    kinds: Sequence[str] = ()
    regions: Sequence[F32 | None] = ()

    def __len__(self) -> int:
        return len(self.cells)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.intp]) -> HeadImages:
        """Some of them, in the given order."""
        chosen = [int(index) for index in indices]
        return HeadImages(
            cells=self.cells[chosen],
            distances=self.distances[chosen],
            scores=self.scores[chosen],
            groups=[self.groups[index] for index in chosen],
            kinds=[self.kinds[index] for index in chosen] if self.kinds else (),
            regions=[self.regions[index] for index in chosen] if self.regions else (),
        )


def pool_of(grid: tuple[int, int]) -> int:
    """How many positions a cell has along each axis."""
    pool = 1
    while all(side % (2 * pool) == 0 and side // (2 * pool) >= MIN_CELLS_ALONG for side in grid) and pool < 8:
        pool *= 2
    return pool


def describe_images(statistics: PackageStatistics, embeddings: F32) -> tuple[npt.NDArray[np.float16], F32]:
    """``cells`` and ``distances`` of :class:`HeadImages`, of embeddings ``[N, P, C]``."""
    grid = statistics.grid
    pool = pool_of(grid)
    distances = statistics.distances(embeddings)[:, :, None]
    return (
        pooled_cells(embeddings, grid=grid, pool=pool).astype(np.float16),
        pooled_cells(distances, grid=grid, pool=pool)[:, :, 0].astype(np.float32),
    )


def region_of(mask: npt.NDArray[np.uint8], grid: tuple[int, int]) -> F32:
    """Share of each cell that a mask ``[height, width]`` covers, ``[Q]``."""
    pool = pool_of(grid)
    covered = cv2.resize(
        (mask > 0).astype(np.float32), (grid[1] // pool, grid[0] // pool), interpolation=cv2.INTER_AREA
    )
    return np.asarray(covered, dtype=np.float32).ravel()


class Coordinates:
    """Cells about each one's own mean over good images, whitened: what is learnt in.

    Args:
        good: the images.
        symmetric: whiten without turning the channels, so that coordinates of different sites mean the same.
    """

    def __init__(self, good: HeadImages, *, symmetric: bool = False) -> None:
        # The mean over many float16 would be taken in float16.
        self.mean: F32 = np.asarray(good.cells.mean(axis=0, dtype=np.float32), dtype=np.float32)
        covariance: F64 = np.zeros((self.mean.shape[1],) * 2)
        for cells in good.cells:
            residual = cells.astype(np.float32) - self.mean
            covariance += residual.T @ residual
        covariance /= max(1, len(good) - 1) * len(self.mean)
        values, vectors = np.linalg.eigh(covariance)
        floor = WHITENING * max(float(values.mean()), 1e-12)
        whitening = vectors / np.sqrt(np.maximum(values, 0) + floor)
        self.transform: F32 = (whitening @ vectors.T if symmetric else whitening).astype(np.float32)

    def __call__(self, cells: npt.NDArray[np.float16], at: slice | npt.NDArray[np.intp] = slice(None)) -> F32:
        """``[..., C]`` of the cells at some places."""
        whitened: F32 = np.asarray((cells.astype(np.float32) - self.mean[at]) @ self.transform, dtype=np.float32)
        return whitened


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What was learnt, in whitened coordinates.

    Attributes:
        first: ``[C, E H]``.
        bias: ``[E H]``.
        second: ``[E H]``, the mean over members taken in.
    """

    first: F32
    bias: F32
    second: F32

    def logits(self, coordinates: Coordinates, images: HeadImages) -> F64:
        """The mean of the largest logits of each image, ``[N]``."""
        top = top_of(images.cells.shape[1])
        weights = coordinates.transform @ self.first
        bias = self.bias - coordinates.mean @ weights
        values = np.empty(len(images))
        for index, cells in enumerate(images.cells):
            hidden = np.maximum(cells.astype(np.float32) @ weights + bias, 0)
            values[index] = top_mean((hidden @ self.second)[None], top)[0]
        return values

    def as_head(self, coordinates: Coordinates, *, grid: tuple[int, int], scale: float, centre: float) -> DefectHead:
        """The head whose factor's logarithm is ``scale (logit - centre)``, for embeddings as they are."""
        weights = (coordinates.transform @ self.first).astype(np.float32)
        return DefectHead(
            grid=grid,
            pool=pool_of(grid),
            top=top_of(len(coordinates.mean)),
            weights=weights,
            bias=(self.bias - coordinates.mean @ weights).astype(np.float32),
            out=(scale * self.second).astype(np.float32),
            offset=-scale * centre,
        )


def top_of(num_cells: int) -> int:
    """How many of the largest logits are averaged."""
    return max(1, round(TOP_SHARE * num_cells))


def train(coordinates: Coordinates, good: HeadImages, bad: HeadImages, seed: int) -> Layers:
    """Fit the layers; each marked image counts alike, and good and bad cells weigh as much together."""
    rng = np.random.default_rng(seed)
    channels = good.cells.shape[2]
    cells = cells_to_learn(coordinates, good, bad, rng)
    return layers_of(fit_layers(cells, initial_parameters(channels, rng), steps=STEPS)[0], channels)


@dataclass(frozen=True, kw_only=True)
class LearningCells:
    """Cells of good and bad images: ``x [R, C]``, ``target [R]`` (1: bad) and ``weights [R]``."""

    x: F32
    target: F32
    weights: F32


def cells_to_learn(
    coordinates: Coordinates, good: HeadImages, bad: HeadImages, rng: np.random.Generator
) -> LearningCells:
    """The cells that heads learn from: some of each good image, and of each bad one where its defect is."""
    num_cells = good.cells.shape[1]
    per_good = min(max(GOOD_CELLS // len(good), LEAST_PER_GOOD), MOST_PER_GOOD)
    rows: list[F32] = []
    for image in range(len(good)):
        oddest = np.argsort(-good.distances[image])[: per_good // 2]
        chosen = np.concatenate([oddest, rng.integers(0, num_cells, per_good - len(oddest))])
        rows.append(coordinates(good.cells[image, chosen], chosen))
    num_good = sum(len(one) for one in rows)
    weights = [np.full(num_good, 0.5 / num_good)]
    for image in range(len(bad)):
        chosen = bad_cells(bad, image)
        rows.append(coordinates(bad.cells[image, chosen], chosen))
        weights.append(np.full(len(chosen), 0.5 / len(chosen) / len(bad)))
    x = np.concatenate(rows)
    target = np.zeros(len(x), dtype=np.float32)
    target[num_good:] = 1.0
    return LearningCells(x=x, target=target, weights=np.concatenate(weights).astype(np.float32))


def bad_cells(bad: HeadImages, image: int) -> npt.NDArray[np.intp]:
    """Which cells of a marked image stand for its defect."""
    region = bad.regions[image] if bad.regions else None
    if region is not None and region.max() > 0:
        # A marked hair covers no cell by half.
        return np.flatnonzero(region >= min(0.25, float(region.max())))
    return np.argsort(-bad.distances[image])[:CELLS_PER_BAD]


def initial_parameters(channels: int, rng: np.random.Generator) -> F64:
    """A head before any learning, flat: the first layer, its bias, the second, the members' offsets."""
    first = rng.normal(0, channels**-0.5, (channels, UNITS))
    second = rng.normal(0, 0.1, UNITS)
    return np.concatenate([first.ravel(), np.zeros(UNITS), second, np.zeros(MEMBERS)])


def layers_of(parameters: npt.NDArray[np.floating], channels: int) -> Layers:
    """The layers of flat numbers; the members' offsets, the same for all cells, are left out."""
    w1, b1, w2, _ = np.split(parameters.astype(np.float32), _ends(channels))
    return Layers(first=w1.reshape(channels, UNITS), bias=b1, second=w2 / np.float32(MEMBERS))


def _ends(channels: int) -> npt.NDArray[np.intp]:
    return np.cumsum([channels * UNITS, UNITS, UNITS])


def fit_layers(cells: LearningCells, start: F64, *, steps: int, pull: float = 0.0) -> tuple[F64, float]:
    """Least penalised logistic loss of each member, from given numbers.

    Args:
        cells: to learn from.
        start: flat, as :func:`initial_parameters` gives them.
        steps: at most.
        pull: of the square of the distance to ``start``, beside the loss.

    Returns:
        The numbers, and the loss with which they began, summed over members.
    """
    x, target, weights = cells.x, cells.target, cells.weights
    channels, ends = x.shape[1], _ends(x.shape[1])
    of_member = np.repeat(np.eye(MEMBERS, dtype=np.float32), HIDDEN, axis=0)

    def loss(parameters: F64) -> tuple[float, F64]:
        w1, b1, w2, b2 = np.split(parameters.astype(np.float32), ends)
        hidden = x @ w1.reshape(channels, UNITS)
        hidden += b1
        np.maximum(hidden, 0, out=hidden)
        outer = of_member * w2[:, None]
        z = hidden @ outer + b2
        # log(1 + exp(z)) - target z, without overflow
        losses = np.maximum(z, 0) - target[:, None] * z + np.log1p(np.exp(-np.abs(z)))
        by_z = weights[:, None] * (1 / (1 + np.exp(-np.clip(z, -60, 60))) - target[:, None])
        by_second = ((hidden.T @ by_z) * of_member).sum(axis=1)
        by_hidden = by_z @ outer.T
        by_hidden *= hidden > 0
        gradient = np.concatenate(
            [(x.T @ by_hidden).ravel(), by_hidden.sum(axis=0), by_second, by_z.sum(axis=0)]
        ).astype(np.float64)
        penalised = parameters[: ends[-1]]
        gradient[: ends[-1]] += 2 * PENALTY * penalised
        moved = parameters - start
        gradient += 2 * pull * moved
        value = float((weights @ losses).sum()) + PENALTY * float(penalised @ penalised) + pull * float(moved @ moved)
        return value, gradient

    return minimise(loss, start, steps), loss(start)[0]


def minimise(loss: Callable[[F64], tuple[float, F64]], start: F64, steps: int) -> F64:
    """Where L-BFGS (Nocedal and Wright, algorithm 7.5; steps by halving) has come to after so many steps.

    Args:
        loss: its value and gradient ``[P]`` at ``[P]``.
        start: ``[P]``.
        steps: at most.
    """
    at, (value, gradient) = start, loss(start)
    pairs: deque[tuple[F64, F64, float]] = deque(maxlen=PAIRS)
    for _ in range(steps):
        if np.abs(gradient).max() < 1e-6:
            break
        direction = -gradient
        used = []
        for moved, changed, curvature in reversed(pairs):
            share = float(moved @ direction) / curvature
            direction = direction - share * changed
            used.append(share)
        if pairs:
            _, changed, curvature = pairs[-1]
            direction = direction * (curvature / float(changed @ changed))
        for (moved, changed, curvature), share in zip(pairs, reversed(used), strict=True):
            direction = direction + (share - float(changed @ direction) / curvature) * moved
        slope = float(gradient @ direction)
        step = 1.0 if pairs else min(1.0, 1.0 / float(np.linalg.norm(gradient)))
        for _ in range(MAX_HALVINGS):
            there = at + step * direction
            value_there, gradient_there = loss(there)
            if value_there <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            break
        moved, changed = there - at, gradient_there - gradient
        curvature = float(moved @ changed)
        if curvature > 1e-10 * float(changed @ changed):
            pairs.append((moved, changed, curvature))
        at, value, gradient = there, value_there, gradient_there
    return at
