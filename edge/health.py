"""Is this an image of a part at all? A covered lens or a dead lamp must not be read as "nothing found"."""

from __future__ import annotations

import cv2
import msgspec

from edge.verdict import Reason
from edgeflame.errors import ConfigError
from edgeflame.images import ImageU8


class HealthLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[health]``. The defaults refuse only what no working camera and lamp would give."""

    min_mean: float = 3.0
    """Darkest mean grey level, 0..255, of the model's input; 0 allows any."""
    max_mean: float = 252.0
    """Brightest mean grey level; 255 allows any."""
    min_spread: float = 0.5
    """Smallest standard deviation, in grey levels, of the liveliest channel; a real sensor's noise alone is
    more than this, a dropped signal's even grey is less. 0 allows any."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_mean <= self.max_mean <= 255:
            msg = f"health: 0 <= min_mean <= max_mean <= 255, not {self.min_mean} and {self.max_mean}"
            raise ConfigError(msg)
        if not 0 <= self.min_spread <= 128:
            msg = f"health.min_spread must be 0..128, not {self.min_spread}"
            raise ConfigError(msg)


def image_faults(image: ImageU8, limits: HealthLimits) -> tuple[Reason, ...]:
    """What is wrong with an image as an image; empty if nothing is.

    Args:
        image: ``[H, W, 3]`` uint8, the model's input.
        limits: where wrong begins.
    """
    means, spreads = cv2.meanStdDev(image)
    mean, spread = float(means.mean()), float(spreads.max())
    faults = []
    if mean < limits.min_mean:
        faults.append(Reason.TOO_DARK)
    if mean > limits.max_mean:
        faults.append(Reason.TOO_BRIGHT)
    if spread < limits.min_spread:
        faults.append(Reason.BLANK)
    return tuple(faults)
