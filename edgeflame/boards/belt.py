"""The conveyor belt the boards lie on: dark rubber with a fabric impression, scuffs and dust."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from edgeflame.boards.noise import FieldF32, as_f32, fractal_noise, smoothstep, value_noise
from edgeflame.boards.seeds import generator
from edgeflame.boards.surface import REFERENCE_SIZE

_LENGTHS = 3
"""The stretch of belt kept, in pictures; each photograph shows another part of it."""


def belt_under(size: int, rng: np.random.Generator) -> FieldF32:
    """What lies beneath a board at a random moment: linear reflectance ``[S, S, 3]``, BGR."""
    stretch = _stretch(size)
    start = int(rng.integers(0, stretch.shape[0] - size + 1))
    return stretch[start : start + size]


@lru_cache(maxsize=4)
def _stretch(size: int) -> FieldF32:
    """The belt runs down the picture, so its wear does too."""
    # Every site has the same make of belt; what tells sites apart is their camera.
    rng = generator(0, "belt")
    unit, shape = size / REFERENCE_SIZE, (size * _LENGTHS, size)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    x = np.arange(shape[1], dtype=np.float32)[None, :]
    turn = np.float32(2 * np.pi / (5.0 * unit))
    twill = np.sin(turn * (x + y)) * np.sin(turn * (x - y))
    grain = value_noise(shape, (1.4 * unit, 1.4 * unit), rng)
    wear = fractal_noise(shape, (240 * unit, 30 * unit), rng)
    scuffs = smoothstep(1.7, 2.6, value_noise(shape, (70 * unit, 2.0 * unit), rng))
    dust = smoothstep(2.6, 3.4, value_noise(shape, (2.2 * unit, 2.2 * unit), rng))
    tone = 1.0 + 0.10 * twill + 0.07 * grain + 0.09 * wear + 0.20 * scuffs + 0.9 * dust
    stretch = as_f32(np.array([0.042, 0.043, 0.036], dtype=np.float32) * np.clip(tone, 0.2, 3.0)[..., None])
    stretch.flags.writeable = False
    return stretch
