"""Metrics from counted pixels, against scikit-learn over every pixel and against hand-made cases."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from trainer.metrics import PixelCounts, auroc, bin_edges, bootstrap_auroc, f1_max


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


def test_the_bootstrap_resamples_parts() -> None:
    rng = np.random.default_rng(0)
    good = [rng.normal(0, 1, 5) for _ in range(40)]
    defective = [rng.normal(1, 1, 5) for _ in range(40)]
    interval = bootstrap_auroc(good, defective, num_resamples=200, seed=1)
    assert interval is not None
    value = auroc(np.concatenate(good), np.concatenate(defective))
    assert value is not None
    assert interval[0] < value < interval[1]
    # Photographs that only repeat each other must not narrow it.
    copies = bootstrap_auroc(
        [np.repeat(one[:1], 5) for one in good],
        [np.repeat(one[:1], 5) for one in defective],
        num_resamples=200,
        seed=1,
    )
    assert copies is not None
    assert copies[1] - copies[0] > 1.3 * (interval[1] - interval[0])
