"""Independent random streams from one seed.

Every random thing is named by a path of words and numbers, ``(7, "dataset", "train", 12)``, and its stream is
drawn from a hash of that path. So adding a part or a photograph changes no other one, and the parts of a
data set and those of a camera stream never share a seed, whatever seed the user gives.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed in ``[0, 2**64)`` that belongs to ``path`` below ``seed``."""
    # repr keeps "1" and 1 apart, and a tuple's repr keeps ("ab", "c") and ("a", "bc") apart.
    return int.from_bytes(hashlib.sha256(repr((int(seed), *path)).encode()).digest()[:8], "big")


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """The random stream that belongs to ``path`` below ``seed``."""
    # PCG64 by name: numpy may change what default_rng stands for.
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *path)))
