"""Photographs of a textured part, good and spoiled, for tests that train."""

from __future__ import annotations

import numpy as np

from edgeflame.images import ImageU8

SIZE = 64


def part_image(seed: int, *, hole: bool = False, size: int = SIZE) -> ImageU8:
    """A textured part, each a little different; ``hole`` spoils it."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(90, 150, size)[None, :, None] + 20 * np.sin(np.arange(size) / 5)[:, None, None]
    image = np.clip(ramp * rng.uniform(0.9, 1.1) + rng.normal(0, 4, (size, size, 3)), 0, 255).astype(np.uint8)
    if hole:
        corner = rng.integers(size // 8, size // 2)
        image[corner : corner + size // 4, corner : corner + size // 4] //= 6
    return image
