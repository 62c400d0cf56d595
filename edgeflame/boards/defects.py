"""The five defects of the FLAME furniture boards.

Each is a change of the surface itself (outline, relief, reflectance), made before any light falls on it, with a
plane that says how much of the change each pixel carries. That plane goes through the same camera as the
picture, and the mask is where it is above ``MASK_EPSILON``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from edgeflame.boards.fractures import break_corner, break_edge
from edgeflame.boards.marks import dent_edge, dent_surface, spill
from edgeflame.boards.noise import FieldF32
from edgeflame.boards.surface import Surface

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


Maker = Callable[[Surface, float, np.random.Generator], tuple[Surface, FieldF32]]

_MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        "broken_corner": break_corner,
        "broken_edge": break_edge,
        "edge_indentation": dent_edge,
        "surface_indentation": dent_surface,
        "stain": spill,
    }
)

DEFECTS: tuple[str, ...] = tuple(_MAKERS)
"""The defects' names, as the folders of a data set are called."""


def damage(intact: Surface, kind: str, severity: float, rng: np.random.Generator) -> Defect:
    """Damage a board.

    Args:
        intact: the board's surface; not changed.
        kind: one of ``DEFECTS``.
        severity: from 0, barely visible, to 1, glaring.
        rng: decides where and in what shape; no draw depends on the severity.
    """
    damaged, amount = _MAKERS[kind](intact, severity, rng)
    return Defect(kind=kind, severity=severity, damaged=damaged, amount=amount)
