"""Where on a picture a person says that a defect is: outlines and strokes of a brush, and the masks they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import cv2
import msgspec
import numpy as np
from msgspec import Meta

from edgeflame.images import ImageU8

_At = Annotated[int, Meta(ge=0, le=1 << 20)]
_Points = Annotated[tuple[tuple[_At, _At], ...], Meta(min_length=1, max_length=2000)]


class Polygon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="shape", tag="polygon"):
    """A polygon, filled; a box is one with four corners."""

    points: _Points
    """x and y in pixels of the mark's picture."""


class Brush(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="shape", tag="brush"):
    """A stroke of a brush."""

    points: _Points
    """x and y in pixels of the mark's picture."""
    radius: Annotated[int, Meta(ge=1, le=1000)]


Shape = Polygon | Brush
Shapes = Annotated[tuple[Shape, ...], Meta(max_length=200)]


def paint(shapes: Sequence[Shape], *, height: int, width: int) -> ImageU8:
    """The mask ``[height, width]`` uint8 of some shapes, 255 where they are; what lies outside is cut off."""
    mask = np.zeros((height, width), np.uint8)
    for shape in shapes:
        points = np.asarray(shape.points, np.int32).reshape(-1, 1, 2)
        match shape:
            case Polygon():
                cv2.fillPoly(mask, [points], 255)
            case Brush():
                cv2.polylines(mask, [points], isClosed=False, color=255, thickness=2 * shape.radius)
                for x, y in shape.points:
                    cv2.circle(mask, (x, y), shape.radius, 255, thickness=-1)
    return mask


def outlines(mask: ImageU8) -> tuple[Polygon, ...]:
    """The outlines of a mask ``[height, width]``, at most 200, the largest first; holes are filled."""
    found, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    shapes = []
    for contour in sorted(found, key=cv2.contourArea, reverse=True)[:200]:
        points = contour.reshape(-1, 2)
        step = -(-len(points) // 2000)
        shapes.append(Polygon(points=tuple((int(x), int(y)) for x, y in points[::step])))
    return tuple(shapes)
