"""Training a head on marked defects, and deciding by held-out parts whether it is to count, and how much.

Axes: N good images, M marked bad ones, Q cells, C channels, H hidden units.

**Training.** Where in a bad picture the defect is, nobody need have said: the cells that the Gaussian statistics find
least normal stand for it, or those within the marked region. Against them stand cells of good pictures, half of them
their least normal ones, half drawn. On cells in whitened coordinates, about each cell's own mean, two layers are fitted
by logistic regression (L-BFGS, gradients by hand); a few seconds on one core.

**Fusion.** With the score g of the Gaussians and the head's logit u, brought to mean 0 and deviation 1 on held-out good
pictures, the logarithm of the fused score is ``log g + w s u``, where s is the deviation of ``log g`` on the same
pictures. The weight w is chosen by cross-fitting over parts: by the mean over kinds of the area under the curve of bad
pictures that the head did not see. It must gain more than half its standard error, and kinds that the head did not see
(each left out in turn) must not be caught worse by more than theirs; of those that gain about as much as the best the
least is taken. Where fewer than two kinds are named, bad pictures that look alike stand for a kind. Otherwise the
weight is 0: there is no head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, require_extra
from edgeflame.log import EventLog
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.head import LIMIT, DefectHead, pooled_cells, top_mean
from edgeflame.statistics.moments import one_blas_thread
from edgeflame.tensors import F32, F64
from fitting.crossfit import make_folds

log = EventLog("head")

HIDDEN = 16
CELLS_PER_GOOD, CELLS_PER_BAD = 8, 12
PENALTY = 0.003
"""Of the sum of squares of all weights, beside the mean logistic loss in which good and bad count alike."""
WHITENING = 0.05
"""Share of the mean variance that is added before cells are whitened."""
STEPS = 40
TOP_SHARE = 0.04
"""Share of the cells whose logits are averaged."""
WEIGHTS = (0.25, 0.5, 1.0, 1.5)
"""Tried for the fusion."""
FOLDS = 5
SIMPLER = 0.5
"""The least weight is taken that gains no less than the best but for so many standard errors."""
LEAST_GAIN = 0.5
"""In standard errors."""
MIN_BAD_PARTS = 3
"""Fewer marked bad parts make no head."""
MIN_CELLS_ALONG = 12
"""A grid is pooled as long as this many cells are left along either axis."""
MAX_KINDS = 8
"""Kinds that are left out in turn, the most frequent ones."""
ALIKE = 3
"""Groups of bad pictures that look alike, where kinds are not named."""


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


class _Coordinates:
    """Cells about each one's own mean over good images, whitened: what is learnt in."""

    def __init__(self, good: HeadImages) -> None:
        # The mean over many float16 would be taken in float16.
        self.mean: F32 = np.asarray(good.cells.mean(axis=0, dtype=np.float32), dtype=np.float32)
        covariance: F64 = np.zeros((self.mean.shape[1],) * 2)
        for cells in good.cells:
            residual = cells.astype(np.float32) - self.mean
            covariance += residual.T @ residual
        covariance /= max(1, len(good) - 1) * len(self.mean)
        values, vectors = np.linalg.eigh(covariance)
        floor = WHITENING * max(float(values.mean()), 1e-12)
        self.transform: F32 = (vectors / np.sqrt(np.maximum(values, 0) + floor)).astype(np.float32)

    def __call__(self, cells: npt.NDArray[np.float16], at: slice | npt.NDArray[np.intp] = slice(None)) -> F32:
        """``[..., C]`` of the cells at some places."""
        whitened: F32 = np.asarray((cells.astype(np.float32) - self.mean[at]) @ self.transform, dtype=np.float32)
        return whitened


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """What was learnt, in whitened coordinates."""

    first: F32
    bias: F32
    second: F32

    def logits(self, coordinates: _Coordinates, images: HeadImages) -> F64:
        """The mean of the largest logits of each image, ``[N]``."""
        top = top_of(images.cells.shape[1])
        weights = coordinates.transform @ self.first
        bias = self.bias - coordinates.mean @ weights
        values = np.empty(len(images))
        for index, cells in enumerate(images.cells):
            hidden = np.maximum(cells.astype(np.float32) @ weights + bias, 0)
            values[index] = top_mean((hidden @ self.second)[None], top)[0]
        return values


def top_of(num_cells: int) -> int:
    """How many of the largest logits are averaged."""
    return max(1, round(TOP_SHARE * num_cells))


def _train(coordinates: _Coordinates, good: HeadImages, bad: HeadImages, seed: int) -> _Layers:
    rng = np.random.default_rng(seed)
    num_cells, channels = good.cells.shape[1:]
    rows: list[F32] = []
    weights: list[F64] = []
    for image in range(len(good)):
        oddest = np.argsort(-good.distances[image])[: CELLS_PER_GOOD // 2]
        chosen = np.concatenate([oddest, rng.integers(0, num_cells, CELLS_PER_GOOD - len(oddest))])
        rows.append(coordinates(good.cells[image, chosen], chosen))
    num_good = sum(len(one) for one in rows)
    weights.append(np.full(num_good, 0.5 / num_good))
    for image in range(len(bad)):
        chosen = _bad_cells(bad, image)
        rows.append(coordinates(bad.cells[image, chosen], chosen))
        weights.append(np.full(len(chosen), 0.5 / len(chosen) / len(bad)))
    x = np.concatenate(rows)
    target = np.zeros(len(x), dtype=np.float32)
    target[num_good:] = 1.0
    return _fit_layers(x, target, np.concatenate(weights).astype(np.float32), rng, channels)


def _bad_cells(bad: HeadImages, image: int) -> npt.NDArray[np.intp]:
    region = bad.regions[image] if bad.regions else None
    if region is not None and region.max() > 0:
        # A marked hair covers no cell by half.
        return np.flatnonzero(region >= min(0.25, float(region.max())))
    return np.argsort(-bad.distances[image])[:CELLS_PER_BAD]


def _fit_layers(x: F32, target: F32, weights: F32, rng: np.random.Generator, channels: int) -> _Layers:
    with require_extra("memory", "learning from marks needs SciPy"):
        from scipy.optimize import minimize

    first = rng.normal(0, channels**-0.5, (channels, HIDDEN))
    start = np.concatenate([first.ravel(), np.zeros(HIDDEN), rng.normal(0, 0.1, HIDDEN), np.zeros(1)])
    ends = np.cumsum([channels * HIDDEN, HIDDEN, HIDDEN])

    def loss(parameters: F64) -> tuple[float, F64]:
        as_float = parameters.astype(np.float32)
        w1, b1, w2, b2 = np.split(as_float, ends)
        before = x @ w1.reshape(channels, HIDDEN) + b1
        hidden = np.maximum(before, 0)
        z = hidden @ w2 + b2
        # log(1 + exp(z)) - target z, without overflow
        losses = np.maximum(z, 0) - target * z + np.log1p(np.exp(-np.abs(z)))
        by_z = weights * (1 / (1 + np.exp(-np.clip(z, -60, 60))) - target)
        by_hidden = (by_z[:, None] * w2) * (before > 0)
        gradient = np.concatenate(
            [(x.T @ by_hidden).ravel(), by_hidden.sum(axis=0), hidden.T @ by_z, by_z.sum(keepdims=True)]
        ).astype(np.float64)
        penalised = parameters[: ends[-1]]
        gradient[: ends[-1]] += 2 * PENALTY * penalised
        return float(weights @ losses) + PENALTY * float(penalised @ penalised), gradient

    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x.astype(np.float32)
    w1, b1, w2, _ = np.split(found, ends)
    return _Layers(first=w1.reshape(channels, HIDDEN), bias=b1, second=w2)


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """A head and what it does to images that it did not see.

    Attributes:
        head: None where it would not help, or there are too few marks.
        good_scores: ``[N]`` held-out fused scores.
        bad_scores: ``[M]`` likewise.
        details: for a package's provenance: the weight, the areas under the curve, and why there is no head.
    """

    head: DefectHead | None
    good_scores: F64
    bad_scores: F64
    details: dict[str, Any] = field(default_factory=dict)


def fit_head(good: HeadImages, bad: HeadImages, *, grid: tuple[int, int], seed: int = 0) -> HeadFit:
    """Train a head and decide whether and how much it counts; see the module's text.

    Args:
        good: images with scores by statistics that did not see them.
        bad: images marked as bad, with ``kinds``.
        grid: of the embeddings.
        seed: of the folds and of what training draws.

    Raises:
        DataError: no good images.
    """
    if not len(good):
        raise DataError("a head needs good images")
    with one_blas_thread():
        return _fit_head(good, bad, grid=grid, seed=seed)


def _fit_head(good: HeadImages, bad: HeadImages, *, grid: tuple[int, int], seed: int) -> HeadFit:
    without = HeadFit(head=None, good_scores=good.scores, bad_scores=bad.scores)
    num_parts = len(set(bad.groups))
    if num_parts < MIN_BAD_PARTS or len(set(good.groups)) < 2:
        return _none(without, f"{num_parts} bad parts are marked; a head needs {MIN_BAD_PARTS}")
    kinds = _kinds_of(bad, seed)
    coordinates = _Coordinates(good)
    good_logits, bad_logits = _held_out_logits(coordinates, good, bad, seed)
    centre, deviation = float(good_logits.mean()), max(float(good_logits.std()), 1e-6)
    spread = float(np.log(good.scores).std())
    unseen = _unseen_logits(coordinates, good, bad, kinds, seed)

    def fused(scores: F64, logits: F64, weight: float) -> F64:
        return scores * np.exp(np.clip(weight * spread * (logits - centre) / deviation, -LIMIT, LIMIT))

    best, tried, candidates = (0.0, 0.0), [], []
    base_seen = _placements(good.scores, bad.scores)
    for weight in WEIGHTS:
        good_fused = fused(good.scores, good_logits, weight)
        seen, seen_error = _mean_over(
            _placements(good_fused, fused(bad.scores, bad_logits, weight)) - base_seen, bad.groups, kinds
        )
        harm, harm_error = _unseen_change(good, bad, unseen, kinds, weight, spread)
        tried.append({"weight": weight, "gain": round(seen, 4), "unseen": None if harm is None else round(harm, 4)})
        is_safe = harm is None or harm >= -harm_error
        if seen > LEAST_GAIN * seen_error and is_safe:
            candidates.append((weight, seen, seen_error))
    if candidates:
        _, most, error = max(candidates, key=lambda one: one[1])
        best = next((weight, seen) for weight, seen, _ in candidates if seen >= most - SIMPLER * error)
    details: dict[str, Any] = {
        "num_bad_images": len(bad),
        "num_bad_parts": num_parts,
        "image_AUROC_before": round(float(base_seen.mean()), 4),
        "kinds": sorted({kind for kind in bad.kinds if kind}),
        "kinds_left_out": len(unseen),
        "tried": tried,
    }
    weight = best[0]
    if weight == 0.0:
        return _none(without, "held-out marks are told from good parts no better with one", details)
    layers = _train(coordinates, good, bad, seed)
    scale = weight * spread / deviation
    weights = (coordinates.transform @ layers.first).astype(np.float32)
    head = DefectHead(
        grid=grid,
        pool=pool_of(grid),
        top=top_of(good.cells.shape[1]),
        weights=weights,
        bias=(layers.bias - coordinates.mean @ weights).astype(np.float32),
        out=(scale * layers.second).astype(np.float32),
        offset=-scale * centre,
    )
    result = HeadFit(
        head=head,
        good_scores=fused(good.scores, good_logits, weight),
        bad_scores=fused(bad.scores, bad_logits, weight),
        details=details,
    )
    details["weight"] = weight
    details["image_AUROC_after"] = round(float(_placements(result.good_scores, result.bad_scores).mean()), 4)
    log.info("head", **{key: str(value) for key, value in details.items()})
    return result


def _none(without: HeadFit, reason: str, details: dict[str, Any] | None = None) -> HeadFit:
    log.info("no_head", reason=reason)
    return HeadFit(
        head=None,
        good_scores=without.good_scores,
        bad_scores=without.bad_scores,
        details={**(details or {}), "weight": 0.0, "no_head": reason},
    )


def _held_out_logits(coordinates: _Coordinates, good: HeadImages, bad: HeadImages, seed: int) -> tuple[F64, F64]:
    """Logits ``[N]``, ``[M]`` by heads that did not see the image's part."""
    good_logits, bad_logits = np.zeros(len(good)), np.zeros(len(bad))
    # A part may have good and bad pictures: it goes into one fold with both.
    folds = make_folds([*good.groups, *bad.groups], FOLDS, seed)
    for fold in folds:
        held = np.zeros(len(good) + len(bad), dtype=bool)
        held[fold] = True
        of_good, of_bad = held[: len(good)], held[len(good) :]
        if of_good.all() or of_bad.all():
            raise DataError("one part has nearly all marks; others are needed to test on")
        layers = _train(coordinates, good.subset(np.flatnonzero(~of_good)), bad.subset(np.flatnonzero(~of_bad)), seed)
        good_logits[of_good] = layers.logits(coordinates, good.subset(np.flatnonzero(of_good)))
        bad_logits[of_bad] = layers.logits(coordinates, bad.subset(np.flatnonzero(of_bad)))
    return good_logits, bad_logits


def _kinds_of(bad: HeadImages, seed: int) -> list[str]:
    """The kind of each bad image; where fewer than two are named, those that look alike."""
    named = [kind or "?" for kind in bad.kinds] or ["?"] * len(bad)
    if len({kind for kind in named if kind != "?"}) >= 2:
        return named
    num_parts = len(set(bad.groups))
    if num_parts < 2 * ALIKE:
        return named
    with require_extra("memory", "learning from marks needs SciPy"):
        from scipy.cluster.vq import kmeans2

    odd = np.stack([bad.cells[i, _bad_cells(bad, i)].astype(np.float64).mean(axis=0) for i in range(len(bad))])
    odd /= odd.std(axis=0) + 1e-9
    _, assigned = kmeans2(odd, ALIKE, minit="++", seed=seed)
    return [f"alike {one}" for one in assigned]


def _unseen_logits(
    coordinates: _Coordinates, good: HeadImages, bad: HeadImages, kinds: Sequence[str], seed: int
) -> dict[str, tuple[npt.NDArray[np.intp], F64, npt.NDArray[np.intp], F64]]:
    """By kind, of a head that saw neither it nor a fifth of the good parts: indices and logits of both."""
    names, counts = np.unique(kinds, return_counts=True)
    if len(names) < 2:
        return {}
    folds = make_folds(good.groups, FOLDS, seed)
    found = {}
    for number, name in enumerate(names[np.argsort(-counts)][:MAX_KINDS]):
        left_out = np.flatnonzero(np.asarray(kinds) == name)
        parts = {bad.groups[int(index)] for index in left_out}
        others = [index for index in range(len(bad)) if bad.groups[index] not in parts]
        fold = np.asarray(folds[number % len(folds)])
        kept = np.setdiff1d(np.arange(len(good)), fold)
        if len({bad.groups[index] for index in others}) < 2 or not len(kept):
            continue
        layers = _train(coordinates, good.subset(kept), bad.subset(others), seed)
        found[str(name)] = (
            left_out,
            layers.logits(coordinates, bad.subset(left_out)),
            fold,
            layers.logits(coordinates, good.subset(fold)),
        )
    return found


def _unseen_change(
    good: HeadImages,
    bad: HeadImages,
    unseen: dict[str, tuple[npt.NDArray[np.intp], F64, npt.NDArray[np.intp], F64]],
    kinds: Sequence[str],
    weight: float,
    spread: float,
) -> tuple[float | None, float]:
    """By how much kinds that the head did not see are told apart better, and the standard error; None: not known."""
    if not unseen:
        return None, 0.0
    changes, indices = [], []
    for left_out, bad_logits, fold, good_logits in unseen.values():
        centre, deviation = float(good_logits.mean()), max(float(good_logits.std()), 1e-6)
        good_factor, bad_factor = (
            np.exp(np.clip(weight * spread * (logits - centre) / deviation, -LIMIT, LIMIT))
            for logits in (good_logits, bad_logits)
        )
        before = _placements(good.scores[fold], bad.scores[left_out])
        after = _placements(good.scores[fold] * good_factor, bad.scores[left_out] * bad_factor)
        changes.append(after - before)
        indices.append(left_out)
    at = np.concatenate(indices).tolist()
    change, error = _mean_over(
        np.concatenate(changes), [bad.groups[index] for index in at], [kinds[index] for index in at]
    )
    return change, error


def _placements(good: F64, bad: F64) -> F64:
    """For each bad score the share of the good ones below it; their mean is the area under the curve."""
    ordered = np.sort(good)
    below = np.searchsorted(ordered, bad, "left")
    level = np.searchsorted(ordered, bad, "right")
    placements: F64 = (below + level) / (2.0 * len(good))
    return placements


def _mean_over(values: F64, groups: Sequence[str], kinds: Sequence[str]) -> tuple[float, float]:
    """The mean over kinds of the means over parts, and its standard error."""
    means, errors = [], []
    for kind in sorted(set(kinds)):
        at = [index for index, one in enumerate(kinds) if one == kind]
        by_part: dict[str, list[float]] = {}
        for index in at:
            by_part.setdefault(groups[index], []).append(float(values[index]))
        of_parts = np.array([np.mean(one) for one in by_part.values()])
        means.append(float(of_parts.mean()))
        # One part alone says nothing of its kind's spread: that of all values stands for it.
        deviation = of_parts.std(ddof=1) if len(of_parts) > 2 else max(values.std(), of_parts.std())
        errors.append(float(deviation / np.sqrt(len(of_parts))))
    return float(np.mean(means)), float(np.sqrt(np.sum(np.square(errors))) / len(means))
