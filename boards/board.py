"""One physical board: a piece of a texture with its edges, and perhaps one of the five defects of the FLAME boards.

A defect is a change of the surface itself (outline, relief, reflectance), made before any light falls on it, with a
plane that says how much of the change each pixel carries. That plane goes through the same camera as the picture,
and the mask is where it is above ``MASK_EPSILON``.

Two defects break the board: a corner knocked off, an edge chipped. Both follow one model. A fracture line divides
the board; beyond it the laminate is gone. Along the line the break slants through the board and lays bare its
chipboard core; farther out nothing is left and the belt shows. The others, dents and stains, leave the board whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from boards.surface import (
    FieldF32,
    Outline,
    Surface,
    as_f32,
    check_range,
    edge_coverage,
    edge_relief,
    fractal_noise,
    generator,
    mix,
    smoothstep,
    value_noise,
    value_noise_1d,
)
from boards.textures import check_texture, render_texture

_SIDES = ("left", "right", "top", "bottom")

# Linear reflectance, BGR: resin-bound wood flakes.
_CORE_PALE = np.array([0.24, 0.43, 0.62], dtype=np.float32)
_CORE_DARK = np.array([0.045, 0.11, 0.22], dtype=np.float32)


def _break_corner(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Knock off a corner: legs of about 4 units at severity 0, 44 at severity 1.

    Returns:
        The broken surface and the share ``[S, S]`` of each pixel that is broken off or laid bare.
    """
    outline, unit = intact.outline, intact.unit
    inward_x = outline.inward(str(rng.choice(["left", "right"])))
    inward_y = outline.inward(str(rng.choice(["top", "bottom"])))
    leg = unit * (4.0 + 40.0 * severity)
    skew = np.exp(rng.uniform(-0.35, 0.35))
    leg_x, leg_y = leg * skew, leg / skew
    to_pixels = leg_x * leg_y / np.hypot(leg_x, leg_y)
    beyond = (1.0 - inward_x / np.float32(leg_x) - inward_y / np.float32(leg_y)) * np.float32(to_pixels)
    ragged = 0.55 * fractal_noise(intact.shape, (16 * unit, 16 * unit), rng, octaves=4, gain=0.6)
    beyond += np.float32(0.9 * unit + 0.085 * leg) * ragged
    slant = (0.12 * leg + 1.8 * unit) * (1.0 + 0.35 * value_noise(intact.shape, (14 * unit, 14 * unit), rng))
    return _fracture(intact, outline, as_f32(beyond), as_f32(slant), rng)


def _break_edge(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Chip an edge: 8 units long and 2 deep at severity 0, 70 long and 15 deep at severity 1.

    Returns:
        The broken surface and the share ``[S, S]`` of each pixel that is broken off or laid bare.
    """
    outline, unit = intact.outline, intact.unit
    side, inward, along, centre = _place_on_edge(outline, rng, margin=0.25)
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
    beyond += np.float32(0.35 * unit + 0.03 * depth) * fractal_noise(intact.shape, (5 * unit, 5 * unit), rng)
    slant = (0.55 * depth + 0.8 * unit) * (1.0 + 0.35 * value_noise(intact.shape, (11 * unit, 11 * unit), rng))
    return _fracture(intact, outline, as_f32(beyond), as_f32(slant), rng)


def _place_on_edge(
    outline: Outline, rng: np.random.Generator, *, margin: float
) -> tuple[str, FieldF32, FieldF32, float]:
    """A random place on an edge, at least ``margin`` of its length from either end.

    Returns:
        The side, the distances ``[S, S]`` inwards from it and along it, and the place's distance along it, in pixels.
    """
    side = str(rng.choice(_SIDES))
    centre = rng.uniform(margin, 1.0 - margin) * (outline.high - outline.low)
    return side, outline.inward(side), outline.along(side), centre


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
    flakes = fractal_noise(intact.shape, (5.0 * unit, 4.0 * unit), rng, octaves=2, gain=0.8)
    crumbs = value_noise(intact.shape, (1.6 * unit, 1.6 * unit), rng)
    tone = 0.45 + 0.30 * flakes + 0.16 * crumbs
    return mix(_CORE_PALE, _CORE_DARK, as_f32(np.clip(tone, 0.0, 1.0))), as_f32(0.7 * flakes + 0.5 * crumbs)


# Share of light a full-strength stain lets through, BGR.
_LIQUIDS = {
    "coffee": (0.06, 0.15, 0.28),
    "ink": (0.24, 0.12, 0.10),
    "grease": (0.14, 0.26, 0.33),
    "dirty_water": (0.22, 0.25, 0.26),
}


def _dent_edge(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Knock a dent into an edge: the laminate bends and the outline is pushed in, nothing breaks.

    From 10 units long and hardly deep at severity 0 to 44 long at severity 1.

    Returns:
        The dented surface and the depth ``[S, S]`` over the greatest depth.
    """
    outline, unit = intact.outline, intact.unit
    _, inward, along, centre = _place_on_edge(outline, rng, margin=0.2)
    half = unit * (5.0 + 17.0 * severity) * rng.uniform(0.85, 1.15)
    reach = unit * (4.5 + 13.0 * severity) * rng.uniform(0.85, 1.15)
    uneven = fractal_noise(intact.shape, (12 * unit, 12 * unit), rng, octaves=2)
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


def _dent_surface(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
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
    uneven = fractal_noise(intact.shape, (10 * unit, 10 * unit), rng, octaves=2)
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


def _stain_surface(intact: Surface, severity: float, rng: np.random.Generator) -> tuple[Surface, FieldF32]:
    """Let a drop of something dry on the face: radius 8 units and 7 % opacity to 26 units and 75 %.

    Returns:
        The stained surface and the stain's opacity ``[S, S]``.
    """
    unit = intact.unit
    x, y = _offsets(intact, rng, margin=0.22)
    liquid = np.array(_LIQUIDS[str(rng.choice(sorted(_LIQUIDS)))], dtype=np.float32)
    radius = unit * (8.0 + 18.0 * severity)
    lobes = fractal_noise(intact.shape, (26 * unit, 26 * unit), rng, octaves=3)
    blotches = fractal_noise(intact.shape, (15 * unit, 15 * unit), rng, octaves=3)
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
    outline = intact.outline
    side = outline.high - outline.low
    centre_x, centre_y = outline.low + side * rng.uniform(margin, 1.0 - margin, size=2)
    line = np.arange(intact.size, dtype=np.float32) + np.float32(0.5)
    return line[None, :] - np.float32(centre_x), line[:, None] - np.float32(centre_y)


MASK_EPSILON = 0.02
"""A pixel belongs to the mask where the amount, as the camera sees it, is above this. The amount is the share of
the pixel that is broken off or laid bare, the depth of a dent over its greatest depth, or the opacity of a
stain. At 2 % the change is below one grey level for all but the most glaring defects."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Defect:
    """A defect on its board.

    Attributes:
        kind: one of ``DEFECTS``.
        severity: from 0, barely visible, to 1, glaring.
        damaged: the board's surface with the defect; equal to the intact one where ``amount`` is 0.
        amount: ``[S, S]`` in ``[0, 1]``, see ``MASK_EPSILON``.
    """

    kind: str
    severity: float
    damaged: Surface
    amount: FieldF32


DefectMaker = Callable[[Surface, float, np.random.Generator], tuple[Surface, FieldF32]]
"""Given the intact surface, the severity and what decides where and in what shape (no draw depends on the severity):
the damaged surface and the amount, see ``Defect``."""

_MAKERS: Mapping[str, DefectMaker] = MappingProxyType(
    {
        "broken_corner": _break_corner,
        "broken_edge": _break_edge,
        "edge_indentation": _dent_edge,
        "surface_indentation": _dent_surface,
        "stain": _stain_surface,
    }
)

DEFECTS: tuple[str, ...] = tuple(_MAKERS)
"""The defects' names, as the folders of a data set are called."""


MIN_IMAGE_SIZE = 64
"""Below this a texture's finest lines are narrower than a pixel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Board:
    """A part to be photographed, as often as one likes.

    Attributes:
        texture: one of ``TEXTURES``.
        intact: the surface as it left the press.
        defect: what happened to it since, or None.
    """

    texture: str
    intact: Surface
    defect: Defect | None = None

    @property
    def image_size(self) -> int:
        """Side of the photographs in pixels."""
        return self.intact.size


def make_board(
    *, texture: str, seed: int, image_size: int = 256, defect: str | None = None, severity: float = 0.5
) -> Board:
    """Make a board.

    The same texture, seed and size give the same piece of the texture whatever the defect, and the same
    defect grows in place when only ``severity`` rises.

    Args:
        texture: one of ``TEXTURES``.
        seed: which piece; every seed is another board.
        image_size: side of its photographs in pixels, at least ``MIN_IMAGE_SIZE``.
        defect: one of ``DEFECTS``, or None for a good board.
        severity: from 0, barely visible, to 1, glaring.

    Raises:
        ValueError: an argument out of its range.
    """
    check_texture(texture)
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"no defect {defect!r}; there are {', '.join(DEFECTS)}")
    check_range("image_size", image_size, MIN_IMAGE_SIZE)
    check_range("severity", severity, 0, 1)
    albedo, height = render_texture(texture, image_size, generator(seed, "texture", texture))
    outline = Outline(size=image_size)
    inward = outline.inward_any()
    intact = Surface(
        albedo=albedo,
        height=height + edge_relief(inward, outline.unit),
        coverage=edge_coverage(inward),
    )
    if defect is None:
        return Board(texture=texture, intact=intact)
    damaged, amount = _MAKERS[defect](intact, severity, generator(seed, "defect", defect))
    made = Defect(kind=defect, severity=severity, damaged=damaged, amount=amount)
    return Board(texture=texture, intact=intact, defect=made)
