"""Draws the picture of a verdict: the image, the anomaly map as heat, the outline at the threshold, and the score."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from edge.regions import region_mask, relative_map
from edgeflame.images import ImageU8

MIN_SIDE = 384
"""Images with a side shorter than this (pixels) are enlarged, so that the score can be read."""

HEAT_FROM, HEAT_FULL = 0.7, 1.4
"""Anomaly over the level of a region at which the heat begins to show and at which it is full."""

MOST_HEAT = 0.62
"""Opacity of full heat; the defect must stay visible beneath it."""

LIGHT_LEFT = 0.35
"""Share of the brightness left in ignored areas: they stay recognisable, and are seen not to count."""

_OUTLINE = (255, 255, 255)
_TRUTH = (255, 214, 64)
_FAIL, _PASS, _NEUTRAL = (64, 64, 232), (96, 176, 48), (128, 128, 128)


def draw_overlay(
    image_bgr: ImageU8,
    anomaly_map: npt.NDArray[np.floating],
    threshold: float,
    mask: ImageU8 | None = None,
    *,
    shown: npt.NDArray[np.floating] | None = None,
    ignored: ImageU8 | None = None,
    label: bool = True,
) -> ImageU8:
    """Draw an anomaly map over its image.

    The white line goes around the regions (:mod:`edge.regions`), the blue one around the mask. Heat begins to show at
    ``HEAT_FROM`` of the level at which a region begins, and is full at ``HEAT_FULL``. A map with NaN or infinite values
    is not drawn, and the label says "unknown".

    Args:
        image_bgr: ``[height, width, 3]`` uint8, the area the model saw.
        anomaly_map: ``[h, w]`` raw distance over the same area, its maximum the score.
        threshold: raw distance.
        mask: ``[height, width]`` uint8, above 0 on the true defect, or None.
        shown: ``[h, w]``, the sharper map to draw in its place, :func:`edgeflame.statistics.maps.shown_maps`, or None.
        ignored: ``[rows, columns]`` uint8 over the same area, above 0 where it is ignored and drawn dimmed.
        label: whether the score is written on the picture.

    Returns:
        BGR uint8 of the image's shape, enlarged by a whole factor where a side is below ``MIN_SIDE``.
    """
    scale = max(1, math.ceil(MIN_SIDE / min(image_bgr.shape[:2])))
    size = (image_bgr.shape[1] * scale, image_bgr.shape[0] * scale)
    canvas = np.asarray(cv2.resize(image_bgr, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    finite = bool(np.isfinite(anomaly_map).all()) and math.isfinite(threshold) and threshold > 0
    ratio = float(anomaly_map.max() / threshold) if finite else math.nan
    line_width = max(1, round(max(size) / 320))
    if finite:
        relative = relative_map(anomaly_map if shown is None else shown, threshold, anomaly_map)
        # Beside a cell that is left out, a cubic's ringing would draw heat that is not there.
        smooth = cv2.INTER_CUBIC if ignored is None else cv2.INTER_LINEAR
        heat = cv2.resize(relative, size, interpolation=smooth)
        canvas = _blend_heat(canvas, np.asarray(heat, dtype=np.float32))
        _outline(canvas, region_mask(relative, size[::-1]) > 0, _OUTLINE, line_width)
    if ignored is not None:
        _dim(canvas, cv2.resize(ignored, size, interpolation=cv2.INTER_NEAREST) > 0)
    if mask is not None:
        _outline(canvas, cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) > 0, _TRUTH, line_width)
    return _label(canvas, ratio) if label else canvas


def _blend_heat(canvas: ImageU8, relative: npt.NDArray[np.float32]) -> ImageU8:
    strength = np.clip((relative - HEAT_FROM) / (HEAT_FULL - HEAT_FROM), 0.0, 1.0)
    # From magenta to yellow: the map's blue beginning would read as a shadow.
    colours = cv2.applyColorMap((255 * (0.4 + 0.52 * strength)).astype(np.uint8), cv2.COLORMAP_PLASMA)
    # Smoothstep: heat fades in without an edge of its own.
    opacity = (MOST_HEAT * strength * strength * (3.0 - 2.0 * strength))[..., None]
    return np.asarray(canvas * (1.0 - opacity) + colours * opacity, dtype=np.uint8)


def _dim(canvas: ImageU8, region: npt.NDArray[np.bool_]) -> None:
    canvas[region] = (canvas[region] * LIGHT_LEFT).astype(np.uint8)


def _outline(canvas: ImageU8, region: npt.NDArray[np.bool_], colour: tuple[int, int, int], width: int) -> None:
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    # A dark line beneath keeps the bright one visible on a bright board.
    cv2.drawContours(canvas, contours, -1, (0, 0, 0), width + 2, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, colour, width, cv2.LINE_AA)


def _label(canvas: ImageU8, ratio: float) -> ImageU8:
    if math.isnan(ratio):
        text, colour = "unknown", _NEUTRAL
    else:
        text, colour = f"{ratio:.2f} x threshold", _FAIL if ratio > 1.0 else _PASS
    unit = min(canvas.shape[:2]) / 384
    font, size, weight = cv2.FONT_HERSHEY_SIMPLEX, 0.5 * unit, max(1, round(unit))
    (width, height), _ = cv2.getTextSize(text, font, size, weight)
    pad, left, top = round(7 * unit), round(8 * unit), round(8 * unit)
    box = canvas[top : top + height + 2 * pad, left : left + width + 3 * pad]
    box[:] = (0.28 * box + 0.72 * np.array((24, 24, 24))).astype(np.uint8)
    cv2.rectangle(canvas, (left, top), (left + round(4 * unit), top + height + 2 * pad - 1), colour, cv2.FILLED)
    cv2.putText(canvas, text, (left + 2 * pad, top + pad + height), font, size, (245, 245, 245), weight, cv2.LINE_AA)
    return canvas
