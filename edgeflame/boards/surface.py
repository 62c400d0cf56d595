"""A board's surface as the light meets it: reflectance, relief and outline, before any camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeflame.boards.noise import FieldF32, as_f32

BOARD_SHARE = 0.88
"""Side of the board over side of the picture: all four edges stay in view, belt around them."""

REFERENCE_SIZE = 256
"""Picture side at which one unit of length is one pixel; textures and defects are designed in these units."""

EDGE_ROUNDING_UNITS = 2.2
"""Width of the rounded laminate edge; the light picks it out as a bright or dark line."""

EDGE_DROP_UNITS = 1.3
"""How far the surface falls across the rounded edge."""

SKIRT_UNITS = 1.25
"""How far past the outline a defect of the edge changes the picture: the lens spreads the bright board that much
onto the dark belt, and where the board is gone, so is that light."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Surface:
    """The board on its canvas, a square as large as the picture, upright and centred.

    Attributes:
        albedo: ``[S, S, 3]`` share of light reflected in ``[0, 1]``, linear, BGR. Defined beyond the board's
            outline too, so that interpolation there brings in no foreign colour.
        height: ``[S, S]`` relief in pixels, positive towards the camera, 0 on the flat board.
        coverage: ``[S, S]`` share of the pixel covered by the board, 0 on the belt.
    """

    albedo: FieldF32
    height: FieldF32
    coverage: FieldF32

    @property
    def size(self) -> int:
        """Side of the canvas in pixels."""
        return int(self.height.shape[0])

    @property
    def unit(self) -> float:
        """Pixels to one unit of length."""
        return self.size / REFERENCE_SIZE


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Where an upright board of a canvas of ``size`` pixels begins and ends."""

    size: int

    @property
    def unit(self) -> float:
        """Pixels to one unit of length."""
        return self.size / REFERENCE_SIZE

    @property
    def low(self) -> float:
        """Coordinate of the left and of the upper edge, in pixels."""
        return self.size * (1 - BOARD_SHARE) / 2

    @property
    def high(self) -> float:
        """Coordinate of the right and of the lower edge, in pixels."""
        return self.size - self.low

    def inward(self, side: str) -> FieldF32:
        """Distance inwards from one edge, ``[S, S]`` in pixels, negative on the belt.

        Args:
            side: ``left``, ``right``, ``top`` or ``bottom``.
        """
        centres = np.arange(self.size, dtype=np.float32) + np.float32(0.5)
        line = centres - np.float32(self.low) if side in ("left", "top") else np.float32(self.high) - centres
        plane = line[None, :] if side in ("left", "right") else line[:, None]
        return np.broadcast_to(plane, (self.size, self.size))

    def along(self, side: str) -> FieldF32:
        """Distance along that edge from its left or upper end, ``[S, S]`` in pixels."""
        return self.inward("top" if side in ("left", "right") else "left")

    def inward_any(self) -> FieldF32:
        """Distance inwards from the nearest edge, ``[S, S]`` in pixels, negative on the belt."""
        line = np.minimum(self.inward("left")[0], self.inward("right")[0])
        return as_f32(np.minimum(line[None, :], line[:, None]))

    def touched(self) -> FieldF32:
        """Share of each pixel on the board or within its skirt, ``[S, S]``."""
        return edge_coverage(as_f32(self.inward_any() + np.float32(SKIRT_UNITS * self.unit)))


def edge_relief(inward: FieldF32, unit: float) -> FieldF32:
    """Height of the rounded edge, 0 inside and falling towards the outline, in pixels.

    Args:
        inward: distance inwards from the outline in pixels.
        unit: pixels to one unit of length.
    """
    past = np.clip(1.0 - inward / np.float32(EDGE_ROUNDING_UNITS * unit), 0.0, 1.0)
    return as_f32(np.float32(-EDGE_DROP_UNITS * unit) * past * past)


def edge_coverage(inward: FieldF32) -> FieldF32:
    """Share of each pixel inside an outline, from the distance inwards in pixels."""
    return as_f32(np.clip(inward + np.float32(0.5), 0.0, 1.0))
