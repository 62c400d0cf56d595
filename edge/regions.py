"""Where on a part the anomaly lies: regions with their outlines and areas, of the map that is shown. Pure.

The threshold says whether there is a defect, not how far it reaches: a strong one lifts all cells whose surroundings
touch it far above the threshold, a faint one exceeds it with its tip alone. So a region reaches from a peak above the
threshold down to a share of that peak.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from edge.result import AnomalyRegion
from edgeflame.images import Region

PEAK_SHARE = 0.75
"""Share of the peak down to which its region reaches.

Regions overlap the true defects best with it (intersection over union, of those that fail): 0.41 on magnetic tiles with
synthetic defects and 0.47 on generated boards, against 0.34 and 0.40 with 0.65. What lies above the threshold in
smoothed maps overlaps by 0.25 and 0.07."""

REACH = 3
"""How far a peak's share is asked for around it, in cells: as far as the slope of a defect, no farther, so that a faint
defect beside a strong one has a region of its own."""

MAX_REGIONS = 20
"""The most regions in a result, those with the highest peaks: a message stays small."""

_PIXELS_A_CELL = 8
"""Of the raster that outlines are followed on."""

Maps = npt.NDArray[np.float32]


def relative_map(
    shown: npt.NDArray[np.floating], threshold: float, smoothed: npt.NDArray[np.floating] | None = None
) -> Maps:
    """A shown map over the level at which a region begins: above 1 inside regions.

    That level is the threshold, and near peaks above it a share of the highest value nearby. Something is above 1 if
    and only if something is above the threshold.

    Args:
        shown: ``[h, w]`` raw distance, see :func:`edgeflame.statistics.maps.shown_maps`.
        threshold: raw distance.
        smoothed: ``[h, w]``, the map whose maximum is the score. A wide defect beside a sharper one may be above the
            threshold in it alone; it is a region too.
    """
    values = shown.astype(np.float32)
    highest = _highest_nearby(values)
    peaks = highest if smoothed is None else np.maximum(highest, _highest_nearby(_peaks_alone(smoothed)))
    # In float64, as the verdict compares: rounded to float32 the threshold might meet the score.
    is_near_peak = (peaks > np.float64(threshold)) & (highest > 0)
    relative: Maps = values / np.where(is_near_peak, np.float32(PEAK_SHARE) * highest, np.float32(threshold))
    return relative


def region_mask(relative: Maps, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Regions on a raster: 1 inside, 0 elsewhere.

    Args:
        relative: ``[h, w]``, see :func:`relative_map`.
        size: height and width of the raster.

    Returns:
        ``[height, width]`` uint8.
    """
    inside = _resized(relative, size, cv2.INTER_LINEAR) > 1
    # Between pixels' centres a single cell may be missed: then it is drawn whole, for no region may be lost.
    cells = _resized((relative > 1).astype(np.float32), size, cv2.INTER_NEAREST) > 0
    count, labels = cv2.connectedComponents((inside | cells).astype(np.uint8), connectivity=8)
    found = np.bincount(labels[inside], minlength=count) > 0
    mask: npt.NDArray[np.uint8] = (inside | (cells & ~found[labels])).astype(np.uint8)
    return mask


def find_regions(
    shown: npt.NDArray[np.floating],
    threshold: float,
    area: Region,
    smoothed: npt.NDArray[np.floating] | None = None,
) -> tuple[AnomalyRegion, ...]:
    """The regions of a part, the highest peak first; none if nothing is above the threshold.

    Args:
        shown: as in :func:`relative_map`.
        threshold: as there.
        area: what the maps cover, in pixels of the camera's frame.
        smoothed: as there.
    """
    if not (np.isfinite(shown).all() and float(shown.max()) > threshold):
        return ()
    size = (shown.shape[0] * _PIXELS_A_CELL, shown.shape[1] * _PIXELS_A_CELL)
    mask = region_mask(relative_map(shown, threshold, smoothed), size)
    heights = shown if smoothed is None else np.maximum(shown, smoothed)
    values = _resized(heights.astype(np.float32), size, cv2.INTER_NEAREST)
    scale_x, scale_y = area.width / size[1], area.height / size[0]
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    regions = []
    for label in range(1, count):
        own = labels == label
        regions.append(
            AnomalyRegion(
                outline=_outline(own, area, scale_x, scale_y),
                area_px=max(1, round(int(own.sum()) * scale_x * scale_y)),
                peak=float(values[own].max()),
            )
        )
    regions.sort(key=lambda one: -one.peak)
    return tuple(regions[:MAX_REGIONS])


def _outline(
    inside: npt.NDArray[np.bool_], area: Region, scale_x: float, scale_y: float
) -> tuple[tuple[int, int], ...]:
    """Corners of the polygon around a connected region of the raster, in pixels of the frame."""
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = cv2.approxPolyDP(max(contours, key=len), 1.0, closed=True).reshape(-1, 2)
    points = []
    for column, row in corners:
        # The pixel of the frame that lies under the raster pixel's centre.
        x = area.x + min(area.width - 1, int((column + 0.5) * scale_x))
        y = area.y + min(area.height - 1, int((row + 0.5) * scale_y))
        points.append((x, y))
    return tuple(dict.fromkeys(points))


def _highest_nearby(values: Maps) -> Maps:
    near = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * REACH + 1, 2 * REACH + 1))
    return np.asarray(cv2.dilate(values, near), dtype=np.float32)


def _peaks_alone(smoothed: npt.NDArray[np.floating]) -> Maps:
    """A map with 0 where a higher value is nearby: the slopes of a strong defect are no places of their own."""
    values = smoothed.astype(np.float32)
    return np.where(values < _highest_nearby(values), np.float32(0), values)


def _resized(values: Maps, size: tuple[int, int], interpolation: int) -> Maps:
    return np.asarray(cv2.resize(values, size[::-1], interpolation=interpolation), dtype=np.float32)
