"""Photographs for a page: with their heat maps, and with their masks beside the true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.images import read_image, read_mask, shrink

if TYPE_CHECKING:
    from edgeflame.dataset import ImageRecord
    from edgeflame.images import ImageU8, Preprocessing

MAX_SIDE = 512
"""Larger pictures are shrink: a page holds dozens of them."""

HIT, MISSED, FALSE = (96, 190, 64), (72, 72, 240), (32, 170, 245)
"""BGR of pixels found, missed and found where nothing is. They differ in lightness too."""

_TRUTH = (255, 214, 64)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A photograph on a page.

    Attributes:
        name: its file, below the data set's root.
        label: ``good`` or the defect's name.
        ratio: score over threshold.
        picture: what is shown first.
        heat_map: the same with the anomaly map over it.
        mask: hits, misses and false alarms in colour at a pixel threshold; None without a true mask.
    """

    name: str
    label: str
    ratio: float
    picture: ImageU8
    heat_map: ImageU8
    mask: ImageU8 | None = None


def example(
    record: ImageRecord,
    anomaly_map: npt.NDArray[np.floating],
    preprocessing: Preprocessing,
    *,
    threshold: float,
    pixel_threshold: float | None = None,
) -> Example:
    """Draw one photograph.

    Args:
        record: its file is read again.
        anomaly_map: ``[h, w]`` raw.
        preprocessing: the model's; the picture shows the region that the model saw.
        threshold: of the verdict.
        pixel_threshold: of the mask; None for no mask.

    Raises:
        DataError: the file cannot be read any more.
    """
    from edge.overlay import draw_overlay

    photograph = shrink(preprocessing.crop(read_image(record.path)), MAX_SIDE)
    truth = None
    if record.mask is not None:
        whole = preprocessing.crop(read_mask(record.mask))
        size = (photograph.shape[1], photograph.shape[0])
        # A thin crack must survive the shrinking: any pixel of it counts.
        small = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
        truth = np.where(np.asarray(small) > 0, 255, 0).astype(np.uint8)
    picture = photograph.copy()
    if truth is not None:
        contours, _ = cv2.findContours(truth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, _TRUTH, max(1, max(picture.shape[:2]) // 240), cv2.LINE_AA)
    return Example(
        name=record.name,
        label=record.label,
        ratio=float(anomaly_map.max()) / threshold,
        picture=picture,
        heat_map=shrink(draw_overlay(photograph, anomaly_map, threshold, truth, label=False), MAX_SIDE),
        mask=None
        if truth is None or pixel_threshold is None
        else _mask_picture(photograph, truth > 0, anomaly_map, pixel_threshold),
    )


def _mask_picture(
    photograph: ImageU8,
    truth: npt.NDArray[np.bool_],
    anomaly_map: npt.NDArray[np.floating],
    pixel_threshold: float,
) -> ImageU8:
    size = (photograph.shape[1], photograph.shape[0])
    found = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > pixel_threshold
    canvas = (0.35 * photograph + 40).astype(np.uint8)
    for region, colour in ((found & truth, HIT), (truth & ~found, MISSED), (found & ~truth, FALSE)):
        canvas[region] = (0.2 * canvas[region] + 0.8 * np.array(colour)).astype(np.uint8)
    return canvas
