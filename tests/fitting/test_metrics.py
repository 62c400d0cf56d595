"""Metrics from counted pixels, against scikit-learn over every pixel and against hand-made cases."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from fitting.metrics import (
    MAX_DISTINCT_SCORES,
    PixelCounts,
    Resamples,
    auroc,
    auroc_of_counts,
    best_f1,
    bin_edges,
    bootstrap_interval,
    distinct_values,
    f1_max,
    f1_of_counts,
    image_counts,
)


def pictures(seed: int, count: int = 12) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Maps with a heavy tail, and masks of one or two squares where they tend to be higher."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 40, 40), dtype=np.uint8)
    maps = rng.gamma(1.0, 3.0, (count, 40, 40)).astype(np.float32)
    for index in range(count):
        for _ in range(1 + index % 2):
            y, x = rng.integers(0, 30, 2)
            masks[index, y : y + 6, x : x + 8] = 255
    maps[masks > 0] += rng.gamma(1.0, 3.0, int((masks > 0).sum())).astype(np.float32)
    return maps, masks


def test_counted_pixels_give_scikit_learns_auroc() -> None:
    maps, masks = pictures(0)
    counts = PixelCounts(bin_edges(maps))
    for one, mask in zip(maps, masks, strict=True):
        counts.add(one, mask)
    assert counts.auroc() == pytest.approx(roc_auc_score((masks > 0).ravel(), maps.ravel()), abs=1e-4)


def test_bins_made_for_the_cells_serve_the_pixels_between_them() -> None:
    cells, _ = pictures(1)
    pixels = (cells[:, :-1] + cells[:, 1:]) / 2
    labels = np.random.default_rng(2).random(pixels.shape) < 0.1 + 0.02 * pixels
    counts = PixelCounts(bin_edges(cells))
    for one, mask in zip(pixels, labels, strict=True):
        counts.add(one, mask.astype(np.uint8))
    assert counts.auroc() == pytest.approx(roc_auc_score(labels.ravel(), pixels.ravel()), abs=1e-4)


def test_good_images_count_as_good_pixels_and_counts_merge() -> None:
    maps, masks = pictures(3)
    edges = bin_edges(maps)
    whole, first, second = PixelCounts(edges), PixelCounts(edges), PixelCounts(edges)
    for index, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        given = None if index < 4 else mask
        whole.add(one, given)
        (first if index % 2 else second).add(one, given)
    first.merge(second)
    assert first.auroc() == pytest.approx(whole.auroc())
    assert first.aupro() == pytest.approx(whole.aupro())
    flat = np.concatenate([np.zeros(4 * 1600), (masks[4:] > 0).ravel()])
    assert whole.auroc() == pytest.approx(roc_auc_score(flat, maps.ravel()), abs=1e-4)


def slow_aupro(maps: npt.NDArray[np.float32], regions: list[npt.NDArray[np.bool_]], max_fpr: float) -> float:
    """Threshold by threshold."""
    defective = np.any(regions, axis=0)
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        overlap = float(np.mean([above[region].mean() for region in regions]))
        points.append((float(above[~defective].mean()), overlap))
    fpr, pro = np.array(points).T
    grid = np.linspace(0, max_fpr, 20001)
    return float(np.interp(grid, fpr, pro).mean())


def test_aupro_weighs_regions_not_pixels() -> None:
    rng = np.random.default_rng(5)
    maps = rng.random((1, 30, 30)).astype(np.float32)
    large, small = np.zeros((1, 30, 30), dtype=bool), np.zeros((1, 30, 30), dtype=bool)
    large[0, 2:20, 2:20] = True
    small[0, 25:27, 25:27] = True
    maps[small] += 0.8
    counts = PixelCounts(bin_edges(maps))
    counts.add(maps[0], ((large | small)[0] * 255).astype(np.uint8))
    assert counts.aupro(0.3) == pytest.approx(slow_aupro(maps, [large, small], 0.3), abs=5e-3)


def test_a_perfect_and_a_useless_map() -> None:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:10] = 255
    perfect = PixelCounts(np.array([0.5], dtype=np.float32))
    perfect.add((mask > 0).astype(np.float32), mask)
    assert perfect.auroc() == 1.0
    assert perfect.aupro() == pytest.approx(1.0)
    flat = PixelCounts(np.array([0.5], dtype=np.float32))
    flat.add(np.zeros((20, 20), dtype=np.float32), mask)
    assert flat.auroc() == 0.5
    assert flat.aupro() == pytest.approx(0.15)  # the diagonal up to 0.3, as a share of 0.3


def test_figures_that_are_not_defined_are_none() -> None:
    scores, none = np.array([1.0, 2.0]), np.array([])
    assert auroc(scores, none) is None
    assert auroc(none, scores) is None
    assert f1_max(scores, none) is None
    counts = PixelCounts(np.array([0.5], dtype=np.float32))
    assert counts.auroc() is None
    counts.add(np.zeros((4, 4), dtype=np.float32), None)
    assert counts.auroc() is None
    assert counts.aupro() is None


def test_image_figures_by_hand() -> None:
    good, defective = np.array([1.0, 2.0, 3.0]), np.array([2.5, 4.0])
    assert auroc(good, defective) == pytest.approx(5 / 6)
    # At threshold 2.5: both defects and one good part, precision 2/3 and recall 1. At 4: 1 and 1/2.
    assert f1_max(good, defective) == pytest.approx(0.8)


def test_the_threshold_of_the_best_f1_gives_it() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 9.0):
        good, defective = rng.normal(10, 1, 50), rng.normal(10 + shift, 1, 30)
        f1, threshold = best_f1(good, defective)
        caught, rejected = (defective > threshold).sum(), (good > threshold).sum()
        assert 2 * caught / (caught + rejected + 30) == pytest.approx(f1)
        assert f1 == f1_max(good, defective)
    # Everything is called defective: the threshold lies below all scores.
    assert best_f1(np.array([3.0]), np.array([2.0, 4.0]))[1] < 2.0


def test_the_best_pixel_f1_is_met_at_its_threshold() -> None:
    maps, masks = pictures(4)
    counts = PixelCounts(bin_edges(maps))
    for one, mask in zip(maps, masks, strict=True):
        counts.add(one, mask)
    best = counts.best_f1()
    assert best is not None
    found, truth = maps > best[1], masks > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) == pytest.approx(best[0], abs=2e-3)


def test_figures_of_counts_are_scikit_learns() -> None:
    """Of each resample by itself, ties included."""
    rng = np.random.default_rng(7)
    scores, is_bad, parts = rng.integers(0, 12, 80).astype(float), rng.random(80) < 0.4, rng.integers(0, 15, 80)
    resamples = Resamples(15, seed=2, num_resamples=30)
    values = distinct_values(scores)
    good, bad = (resamples.counts(image_counts(scores[kind], parts[kind], 15, values)) for kind in (~is_bad, is_bad))
    aurocs, f1s = auroc_of_counts(good, bad), f1_of_counts(good, bad)
    for drawn, one_auroc, one_f1 in zip(resamples.drawn, aurocs, f1s, strict=True):
        again = np.repeat(np.arange(80), drawn[parts].astype(int))
        mine, kinds = scores[again], is_bad[again]
        assert one_auroc == pytest.approx(auroc(mine[~kinds], mine[kinds]))
        assert one_f1 == pytest.approx(f1_max(mine[~kinds], mine[kinds]))
    nothing = np.zeros((1, 4))
    assert np.isnan(auroc_of_counts(nothing, nothing + 1)).all()
    assert np.isnan(f1_of_counts(nothing, nothing + 1)).all()
    assert bootstrap_interval(np.array([np.nan, np.nan, 0.5])) is None


def test_many_distinct_scores_are_binned_and_hardly_matter() -> None:
    rng = np.random.default_rng(9)
    scores, is_bad = rng.normal(size=9000), rng.random(9000) < 0.5
    scores[is_bad] += 1
    values = distinct_values(scores)
    assert len(values) == MAX_DISTINCT_SCORES
    parts = np.zeros(9000, dtype=np.intp)
    good, bad = (image_counts(scores[kind], parts[kind], 1, values) for kind in (~is_bad, is_bad))
    assert auroc_of_counts(good, bad)[0] == pytest.approx(auroc(scores[~is_bad], scores[is_bad]), abs=1e-4)
