"""Deciding by held-out parts whether a head for marked defects is to count, and how much.

With the score g of the Gaussians and the head's logit u (:mod:`fitting.head_training`), brought to mean 0 and deviation
1 on held-out good pictures, the logarithm of the fused score is ``log g + w s u``, where s is the deviation of
``log g`` on the same pictures. The weight w is chosen by cross-fitting over parts: by the mean over kinds of the area
under the curve of bad pictures that the head did not see. Held-out marks, mostly few, are weak evidence, and a half was
good on all data tried: of the weights that gain about as much as the best, the one nearest to it is taken. None counts
that loses more than half its standard error, or by which kinds that the head did not see (each left out in turn) are
caught worse by more than theirs. Where fewer than two kinds are named, bad pictures that look alike stand for a kind.
If no weight counts, there is no head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError
from edgeflame.log import EventLog
from edgeflame.statistics.head import LIMIT, DefectHead
from edgeflame.statistics.moments import one_blas_thread
from edgeflame.tensors import F64
from fitting.crossfit import make_folds
from fitting.head_training import Coordinates, HeadImages, bad_cells, train

log = EventLog("head")

WEIGHTS = (0.5, 0.25, 1.0, 1.5)
"""Tried for the fusion, the most likely first."""
FOLDS = 5
ALIKE_GAIN = 0.5
"""The first weight is taken that gains no less than the best but for so many standard errors."""
MOST_LOSS = 0.5
"""In standard errors."""
MIN_BAD_PARTS = 3
"""Fewer marked bad parts make no head."""
MAX_KINDS = 8
"""Kinds that are left out in turn, the most frequent ones."""
ALIKE, ROUNDS = 3, 10
"""Groups of bad pictures that look alike, where kinds are not named; rounds of k-means."""


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
    coordinates = Coordinates(good)
    good_logits, bad_logits = _held_out_logits(coordinates, good, bad, seed)
    centre, deviation = float(good_logits.mean()), max(float(good_logits.std()), 1e-6)
    spread = float(np.log(good.scores).std())
    unseen = _unseen_logits(coordinates, good, bad, kinds, seed)

    def fused(scores: F64, logits: F64, weight: float) -> F64:
        return fused_scores(scores, logits, weight * spread / deviation, centre)

    weight, tried, candidates = 0.0, [], []
    base_seen = placements(good.scores, bad.scores)
    for one in WEIGHTS:
        good_fused = fused(good.scores, good_logits, one)
        seen, seen_error = mean_over(
            placements(good_fused, fused(bad.scores, bad_logits, one)) - base_seen, bad.groups, kinds
        )
        harm, harm_error = _unseen_change(good, bad, unseen, kinds, one, spread)
        tried.append({"weight": one, "gain": round(seen, 4), "unseen": None if harm is None else round(harm, 4)})
        is_safe = harm is None or harm >= -harm_error
        if seen > -MOST_LOSS * seen_error and is_safe:
            candidates.append((one, seen, seen_error))
    if candidates:
        _, most, error = max(candidates, key=lambda one: one[1])
        weight = next(one for one, seen, _ in candidates if seen >= most - ALIKE_GAIN * error)
    details: dict[str, Any] = {
        "num_bad_images": len(bad),
        "num_bad_parts": num_parts,
        "image_AUROC_before": round(float(base_seen.mean()), 4),
        "kinds": sorted({kind for kind in bad.kinds if kind}),
        "kinds_left_out": len(unseen),
        "tried": tried,
    }
    if weight == 0.0:
        reason = "held-out marks are told from good parts worse with one, or kinds that it did not see"
        if base_seen.min() == 1.0:
            reason = "all held-out marks are told from all good parts without one"
        return _none(without, reason, details)
    layers = train(coordinates, good, bad, seed)
    result = HeadFit(
        head=layers.as_head(coordinates, grid=grid, scale=weight * spread / deviation, centre=centre),
        good_scores=fused(good.scores, good_logits, weight),
        bad_scores=fused(bad.scores, bad_logits, weight),
        details=details,
    )
    details["weight"] = weight
    details["image_AUROC_after"] = round(float(placements(result.good_scores, result.bad_scores).mean()), 4)
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


def _held_out_logits(coordinates: Coordinates, good: HeadImages, bad: HeadImages, seed: int) -> tuple[F64, F64]:
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
        layers = train(coordinates, good.subset(np.flatnonzero(~of_good)), bad.subset(np.flatnonzero(~of_bad)), seed)
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
    odd = np.stack([bad.cells[i, bad_cells(bad, i)].astype(np.float64).mean(axis=0) for i in range(len(bad))])
    odd /= odd.std(axis=0) + 1e-9
    return [f"alike {one}" for one in _groups_alike(odd, np.random.default_rng(seed))]


def _groups_alike(points: F64, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """k-means of ``[M, C]`` from centres drawn as k-means++ draws them: the group of each, ``[M]``."""
    centres = points[[int(rng.integers(len(points)))]]
    for _ in range(ALIKE - 1):
        to_nearest = np.square(points[:, None] - centres).sum(axis=2).min(axis=1) + 1e-12
        centres = np.vstack([centres, points[rng.choice(len(points), p=to_nearest / to_nearest.sum())]])
    group: npt.NDArray[np.intp] = np.zeros(len(points), dtype=np.intp)
    for _ in range(ROUNDS):
        group = np.square(points[:, None] - centres).sum(axis=2).argmin(axis=1)
        centres = np.stack(
            [points[group == one].mean(axis=0) if (group == one).any() else centres[one] for one in range(ALIKE)]
        )
    return group


def _unseen_logits(
    coordinates: Coordinates, good: HeadImages, bad: HeadImages, kinds: Sequence[str], seed: int
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
        layers = train(coordinates, good.subset(kept), bad.subset(others), seed)
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
        before = placements(good.scores[fold], bad.scores[left_out])
        after = placements(good.scores[fold] * good_factor, bad.scores[left_out] * bad_factor)
        changes.append(after - before)
        indices.append(left_out)
    at = np.concatenate(indices).tolist()
    change, error = mean_over(
        np.concatenate(changes), [bad.groups[index] for index in at], [kinds[index] for index in at]
    )
    return change, error


def fused_scores(scores: F64, logits: F64, scale: float, centre: float) -> F64:
    """Scores ``[N]`` times the factors that logits about their centre make."""
    factors: F64 = np.exp(np.clip(scale * (logits - centre), -LIMIT, LIMIT))
    return scores * factors


def placements(good: F64, bad: F64) -> F64:
    """For each bad score the share of the good ones below it; their mean is the area under the curve."""
    ordered = np.sort(good)
    below = np.searchsorted(ordered, bad, "left")
    level = np.searchsorted(ordered, bad, "right")
    shares: F64 = (below + level) / (2.0 * len(good))
    return shares


def mean_over(values: F64, groups: Sequence[str], kinds: Sequence[str]) -> tuple[float, float]:
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
