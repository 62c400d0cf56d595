"""One physical board: a piece of a texture with its edges, and perhaps a defect."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeflame.boards.defects import DEFECTS, Defect, damage
from edgeflame.boards.seeds import generator
from edgeflame.boards.surface import Outline, Surface, edge_coverage, edge_relief
from edgeflame.boards.textures import TEXTURES, render_texture

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
    defect: Defect | None

    @property
    def image_size(self) -> int:
        """Side of the photographs in pixels."""
        return self.intact.size

    def without_defect(self) -> Board:
        """The same board before the damage."""
        return replace(self, defect=None)


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
    if texture not in TEXTURES:
        msg = f"no texture {texture!r}; there are {', '.join(TEXTURES)}"
        raise ValueError(msg)
    if defect is not None and defect not in DEFECTS:
        msg = f"no defect {defect!r}; there are {', '.join(DEFECTS)}"
        raise ValueError(msg)
    if image_size < MIN_IMAGE_SIZE:
        msg = f"image_size is at least {MIN_IMAGE_SIZE}, got {image_size}"
        raise ValueError(msg)
    if not 0.0 <= severity <= 1.0:
        msg = f"severity lies between 0 and 1, got {severity}"
        raise ValueError(msg)
    albedo, height = render_texture(texture, image_size, generator(seed, "texture", texture))
    outline = Outline(size=image_size)
    inward = outline.inward_any()
    intact = Surface(
        albedo=albedo,
        height=height + edge_relief(inward, outline.unit),
        coverage=edge_coverage(inward),
    )
    made = None if defect is None else damage(intact, defect, severity, generator(seed, "defect", defect))
    return Board(texture=texture, intact=intact, defect=made)
