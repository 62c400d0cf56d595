"""The map that is shown: sharp, and on the scale of the score."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflame.statistics.gaussian import smooth_maps
from edgeflame.statistics.maps import LEVEL, shown_maps

Maps = npt.NDArray[np.float32]
DISTANCES = arrays.arrays(np.float32, (3, 5, 4), elements=st.just(0.0) | st.floats(0.125, 1000, width=32))


@given(DISTANCES)
def test_its_maximum_is_the_score_to_the_last_bit(unsmoothed: Maps) -> None:
    scores = smooth_maps(unsmoothed, 2.0).max(axis=(1, 2))
    shown = shown_maps(unsmoothed, scores)
    np.testing.assert_array_equal(shown.max(axis=(1, 2)), np.where(unsmoothed.max(axis=(1, 2)) > 0, scores, 0))
    assert (shown >= 0).all()


def test_it_is_what_lies_above_the_pictures_level() -> None:
    unsmoothed = np.array([[[1.0, 1.0], [1.0, 5.0]]], np.float32)
    level = LEVEL * 2.0
    expected = np.maximum((unsmoothed - level) / (5.0 - level), 0) * 3.0
    np.testing.assert_allclose(shown_maps(unsmoothed, np.array([3.0], np.float32)), expected, rtol=1e-6)


def test_a_small_defect_stays_small() -> None:
    rng = np.random.default_rng(0)
    unsmoothed = rng.uniform(9, 11, (1, 32, 32)).astype(np.float32)
    unsmoothed[0, 10:12, 20] = 40.0
    smoothed = smooth_maps(unsmoothed, 2.0)
    score = smoothed.max(axis=(1, 2))
    half = (unsmoothed.mean() + score) / 2
    assert (smoothed > half).sum() > 15
    assert (shown_maps(unsmoothed, score) > score / 2).sum() == 2


def test_cells_that_do_not_count_are_nought_and_change_nothing_else() -> None:
    unsmoothed = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    judged = np.ones((3, 4), bool)
    judged[:, 3] = False
    score = np.array([2.0], np.float32)
    shown = shown_maps(unsmoothed, score, judged)
    assert (shown[:, :, 3] == 0).all()
    np.testing.assert_array_equal(shown[:, :, :3], shown_maps(unsmoothed[:, :, :3], score))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_shows_nothing_of_its_own_map(value: float) -> None:
    unsmoothed = np.ones((2, 3, 3), np.float32)
    unsmoothed[0, 1, 1] = value
    shown = shown_maps(unsmoothed, np.array([value, 1.0], np.float32))
    assert np.isnan(shown[0]).all()
    assert np.isfinite(shown[1]).all()
