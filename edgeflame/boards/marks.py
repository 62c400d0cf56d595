"""Defects that leave the board whole: dents and stains."""

from __future__ import annotations

import numpy as np

from edgeflame.boards.noise import FieldF32, as_f32, fractal_noise, smoothstep
from edgeflame.boards.surface import Outline, Surface, edge_coverage, edge_relief

_SIDES = ("left", "right", "top", "bottom")

# Share of light a full-strength stain lets through, BGR.
_LIQUIDS = {
    "coffee": (0.06, 0.15, 0.28),
    "ink": (0.24, 0.12, 0.10),
    "grease": (0.14, 0.26, 0.33),
    "dirty_water": (0.22, 0.25, 0.26),
}


def dent_edge(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Knock a dent into an edge: the laminate bends and the outline is pushed in, nothing breaks.

    From 10 units long and hardly deep at severity 0 to 44 long at severity 1.

    Returns:
        The dented surface and the depth ``[S, S]`` over the greatest depth.
    """
    outline, unit = Outline(size=intact.size), intact.unit
    side = str(rng.choice(_SIDES))
    inward, along = outline.inward(side), outline.along(side)
    centre = rng.uniform(0.2, 0.8) * (outline.high - outline.low)
    half = unit * (5.0 + 17.0 * severity) * rng.uniform(0.85, 1.15)
    reach = unit * (4.5 + 13.0 * severity) * rng.uniform(0.85, 1.15)
    uneven = fractal_noise(_shape(intact), (12 * unit, 12 * unit), rng, octaves=2)
    t = (along - np.float32(centre)) / np.float32(half)
    d = np.maximum(inward, 0.0) / np.float32(reach)
    profile = _bowl(as_f32(t * t + d * d), uneven)
    # How far the outline itself gave way; a bowl along the edge.
    pushed = np.float32(unit * (0.25 + 4.6 * severity)) * np.clip(1.0 - t * t, 0.0, 1.0) ** 2
    rounded = edge_relief(as_f32(np.minimum(outline.inward_any(), inward - pushed)), unit)
    rounded -= edge_relief(outline.inward_any(), unit)
    drop = np.float32(unit * (0.22 + 8.5 * severity**1.2)) * profile
    dented = Surface(
        albedo=as_f32(intact.albedo * (1.0 - 0.30 * severity * profile[..., None])),
        height=as_f32(intact.height + rounded - drop),
        coverage=as_f32(np.minimum(intact.coverage, edge_coverage(as_f32(inward - pushed)))),
    )
    amount = np.maximum(profile, intact.coverage - dented.coverage) * outline.touched()
    return dented, as_f32(amount)


def dent_surface(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Press a dent into the face, round or oblong: radius 4.5 units at severity 0, 16 at severity 1.

    Returns:
        The dented surface and the depth ``[S, S]`` over the greatest depth.
    """
    unit = intact.unit
    x, y = _offsets(intact, rng, margin=0.18)
    angle = rng.uniform(0.0, np.pi)
    oblong = rng.uniform(1.0, 1.8)
    radius = unit * (4.5 + 11.5 * severity)
    across = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    along = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
    uneven = fractal_noise(_shape(intact), (10 * unit, 10 * unit), rng, octaves=2)
    squared = (across * across * np.float32(oblong) + along * along / np.float32(oblong)) / np.float32(radius**2)
    profile = _bowl(as_f32(squared), uneven)
    # Slope, not depth, is what the light shows; its greatest grows from 4 % to about 1 in 1.
    drop = np.float32(radius * (0.026 + 0.62 * severity**1.2)) * profile
    dented = Surface(
        albedo=as_f32(intact.albedo * (1.0 - 0.22 * severity * profile[..., None])),
        height=as_f32(intact.height - drop),
        coverage=intact.coverage,
    )
    return dented, profile


def spill(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Let a drop of something dry on the face: radius 8 units and 7 % opacity to 26 units and 75 %.

    Returns:
        The stained surface and the stain's opacity ``[S, S]``.
    """
    unit = intact.unit
    x, y = _offsets(intact, rng, margin=0.22)
    liquid = np.array(_LIQUIDS[str(rng.choice(sorted(_LIQUIDS)))], dtype=np.float32)
    radius = unit * (8.0 + 18.0 * severity)
    lobes = fractal_noise(_shape(intact), (26 * unit, 26 * unit), rng, octaves=3)
    blotches = fractal_noise(_shape(intact), (15 * unit, 15 * unit), rng, octaves=3)
    distance = np.sqrt(x * x + y * y) / np.float32(radius) * (1.0 + 0.16 * lobes)
    body = smoothstep(1.0, 0.78, as_f32(distance))
    # What the drop carried dries out at its rim.
    rim = smoothstep(1.0, 0.92, as_f32(distance)) * smoothstep(0.72, 0.90, as_f32(distance))
    strength = np.clip(0.72 + 0.10 * blotches + 0.28 * rim, 0.0, 1.0)
    opacity = as_f32((0.07 + 0.68 * severity) * body * strength * intact.coverage)
    stained = Surface(
        albedo=as_f32(intact.albedo * (1.0 - opacity[..., None] * (1.0 - liquid))),
        height=intact.height,
        coverage=intact.coverage,
    )
    return stained, opacity


def _bowl(squared_radius: FieldF32, uneven: FieldF32) -> FieldF32:
    """1 in the middle, 0 with a level brim where the squared radius reaches 1; slightly out of round."""
    inside = np.clip(1.0 - squared_radius * (1.0 + 0.14 * uneven), 0.0, 1.0)
    return as_f32(inside * inside)


def _offsets(intact: Surface, rng: np.random.Generator, *, margin: float) -> tuple[FieldF32, FieldF32]:
    """Distances right of and below a random point of the board, at least ``margin`` of its side from any edge."""
    outline = Outline(size=intact.size)
    side = outline.high - outline.low
    centre_x, centre_y = outline.low + side * rng.uniform(margin, 1.0 - margin, size=2)
    line = np.arange(intact.size, dtype=np.float32) + np.float32(0.5)
    return line[None, :] - np.float32(centre_x), line[:, None] - np.float32(centre_y)


def _shape(surface: Surface) -> tuple[int, int]:
    return surface.size, surface.size
