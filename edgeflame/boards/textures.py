"""The five laminates of the FLAME furniture boards, made from noise.

A texture is a recipe; each random stream cooks another piece of it. Lengths are in units of 1/256 of the
picture's side, so a board looks the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from edgeflame.boards.noise import FieldF32, as_f32, fractal_noise, mix, smoothstep, value_noise
from edgeflame.boards.surface import REFERENCE_SIZE
from edgeflame.boards.wood import Wood, render_wood

DISPLAY_GAMMA = 2.2
"""Colours in recipes are written as a screen shows them; light is computed in linear reflectance."""

Recipe = Callable[[int, np.random.Generator], tuple[FieldF32, FieldF32]]


def render_texture(name: str, size: int, rng: np.random.Generator) -> tuple[FieldF32, FieldF32]:
    """One piece of a laminate.

    Args:
        name: one of ``TEXTURES``.
        size: side of the canvas in pixels.
        rng: decides which piece.

    Returns:
        Reflectance ``[S, S, 3]``, linear BGR in ``[0, 1]``, and relief ``[S, S]`` in pixels.
    """
    colour, height = _RECIPES[name](size, rng)
    # A print run is never quite the colour of the last one.
    batch = np.float32(rng.normal(1.0, 0.008)) + rng.normal(0.0, 0.003, size=3).astype(np.float32)
    return as_f32(np.power(np.clip(colour * batch, 0.0, 1.0), np.float32(DISPLAY_GAMMA))), height


def rgb(red: int, green: int, blue: int) -> FieldF32:
    """A screen colour, 0-255 each, as BGR in ``[0, 1]``."""
    return as_f32(np.array([blue, green, red]) / 255)


def _warm_white_grid(size: int, rng: np.random.Generator) -> tuple[FieldF32, FieldF32]:
    """Warm white film embossed with a fine grid of grooves, like coarse linen."""
    unit, shape = size / REFERENCE_SIZE, (size, size)
    pitch = 6.4 * unit
    line = np.arange(size, dtype=np.float32)
    # The film stretches a little: grooves wander by a fraction of their pitch.
    drift_x = np.float32(0.45 * unit) * value_noise(shape, (90 * unit, 40 * unit), rng)
    drift_y = np.float32(0.45 * unit) * value_noise(shape, (40 * unit, 90 * unit), rng)
    phase_x, phase_y = rng.uniform(0, pitch, size=2).astype(np.float32)
    across = _groove((line[None, :] + drift_x + phase_x) / np.float32(pitch))
    down = _groove((line[:, None] + drift_y + phase_y) / np.float32(pitch))
    grooves = np.maximum(across, down)
    grain = fractal_noise(shape, (3 * unit, 3 * unit), rng, octaves=2)
    mottle = fractal_noise(shape, (70 * unit, 70 * unit), rng, octaves=2)
    # Threads differ in strength, in both directions.
    threads = value_noise(shape, (60 * unit, 3.2 * unit), rng) + value_noise(shape, (3.2 * unit, 60 * unit), rng)
    tone = 1.0 - 0.075 * grooves + 0.006 * grain + 0.008 * mottle + 0.006 * threads
    height = as_f32(unit * (-0.42 * grooves + 0.05 * grain + 0.05 * threads))
    return as_f32(rgb(232, 225, 212) * tone[..., None]), height


def _groove(cycles: FieldF32) -> FieldF32:
    """1 in the middle of a groove, 0 on the land; one groove a cycle."""
    off_centre = np.abs(cycles - np.floor(cycles) - np.float32(0.5))
    return smoothstep(0.24, 0.06, as_f32(off_centre))


def _straight_cloud_pattern(size: int, rng: np.random.Generator) -> tuple[FieldF32, FieldF32]:
    """Straight streaks in greige that thicken and fade like clouds."""
    unit, shape = size / REFERENCE_SIZE, (size, size)
    broad = fractal_noise(shape, (260 * unit, 22 * unit), rng, octaves=3, gain=0.6)
    fine = fractal_noise(shape, (110 * unit, 3.4 * unit), rng, octaves=2, gain=0.6)
    hair = value_noise(shape, (46 * unit, 1.2 * unit), rng)
    cloud = fractal_noise(shape, (95 * unit, 48 * unit), rng, octaves=3)
    density = smoothstep(-1.2, 1.4, cloud)
    tone = 0.30 * broad + 0.32 * cloud + (0.20 + 0.40 * density) * fine + 0.30 * hair
    colour = mix(rgb(154, 144, 132), rgb(196, 188, 176), smoothstep(-1.9, 1.9, as_f32(tone)))
    dust = value_noise(shape, (1.5 * unit, 1.5 * unit), rng)
    return as_f32(colour + np.float32(0.006) * dust[..., None]), as_f32(unit * (0.10 * hair + 0.06 * fine))


_MOON_SHADOW_WHITE_OAK = Wood(
    early=rgb(216, 204, 186),
    late=rgb(172, 154, 131),
    ring_spacing=9.5,
    ring_contrast=0.95,
    pith_depth=(22.0, 40.0),
    pith_across=(60.0, 120.0),
    fibre_contrast=0.20,
    pore_colour=rgb(146, 128, 106),
    pore_share=0.060,
    pore_length=21.0,
    pore_contrast=0.42,
    fleck_contrast=0.07,
)
_WARM_WOOD = Wood(
    early=rgb(194, 142, 95),
    late=rgb(134, 84, 49),
    ring_spacing=10.5,
    ring_contrast=0.90,
    pith_depth=(18.0, 36.0),
    pith_across=(60.0, 120.0),
    fibre_contrast=0.24,
    pore_colour=rgb(104, 62, 36),
    pore_share=0.030,
    pore_length=14.0,
    pore_contrast=0.50,
    fleck_contrast=0.0,
)
_GREEN_GREY_WOOD = Wood(
    early=rgb(152, 157, 143),
    late=rgb(98, 106, 95),
    ring_spacing=8.0,
    ring_contrast=0.80,
    pith_depth=(20.0, 50.0),
    pith_across=(-260.0, -140.0),
    fibre_contrast=0.26,
    pore_colour=rgb(76, 82, 74),
    pore_share=0.045,
    pore_length=22.0,
    pore_contrast=0.48,
    fleck_contrast=0.0,
)


def _wood(wood: Wood) -> Recipe:
    return lambda size, rng: render_wood(wood, size, rng)


_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "warm_white_grid": _warm_white_grid,
        "straight_cloud_pattern": _straight_cloud_pattern,
        "moon_shadow_white_oak": _wood(_MOON_SHADOW_WHITE_OAK),
        "warm_wood": _wood(_WARM_WOOD),
        "green_grey_wood": _wood(_GREEN_GREY_WOOD),
    }
)

TEXTURES: tuple[str, ...] = tuple(_RECIPES)
"""The textures' names, in the order of the FLAME paper's table."""
