"""What a daemon's models are doing, in numbers, for whoever shows them."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeflame.releases.messages import Disagreement


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A product, and what is tried beside its present model."""

    product: str
    role: Literal["candidate", "before"]
    """What the second model is, if there is one: a candidate, or the model before a switch."""
    on_trial: bool
    found: Disagreement | None
    """None: no second model."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """All of a daemon."""

    beside: tuple[Beside, ...] = ()
    fates: dict[tuple[str, str], int] = {}
    """How often a product's release met a fate since the start."""
