"""The ground of generated boards: random streams, smooth random fields, and the surface as the light meets it.

Every random thing is named by a path of words and numbers, ``(7, "dataset", "train", 12)``, and its stream is drawn
from a hash of that path. So adding a part or a photograph changes no other one, and the parts of a data set and
those of a camera stream never share a seed, whatever seed the user gives.

Fields are the raw material of textures, fractures and stains: float32 ``[height, width]``. Lengths are in pixels
unless a name says otherwise.

A surface is a board's reflectance, relief and outline, before any camera.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed in ``[0, 2**64)`` that belongs to ``path`` below ``seed``."""
    # repr keeps "1" and 1 apart, and a tuple's repr keeps ("ab", "c") and ("a", "bc") apart.
    return int.from_bytes(hashlib.sha256(repr((int(seed), *path)).encode()).digest()[:8], "big")


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """The random stream that belongs to ``path`` below ``seed``."""
    # PCG64 by name: numpy may change what default_rng stands for.
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *path)))


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse a value that is not in ``[low, high]``, NaN too.

    Raises:
        ValueError: it is not.
    """
    if not low <= value <= high:
        must = f"is at least {low}" if high == math.inf else f"lies between {low} and {high}"
        raise ValueError(f"{name} {must}, got {value}")


FieldF32 = npt.NDArray[np.float32]
"""A float32 image plane ``[height, width]``, or planes ``[height, width, channels]``."""


def as_f32(values: Any) -> FieldF32:
    """``values`` as float32, copied only if they are of another type. OpenCV's own annotations say less."""
    return np.asarray(values, dtype=np.float32)


def value_noise(shape: tuple[int, int], cell: tuple[float, float], rng: np.random.Generator) -> FieldF32:
    """Noise of about zero mean and unit variance at the nodes of a lattice, bicubic between them.

    Args:
        shape: height and width.
        cell: the lattice's pitch down and across, at least 1; unequal pitches give streaks.
        rng: source of the values and of where the lattice lies.
    """
    height, width = shape
    pitch_y, pitch_x = max(cell[0], 1.0), max(cell[1], 1.0)
    rows, columns = int(np.ceil(height / pitch_y)) + 4, int(np.ceil(width / pitch_x)) + 4
    lattice = rng.standard_normal((rows, columns), dtype=np.float32)
    offset_y, offset_x = rng.uniform(1.0, 2.0, size=2)
    to_lattice = np.array([[1 / pitch_x, 0, offset_x], [0, 1 / pitch_y, offset_y]], dtype=np.float32)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return as_f32(cv2.warpAffine(lattice, to_lattice, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))


def fractal_noise(
    shape: tuple[int, int],
    cell: tuple[float, float],
    rng: np.random.Generator,
    *,
    octaves: int = 3,
    gain: float = 0.5,
) -> FieldF32:
    """Octaves of :func:`value_noise`, each at half the pitch and ``gain`` times the height of the one before.

    Returns:
        Noise of about zero mean and unit variance.
    """
    total = np.zeros(shape, dtype=np.float32)
    weight, power = 1.0, 0.0
    for octave in range(octaves):
        scale = 0.5**octave
        total += np.float32(weight) * value_noise(shape, (cell[0] * scale, cell[1] * scale), rng)
        power += weight**2
        weight *= gain
    total /= np.float32(np.sqrt(power))
    return total


def value_noise_1d(length: int, pitches: Sequence[float], rng: np.random.Generator) -> FieldF32:
    """A sum of noises along a line, one for each pitch, with the pitch as its weight; unit height in all.

    Returns:
        float32 ``[length]``; long pitches make its bends, short ones its jags.
    """
    total = np.zeros(length, dtype=np.float32)
    for pitch in pitches:
        total += np.float32(pitch) * value_noise((1, length), (1.0, pitch), rng)[0]
    return as_f32(total / np.float32(sum(pitches)))


def smoothstep(low: float, high: float, values: FieldF32) -> FieldF32:
    """0 below ``low``, 1 above ``high``, a cubic without corners between; ``low`` > ``high`` turns it round."""
    t = np.clip((values - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return as_f32(t * t * (3.0 - 2.0 * t))


def mix(first: FieldF32, second: FieldF32, share: FieldF32) -> FieldF32:
    """``first`` where ``share`` is 0, ``second`` where it is 1.

    Args:
        first: planes ``[H, W, C]`` or one colour ``[C]``.
        second: likewise.
        share: ``[H, W]`` in ``[0, 1]``.
    """
    return as_f32(first + (second - first) * share[..., None])


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
    def shape(self) -> tuple[int, int]:
        """Height and width of the canvas in pixels."""
        return self.size, self.size

    @property
    def outline(self) -> Outline:
        """Where a board on this canvas begins and ends."""
        return Outline(size=self.size)

    @property
    def unit(self) -> float:
        """Pixels to one unit of length."""
        return self.outline.unit


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
