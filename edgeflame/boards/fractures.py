"""Defects that break the board: a corner knocked off, an edge chipped.

Both follow one model. A fracture line divides the board; beyond it the laminate is gone. Along the line the break
slants through the board and lays bare its chipboard core; farther out nothing is left and the belt shows.
"""

from __future__ import annotations

import numpy as np

from edgeflame.boards.noise import FieldF32, as_f32, fractal_noise, mix, smoothstep, value_noise, value_noise_1d
from edgeflame.boards.surface import Outline, Surface

_SIDES = ("left", "right", "top", "bottom")

# Linear reflectance, BGR: resin-bound wood flakes.
_CORE_PALE = np.array([0.24, 0.43, 0.62], dtype=np.float32)
_CORE_DARK = np.array([0.045, 0.11, 0.22], dtype=np.float32)


def break_corner(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Knock off a corner: legs of about 4 units at severity 0, 44 at severity 1.

    Returns:
        The broken surface and the share ``[S, S]`` of each pixel that is broken off or laid bare.
    """
    outline, unit = Outline(size=intact.size), intact.unit
    inward_x = outline.inward(str(rng.choice(["left", "right"])))
    inward_y = outline.inward(str(rng.choice(["top", "bottom"])))
    leg = unit * (4.0 + 40.0 * severity)
    skew = np.exp(rng.uniform(-0.35, 0.35))
    leg_x, leg_y = leg * skew, leg / skew
    to_pixels = leg_x * leg_y / np.hypot(leg_x, leg_y)
    beyond = (1.0 - inward_x / np.float32(leg_x) - inward_y / np.float32(leg_y)) * np.float32(to_pixels)
    ragged = 0.55 * fractal_noise(_shape(intact), (16 * unit, 16 * unit), rng, octaves=4, gain=0.6)
    beyond += np.float32(0.9 * unit + 0.085 * leg) * ragged
    slant = (0.12 * leg + 1.8 * unit) * (1.0 + 0.35 * value_noise(_shape(intact), (14 * unit, 14 * unit), rng))
    return _fracture(intact, outline, as_f32(beyond), as_f32(slant), rng)


def break_edge(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Chip an edge: 8 units long and 2 deep at severity 0, 70 long and 15 deep at severity 1.

    Returns:
        The broken surface and the share ``[S, S]`` of each pixel that is broken off or laid bare.
    """
    outline, unit = Outline(size=intact.size), intact.unit
    side = str(rng.choice(_SIDES))
    inward, along = outline.inward(side), outline.along(side)
    centre = rng.uniform(0.25, 0.75) * (outline.high - outline.low)
    half = unit * (4.0 + 31.0 * severity)
    depth = unit * (2.0 + 13.0 * severity)
    lopsided = rng.uniform(-0.3, 0.3)
    # The bite's depth along the edge: one jagged line, the same for every distance inwards.
    line = along[0] if side in ("top", "bottom") else along[:, 0]
    t = (line - np.float32(centre)) / np.float32(half)
    arch = np.clip(1.0 - t * t, 0.0, None) ** 0.65 * (1.0 + lopsided * t)
    jags = value_noise_1d(intact.size, (18 * unit, 7 * unit, 2.5 * unit), rng)
    bite = np.where(np.abs(t) < 1, depth * arch * (1.0 + 0.55 * jags), -4.0 * unit).astype(np.float32)
    beyond = (bite[None, :] if side in ("top", "bottom") else bite[:, None]) - inward
    beyond += np.float32(0.35 * unit + 0.03 * depth) * fractal_noise(_shape(intact), (5 * unit, 5 * unit), rng)
    slant = (0.55 * depth + 0.8 * unit) * (1.0 + 0.35 * value_noise(_shape(intact), (11 * unit, 11 * unit), rng))
    return _fracture(intact, outline, as_f32(beyond), as_f32(slant), rng)


def _fracture(
    intact: Surface, outline: Outline, beyond: FieldF32, slant: FieldF32, rng: np.random.Generator
) -> tuple[Surface, FieldF32]:
    """Break the board where ``beyond``, pixels past the fracture line, is positive; all of it past ``slant``."""
    unit = intact.unit
    colour, roughness = _core(intact, rng)
    bare = as_f32(np.clip(beyond + 0.5, 0.0, 1.0))
    gone = as_f32(np.clip(beyond - slant + 0.5, 0.0, 1.0))
    down = as_f32(np.clip(beyond / np.maximum(slant, 0.5), 0.0, 1.0))
    # The break drops sharply under the laminate, then slants; the belt's side lies in its own shade.
    depth = unit * (0.9 * smoothstep(0.0, 0.25, down) + 2.2 * down)
    core_height = as_f32(unit * 0.55 * roughness - depth)
    lit = 1.0 - 0.35 * down
    broken = Surface(
        albedo=mix(intact.albedo, as_f32(colour * lit[..., None]), bare),
        height=as_f32(intact.height + (core_height - intact.height) * bare),
        coverage=as_f32(intact.coverage * (1.0 - gone)),
    )
    return broken, as_f32(bare * outline.touched())


def _core(intact: Surface, rng: np.random.Generator) -> tuple[FieldF32, FieldF32]:
    """Chipboard: reflectance ``[S, S, 3]`` and roughness ``[S, S]`` of about unit variance."""
    unit = intact.unit
    flakes = fractal_noise(_shape(intact), (5.0 * unit, 4.0 * unit), rng, octaves=2, gain=0.8)
    crumbs = value_noise(_shape(intact), (1.6 * unit, 1.6 * unit), rng)
    tone = 0.45 + 0.30 * flakes + 0.16 * crumbs
    return mix(_CORE_PALE, _CORE_DARK, as_f32(np.clip(tone, 0.0, 1.0))), as_f32(0.7 * flakes + 0.5 * crumbs)


def _shape(surface: Surface) -> tuple[int, int]:
    return surface.size, surface.size
