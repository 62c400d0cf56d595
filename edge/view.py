"""The region of interest: the crop of the camera's frame that the model gets, and the areas of it that are ignored.

Shapes are given in pixels of the camera's frame. The model scores the cells of a grid over its crop; a cell is left
out only if it is covered wholly, so that nothing beside a shape is overlooked. The score of a part is the maximum of
its map over the other cells.

The map has been smoothed before that (standard deviation two cells, unless the package says otherwise), so a defect in
an ignored area raises scores around it, and a shape must be drawn larger than what it hides. That errs towards a
reject.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edge.config.inspection import RoiConfig, Shape, is_rectangle, shape_words
from edgeflame.errors import ConfigError, DataError
from edgeflame.images import ImageU8, Preprocessing, Region, read_mask

COVERED = 0.999
"""Share of a cell's area that shapes must cover for it to be ignored: all of it, but for rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedView:
    """A view fitted to frames of one size."""

    ignored: ImageU8 | None
    """``[height, width]`` of the crop, 255 where it is ignored; None if nothing is."""
    judged: npt.NDArray[np.bool_] | None
    """``[h, w]`` of the grid, true for cells that count; None if all do."""

    def mask(self, anomaly_map: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A map ``[h, w]`` with 0 in cells that do not count; the map itself if all do."""
        return anomaly_map if self.judged is None else np.where(self.judged, anomaly_map, np.float32(0))


class View:
    """A configured view for one package.

    Args:
        config: section ``[roi]``.
        preprocessing: the package's.
        grid: height and width of the package's maps, in cells.

    Raises:
        ConfigError: ``ignore_image`` cannot be read, or nothing is left to inspect in frames of the size given.
    """

    def __init__(self, config: RoiConfig, preprocessing: Preprocessing, grid: tuple[int, int]) -> None:
        self._config = config
        self._grid = grid
        if config.crop is not None:
            x, y, width, height = config.crop
            preprocessing = msgspec.structs.replace(preprocessing, roi=Region(x=x, y=y, width=width, height=height))
        self.preprocessing = preprocessing
        """The package's, with the configured crop."""
        self._picture = None if config.ignore_image is None else _read_picture(config.ignore_image)
        self._fitted: dict[tuple[int, int], FittedView] = {}
        size = config.frame
        if self._picture is not None:
            size = (self._picture.shape[1], self._picture.shape[0])
            if config.frame not in (None, size):
                raise ConfigError(
                    f"{config.ignore_image} has {size[0]}x{size[1]} pixels, roi.frame says {list(config.frame or ())}"
                )
        if size is not None:
            try:
                self.fit(height=size[1], width=size[0])
            except DataError as exc:
                raise ConfigError(str(exc)) from exc

    def area(self, *, height: int, width: int) -> Region:
        """What the map covers of a frame of this size, in its pixels."""
        return self.preprocessing.roi or Region(x=0, y=0, width=width, height=height)

    def fit(self, *, height: int, width: int) -> FittedView:
        """The view on frames of one size; kept for the next frame.

        Raises:
            DataError: a shape does not fit into such a frame, or nothing is left to inspect.
        """
        fitted = self._fitted.get((height, width))
        if fitted is None:
            fitted = self._fit(height, width)
            # A camera that changes its size all the time must not fill the memory.
            self._fitted = {(height, width): fitted}
        return fitted

    def _fit(self, height: int, width: int) -> FittedView:
        config = self._config
        if not (config.roi or config.ignore or self._picture is not None):
            return FittedView(ignored=None, judged=None)
        frame = np.zeros((height, width), np.uint8)
        if self._picture is not None:
            if self._picture.shape != frame.shape:
                have = f"{self._picture.shape[1]}x{self._picture.shape[0]}"
                raise DataError(f"{config.ignore_image} has {have} pixels, the frame {width}x{height}")
            frame = self._picture.copy()
        for shape in config.ignore:
            _paint(frame, "ignore", shape)
        if config.roi is not None:
            outside = np.zeros_like(frame)
            _paint(outside, "roi", config.roi)
            frame[outside == 0] = 255
        ignored = self.preprocessing.crop(frame)
        # INTER_AREA averages: the share of each cell that is covered.
        covered = cv2.resize((ignored > 0).astype(np.float32), self._grid[::-1], interpolation=cv2.INTER_AREA)
        judged = np.asarray(covered < COVERED)
        if not judged.any():
            raise DataError(f"view: roi and ignore leave nothing to judge of the {width}x{height} frame")
        return FittedView(ignored=ignored, judged=judged)


def _paint(frame: ImageU8, name: str, shape: Shape) -> None:
    height, width = frame.shape
    if is_rectangle(shape):
        x, y, shape_width, shape_height = shape
        right, bottom = x + shape_width - 1, y + shape_height - 1
        points = np.array([(x, y), (right, y), (right, bottom), (x, bottom)])
    else:
        points = np.asarray(shape, np.int32)
    if (points.max(axis=0) >= (width, height)).any():
        raise DataError(f"roi.{name} {shape_words(shape)} reaches outside the {width}x{height} frame")
    cv2.fillPoly(frame, [points.astype(np.int32)], 255)


def _read_picture(path: str) -> ImageU8:
    try:
        # A person chose it; it is as large as the camera is.
        return read_mask(Path(path), max_pixels=1 << 30)
    except DataError as exc:
        raise ConfigError(f"roi.ignore_image: {exc}") from exc
