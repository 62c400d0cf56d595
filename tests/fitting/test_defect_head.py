"""Training a head and deciding about it, on images whose defects are known."""

from __future__ import annotations

import numpy as np
import pytest

from edgeflame.statistics.head import LIMIT, top_mean
from fitting.defect_head import HeadFit, fit_head
from fitting.head_training import HeadImages, minimise, pool_of

GRID, CELLS, CHANNELS = (12, 12), 144, 10
STRIPES = 3.0
"""What the Gaussians find odd, and is not: a few cells of every image differ along this axis."""


def make(count: int, *, kind: int | None = None, seed: int = 0, first: int = 0, faint: float = 3.0) -> HeadImages:
    """Images whose defect, if any, is a step along the channel ``kind`` in six cells, no larger than the nuisance."""
    rng = np.random.default_rng(seed)
    cells = rng.normal(0, 1, (count, CELLS, CHANNELS))
    for image in range(count):
        cells[image, rng.integers(0, CELLS, 8), 9] += STRIPES * rng.normal(0, 1, 8)
        if kind is not None:
            cells[image, 40:46, kind] += faint
    distances = np.sqrt(np.square(cells).sum(axis=2))
    return HeadImages(
        cells=cells.astype(np.float16),
        distances=distances.astype(np.float32),
        scores=distances.max(axis=1),
        groups=[f"{kind}-{first + index}" for index in range(count)],
        kinds=["" if kind is None else f"kind {kind}"] * count,
    )


def joined(*many: HeadImages) -> HeadImages:
    return HeadImages(
        cells=np.concatenate([one.cells for one in many]),
        distances=np.concatenate([one.distances for one in many]),
        scores=np.concatenate([one.scores for one in many]),
        groups=[group for one in many for group in one.groups],
        kinds=[kind for one in many for kind in one.kinds],
    )


def auroc(good: np.ndarray, bad: np.ndarray) -> float:
    return float((bad[:, None] > good[None]).mean())


def score(fitted: HeadFit, images: HeadImages) -> np.ndarray:
    if fitted.head is None:
        return images.scores
    hidden = np.maximum(images.cells.astype(np.float32) @ fitted.head.weights + fitted.head.bias, 0)
    logs = np.clip(top_mean(hidden @ fitted.head.out, fitted.head.top) + fitted.head.offset, -LIMIT, LIMIT)
    return np.asarray(images.scores * np.exp(logs))


def test_marked_kinds_are_told_better_and_the_held_out_scores_say_so() -> None:
    good = make(120, seed=1)
    bad = joined(make(15, kind=0, seed=2), make(15, kind=1, seed=3))
    fitted = fit_head(good, bad, grid=GRID)
    assert fitted.head is not None, fitted.details
    fresh_good, fresh_bad = make(80, seed=4), joined(make(30, kind=0, seed=5), make(30, kind=1, seed=6))
    before, after = (
        auroc(fresh_good.scores, fresh_bad.scores),
        auroc(score(fitted, fresh_good), score(fitted, fresh_bad)),
    )
    assert after > before + 0.1
    held_out = auroc(fitted.good_scores, fitted.bad_scores)
    assert abs(held_out - after) < 0.1
    assert fitted.details["weight"] > 0
    # Its own images are scored as if they were unseen: no better than others.
    assert held_out < 0.999 or after > 0.98


def test_kinds_that_were_never_marked_are_not_caught_worse() -> None:
    good, fresh_good = make(120, seed=1), make(80, seed=4)
    changes = []
    for unseen in (0, 1, 2):
        marked = joined(*(make(12, kind=kind, seed=10 + kind) for kind in (0, 1, 2) if kind != unseen))
        fitted = fit_head(good, marked, grid=GRID)
        fresh = make(60, kind=unseen, seed=20 + unseen)
        changes.append(auroc(score(fitted, fresh_good), score(fitted, fresh)) - auroc(fresh_good.scores, fresh.scores))
    assert np.mean(changes) > -0.05


def test_marks_that_mean_nothing_make_no_head() -> None:
    good = make(80, seed=1)
    marked = make(20, seed=2)
    bad = HeadImages(
        cells=marked.cells,
        distances=marked.distances,
        scores=marked.scores,
        groups=[f"x{index}" for index in range(20)],
        kinds=["a", "b"] * 10,
    )
    fitted = fit_head(good, bad, grid=GRID)
    fresh_good, fresh_bad = make(60, seed=4), make(60, kind=0, seed=5)
    assert auroc(score(fitted, fresh_good), score(fitted, fresh_bad)) > auroc(fresh_good.scores, fresh_bad.scores) - 0.1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_marks_make_no_head(count: int) -> None:
    good = make(20, seed=1)
    fitted = fit_head(good, make(count, kind=0, seed=2), grid=GRID)
    assert fitted.head is None
    assert f"{count} bad parts are marked" in fitted.details["no_head"]
    assert (fitted.good_scores == good.scores).all()


def test_all_of_one_kind_are_parted_by_their_looks() -> None:
    fitted = fit_head(make(80, seed=1), make(20, kind=0, seed=2), grid=GRID)
    assert fitted.details["kinds_left_out"] == 3
    few = fit_head(make(80, seed=1), make(4, kind=0, seed=2), grid=GRID)
    assert few.details["kinds_left_out"] == 0


def test_a_few_wrong_marks_among_many_cost_little() -> None:
    good = make(120, seed=1)
    right = joined(make(15, kind=0, seed=2), make(15, kind=1, seed=3))
    wrong = make(4, seed=7)
    mixed = joined(
        right,
        HeadImages(
            cells=wrong.cells,
            distances=wrong.distances,
            scores=wrong.scores,
            groups=[f"w{index}" for index in range(4)],
            kinds=["kind 0"] * 4,
        ),
    )
    fresh_good, fresh_bad = make(80, seed=4), make(40, kind=0, seed=5)
    clean, dirty = (fit_head(good, bad, grid=GRID) for bad in (right, mixed))
    assert auroc(score(dirty, fresh_good), score(dirty, fresh_bad)) > (
        auroc(score(clean, fresh_good), score(clean, fresh_bad)) - 0.1
    )


def test_a_region_says_which_cells_are_bad() -> None:
    good = make(120, seed=1)
    bad = joined(make(6, kind=0, seed=2, faint=2.0), make(6, kind=1, seed=3, faint=2.0))
    region = np.zeros(CELLS, np.float32)
    region[40:46] = 1.0
    told = HeadImages(
        cells=bad.cells,
        distances=bad.distances,
        scores=bad.scores,
        groups=bad.groups,
        kinds=bad.kinds,
        regions=[region] * len(bad),
    )
    plain, pointed = (fit_head(good, one, grid=GRID) for one in (bad, told))
    assert auroc(pointed.good_scores, pointed.bad_scores) > auroc(plain.good_scores, plain.bad_scores) - 0.02


def test_the_same_marks_make_the_same_head() -> None:
    good, bad = make(60, seed=1), joined(make(8, kind=0, seed=2), make(8, kind=1, seed=3))
    one, two = (fit_head(good, bad, grid=GRID) for _ in range(2))
    assert (one.head is None) == (two.head is None)
    assert (one.good_scores == two.good_scores).all()


@pytest.mark.parametrize(("grid", "pool"), [((32, 32), 2), ((16, 16), 1), ((64, 48), 4), ((33, 32), 1), ((8, 8), 1)])
def test_cells_are_positions_put_together(grid: tuple[int, int], pool: int) -> None:
    assert pool_of(grid) == pool


def test_the_least_of_a_function_is_found() -> None:
    scales = np.geomspace(1, 100, 12)
    least = np.linspace(-1, 1, 12)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        return float(scales @ np.square(at - least)), 2 * scales * (at - least)

    assert np.abs(minimise(loss, np.full(12, 3.0), 60) - least).max() < 1e-4
    # Where nothing is to be gained it stays.
    assert (minimise(loss, least, 10) == least).all()
