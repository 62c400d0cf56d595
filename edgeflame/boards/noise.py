"""Smooth random fields, the raw material of textures, fractures and stains.

All fields are float32 ``[height, width]``. Lengths are in pixels unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

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
