"""The five laminates of the FLAME furniture boards, made from noise.

A texture is a recipe; each random stream makes another piece of it. Lengths are in units of 1/256 of the picture's
side, so a board looks the same at every resolution.

Wood grain is a plank sawn from a tapering log. Growth rings are surfaces of equal distance from the pith. The saw's
plane passes the pith at some depth and the log leans a little, so the rings show as the arches of a plain-sawn
plank, or as straight lines far from the pith. Fibres, pores and ray flecks run along the log, down the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import cv2
import numpy as np

from boards.surface import REFERENCE_SIZE, FieldF32, as_f32, fractal_noise, mix, smoothstep, value_noise

_RING_STEPS_PER_UNIT = 8
"""Resolution of the table from distance to tone; finer than a pixel at any sensible picture size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wood:
    """A kind of wood. Lengths in units of 1/256 of the picture, colours BGR in ``[0, 1]`` as on a screen.

    Attributes:
        early: colour of the wood grown in spring, ``[3]``.
        late: colour of the wood grown in late summer, ``[3]``.
        ring_spacing: mean width of a year's growth.
        ring_contrast: how far late wood goes towards ``late``, in ``[0, 1]``.
        pith_depth: least and greatest distance of the saw's plane from the pith.
        pith_across: least and greatest distance of the pith from the canvas's left or right side, negative
            outside; far outside, the plank is quarter-sawn and its grain straight.
        fibre_contrast: share of ``early`` to ``late`` that fibres swing by.
        pore_colour: ``[3]``.
        pore_share: share of the surface where pores begin.
        pore_length: of the dark dash a cut pore makes.
        pore_contrast: how far a cut pore goes towards ``pore_colour``, in ``[0, 1]``.
        fleck_contrast: strength of pale medullary ray flecks, as oak has them.
    """

    early: FieldF32
    late: FieldF32
    ring_spacing: float
    ring_contrast: float
    pith_depth: tuple[float, float]
    pith_across: tuple[float, float]
    fibre_contrast: float
    pore_colour: FieldF32
    pore_share: float
    pore_length: float
    pore_contrast: float
    fleck_contrast: float


def render_wood(wood: Wood, size: int, rng: np.random.Generator) -> tuple[FieldF32, FieldF32]:
    """One plank.

    Returns:
        Screen colour ``[S, S, 3]`` BGR about ``[0, 1]``, and relief ``[S, S]`` in pixels.
    """
    unit, shape = size / REFERENCE_SIZE, (size, size)
    rings = _rings(wood, size, rng)
    fibres = 0.6 * fractal_noise(shape, (60 * unit, 2.6 * unit), rng, octaves=2, gain=0.7)
    fibres += 0.5 * value_noise(shape, (28 * unit, 1.1 * unit), rng)
    streaks = fractal_noise(shape, (230 * unit, 26 * unit), rng, octaves=2)
    tone = wood.ring_contrast * rings + wood.fibre_contrast * fibres + 0.10 * streaks + 0.12
    colour = mix(wood.early, wood.late, as_f32(np.clip(tone, -0.4, 1.15)))
    pores = _pores(wood, size, rings, rng)
    colour = mix(colour, wood.pore_colour, as_f32(wood.pore_contrast * pores))
    if wood.fleck_contrast:
        flecks = smoothstep(0.9, 2.4, value_noise(shape, (16 * unit, 3.0 * unit), rng))
        colour = as_f32(colour * (1.0 + wood.fleck_contrast * flecks[..., None]))
    height = as_f32(unit * (-0.35 * pores + 0.07 * fibres))
    return colour, height


def _rings(wood: Wood, size: int, rng: np.random.Generator) -> FieldF32:
    """Lateness of the wood in ``[0, 1]``: rises through each year, drops at its end."""
    unit, shape = size / REFERENCE_SIZE, (size, size)
    line = np.arange(size, dtype=np.float32) / np.float32(unit)
    depth = rng.uniform(*wood.pith_depth)
    lean = rng.choice([-1, 1]) * rng.uniform(0.06, 0.14)
    across = rng.uniform(*wood.pith_across)
    pith_x = across if rng.random() < 0.5 else REFERENCE_SIZE - across
    slant = rng.normal(0.0, 0.02)
    middle = REFERENCE_SIZE / 2
    wave_x = 5.0 * value_noise(shape, (85 * unit, 55 * unit), rng) + 0.9 * fractal_noise(
        shape, (22 * unit, 9 * unit), rng, octaves=2
    )
    wave_depth = 3.0 * value_noise(shape, (70 * unit, 80 * unit), rng)
    x = line[None, :] - pith_x - slant * (line[:, None] - middle) + wave_x
    # The plane may pass close to the pith but not through it: a heart board would be rejected.
    z = np.maximum(depth + lean * (line[:, None] - middle) + wave_depth, 3.0)
    distance = np.sqrt(x * x + z * z)
    table = _ring_table(wood.ring_spacing, float(distance.max()), rng)
    return as_f32(table[(distance * _RING_STEPS_PER_UNIT).astype(np.int32)])


def _ring_table(spacing: float, reach: float, rng: np.random.Generator) -> FieldF32:
    """Lateness against distance from the pith, ``_RING_STEPS_PER_UNIT`` entries to a unit, up to ``reach``."""
    num_rings = int(reach / spacing * 2) + 4
    widths = spacing * np.exp(rng.normal(0.0, 0.28, num_rings))
    strength = rng.uniform(0.55, 1.0, num_rings)
    ends = np.cumsum(widths)
    at = np.arange(int(reach * _RING_STEPS_PER_UNIT) + 2) / _RING_STEPS_PER_UNIT
    year = np.minimum(np.searchsorted(ends, at), num_rings - 1)
    through = np.clip(1.0 - (ends[year] - at) / widths[year], 0.0, 1.0)
    lateness = strength[year] * (0.2 * through + 0.8 * through**4)
    softened = cv2.GaussianBlur(lateness.astype(np.float32)[None, :], (0, 0), 0.35 * _RING_STEPS_PER_UNIT)
    return as_f32(softened[0])


def _pores(wood: Wood, size: int, rings: FieldF32, rng: np.random.Generator) -> FieldF32:
    """How much of a cut pore each pixel shows, in ``[0, 1]``; pores are wider and denser in early wood."""
    unit, shape = size / REFERENCE_SIZE, (size, size)
    share = wood.pore_share * (1.25 - rings) / unit
    starts = (rng.random(shape, dtype=np.float32) < share / (0.35 * wood.pore_length)).astype(np.float32)
    starts *= rng.uniform(0.5, 1.0, size=shape).astype(np.float32)
    length = max(3, round(wood.pore_length * unit) | 1)
    # A tapered dash: thickest in its middle.
    dash = np.sin(np.linspace(0, np.pi, length + 2)[1:-1]).astype(np.float32)
    across = np.array([0.08, 0.84, 0.08], dtype=np.float32)
    drawn = cv2.sepFilter2D(starts, cv2.CV_32F, across, dash, borderType=cv2.BORDER_REFLECT)
    return as_f32(np.clip(drawn * (1.5 if unit < 1.5 else 2.0), 0.0, 1.0))


DISPLAY_GAMMA = 2.2
"""Colours in recipes are written as a screen shows them; light is computed in linear reflectance."""

TextureRecipe = Callable[[int, np.random.Generator], tuple[FieldF32, FieldF32]]


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


_RECIPES: Mapping[str, TextureRecipe] = MappingProxyType(
    {
        "warm_white_grid": _warm_white_grid,
        "straight_cloud_pattern": _straight_cloud_pattern,
        "moon_shadow_white_oak": partial(render_wood, _MOON_SHADOW_WHITE_OAK),
        "warm_wood": partial(render_wood, _WARM_WOOD),
        "green_grey_wood": partial(render_wood, _GREEN_GREY_WOOD),
    }
)

TEXTURES: tuple[str, ...] = tuple(_RECIPES)
"""The textures' names, in the order of the FLAME paper's table."""


def check_texture(name: str) -> None:
    """Refuse what is none of ``TEXTURES``.

    Raises:
        ValueError: there is no texture of that name.
    """
    if name not in TEXTURES:
        raise ValueError(f"no texture {name!r}; there are {', '.join(TEXTURES)}")
