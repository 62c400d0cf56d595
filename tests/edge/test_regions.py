"""Regions: where the anomaly lies, in pixels of the camera's frame."""

from __future__ import annotations

import cv2
import hypothesis.extra.numpy as arrays
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.regions import MAX_REGIONS, find_regions, region_mask, relative_map
from edge.result import AnomalyRegion, Result
from edgeflame.images import Region
from edgeflame.package import Package
from edgeflame.statistics.gaussian import smooth_maps
from edgeflame.statistics.maps import shown_maps
from tests.edge.test_view import inspect
from tests.support.inspection_results import body
from tests.support.small_package import GRID, SIZE, good_image

Maps = npt.NDArray[np.float32]
AREA = Region(x=100, y=50, width=320, height=160)
MAPS = arrays.arrays(np.float32, (6, 9), elements=st.floats(0, 8, width=32))


def filled(region: AnomalyRegion, height: int = 300, width: int = 500) -> npt.NDArray[np.uint8]:
    """The polygon, drawn by OpenCV."""
    canvas = np.zeros((height, width), np.uint8)
    return np.asarray(cv2.fillPoly(canvas, [np.array(region.outline, np.int32)], 1), dtype=np.uint8)


def blobs(*places: tuple[int, int, float]) -> Maps:
    shown = np.full((16, 32), 0.2, np.float32)
    for row, column, peak in places:
        shown[row : row + 2, column : column + 3] = peak
    return shown


@given(MAPS, st.floats(0.5, 8))
def test_there_is_a_region_if_and_only_if_something_is_above_the_threshold(shown: Maps, threshold: float) -> None:
    regions = find_regions(shown, threshold, AREA)
    assert bool(regions) == (float(shown.max()) > threshold)
    assert bool(region_mask(relative_map(shown, threshold), (48, 72)).any()) == bool(regions)
    if regions:
        assert regions[0].peak == float(shown.max())
        assert [one.peak for one in regions] == sorted((one.peak for one in regions), reverse=True)
    for one in regions:
        assert one.area_px >= 1
        assert all(100 <= x < 420 and 50 <= y < 210 for x, y in one.outline)


def test_a_threshold_next_to_the_score_is_compared_in_float64() -> None:
    shown = np.full((4, 4), 2.0, np.float32)
    assert find_regions(shown, np.nextafter(2.0, 0.0), AREA)
    assert not find_regions(shown, 2.0, AREA)


def test_outline_and_area_are_those_of_the_defect_in_the_frame() -> None:
    """A cell is 10 x 10 pixels of the frame here; the blobs are 30 x 20 of them."""
    strong, faint = find_regions(blobs((2, 4, 1.2), (10, 20, 9.0)), 1.0, AREA)
    assert (strong.peak, faint.peak) == (9.0, pytest.approx(1.2))
    for region, (x, y) in ((strong, (300, 150)), (faint, (140, 70))):
        canvas = filled(region)
        wanted = np.zeros_like(canvas)
        wanted[y : y + 20, x : x + 30] = 1
        overlap = (canvas & wanted).sum() / (canvas | wanted).sum()
        assert overlap > 0.4  # edges are as sharp as cells are small
        assert np.abs(np.mean(np.argwhere(canvas), axis=0) - (y + 9.5, x + 14.5)).max() < 3
        assert region.area_px == pytest.approx(float(canvas.sum()), rel=0.25)


def test_the_halo_of_a_strong_defect_is_not_part_of_it() -> None:
    distance = np.hypot(*np.mgrid[-8:8, -16:16]).astype(np.float32)
    shown = 10 * np.exp(-distance / 3).astype(np.float32)
    (region,) = find_regions(shown, 1.0, AREA)
    assert region.area_px < 0.2 * (shown > 1).mean() * AREA.width * AREA.height


def test_a_faint_defect_is_more_than_its_tip() -> None:
    row = np.array([0.2, 0.8, 0.9, 1.01, 0.9, 0.8, 0.2], np.float32)
    shown = np.pad(row[None], ((3, 3), (3, 3)), constant_values=0.2)
    (region,) = find_regions(shown, 1.0, Region(x=0, y=0, width=shown.shape[1] * 10, height=70))
    xs = [x for x, _ in region.outline]
    assert max(xs) - min(xs) > 30


def test_a_wide_defect_beside_a_sharp_one_is_told_as_well() -> None:
    """Brought to the scale of the sharp one's score it is below the threshold; smoothed it is above it."""
    unsmoothed = np.full((1, 16, 32), 1.0, np.float32)
    unsmoothed[0, 8, 4] = 60.0
    unsmoothed[0, 4:12, 20:28] = 3.0
    smoothed = smooth_maps(unsmoothed, 2.0)
    shown = shown_maps(unsmoothed, smoothed.max(axis=(1, 2)))[0]
    assert shown[:, 16:].max() < 2.5 < smoothed[0, :, 16:].max()
    sharp, wide = find_regions(shown, 2.5, AREA, smoothed[0])
    assert all(120 <= x <= 170 and 110 <= y <= 160 for x, y in sharp.outline)
    assert wide.peak > 2.5
    assert all(290 <= x <= 390 and 80 <= y <= 180 for x, y in wide.outline)


def test_one_cell_between_pixels_is_not_lost() -> None:
    shown = np.zeros((64, 64), np.float32)
    shown[20, 30] = 1.0001
    assert region_mask(relative_map(shown, 1.0), (32, 32)).any()
    assert len(find_regions(shown, 1.0, Region(x=0, y=0, width=32, height=32))) == 1


def test_a_ring_has_the_area_of_a_ring() -> None:
    shown = np.zeros((16, 16), np.float32)
    shown[4:12, 4:12] = 2.0
    shown[6:10, 6:10] = 0.0
    (region,) = find_regions(shown, 1.0, Region(x=0, y=0, width=160, height=160))
    assert 0.6 < region.area_px / (80 * 80 - 40 * 40) < 1.4
    assert filled(region, 160, 160).sum() > 1.2 * region.area_px


def test_a_message_stays_small_and_keeps_the_highest() -> None:
    shown = np.zeros((64, 64), np.float32)
    shown[1::8, 1::8] = np.arange(2, 66, dtype=np.float32).reshape(8, 8)
    found = find_regions(shown, 1.0, Region(x=0, y=0, width=640, height=640))
    assert [one.peak for one in found] == [float(value) for value in range(65, 65 - MAX_REGIONS, -1)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_has_none(value: float) -> None:
    assert find_regions(np.full((4, 4), value, np.float32), 1.0, AREA) == ()


def test_results_of_older_versions_read() -> None:
    older = msgspec.json.decode(body(1))
    del older["regions"]
    assert msgspec.convert(older, Result, strict=False).regions == ()


def spotted(seed: int, *, at: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A good picture with a spot of 8 x 8 pixels at x, y."""
    image = good_image(seed)
    image[at[1] : at[1] + 8, at[0] : at[0] + 8] = 255 - image[at[1] : at[1] + 8, at[0] : at[0] + 8]
    return image


def test_the_inspection_tells_where_the_spot_is_in_the_frame(package: Package) -> None:
    passed = inspect(package, good_image(1)).result
    assert (passed.verdict, passed.regions) == ("pass", ())
    frame = np.full((SIZE + 40, SIZE + 100, 3), 90, np.uint8)
    frame[30 : 30 + SIZE, 90 : 90 + SIZE] = spotted(1, at=(40, 16))
    found = inspect(package, frame, crop=(90, 30, SIZE, SIZE))
    result = found.result
    assert result.verdict == "fail"
    assert result.regions[0].peak == pytest.approx(result.score)
    centre = np.mean(result.regions[0].outline, axis=0)
    assert np.abs(centre - (90 + 44, 30 + 20)).max() < SIZE / GRID
    assert found.shown_map is not None
    assert found.shown_map.max() == found.anomaly_map.max()  # type: ignore[union-attr]


def test_regions_do_not_lie_in_ignored_areas(package: Package) -> None:
    image = spotted(1, at=(40, 16))
    image[40:48, 8:16] = 255 - image[40:48, 8:16]
    both = inspect(package, image).result
    one = inspect(package, image, ignore=((32, 8, 24, 24),)).result
    assert len(both.regions) == 2
    assert one.verdict == "fail"
    for region in one.regions:
        assert not any(32 <= x < 56 and 8 <= y < 32 for x, y in region.outline)
