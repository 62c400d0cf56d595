"""Is this an image of a part at all? A covered lens or a dead lamp must not be read as "nothing found"."""

from __future__ import annotations

import zlib

import cv2
import msgspec
import numpy as np

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

    min_sharpness: float = 0.0
    """Least sharpness, as a share of that of the package's reference images; a lens out of focus has a fifth of it or
    less. 0, the default, allows any: parts may differ in this more than lenses do."""
    max_repeats: int = 5
    """A live camera may give the same picture, to the last bit, so many times running: a sensor's noise forbids it, a
    frozen driver does nothing else. 0 allows any number; so does a synthetic stream need it."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_sharpness <= 1:
            msg = f"health.min_sharpness must be 0..1, not {self.min_sharpness}"
            raise ConfigError(msg)
        if self.max_repeats < 0:
            msg = f"health.max_repeats must be 0 or more, not {self.max_repeats}"
            raise ConfigError(msg)
        if not 0 <= self.min_mean <= self.max_mean <= 255:
            msg = f"health: 0 <= min_mean <= max_mean <= 255, not {self.min_mean} and {self.max_mean}"
            raise ConfigError(msg)
        if not 0 <= self.min_spread <= 128:
            msg = f"health.min_spread must be 0..128, not {self.min_spread}"
            raise ConfigError(msg)


def sharpness(image: ImageU8) -> float:
    """Variance of the Laplacian of an image's grey levels, ``[H, W, 3]`` uint8."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F).var())


def image_faults(
    image: ImageU8, limits: HealthLimits, *, reference_sharpness: float | None = None
) -> tuple[Reason, ...]:
    """What is wrong with an image as an image; empty if nothing is.

    Args:
        image: ``[H, W, 3]`` uint8, the model's input.
        limits: where wrong begins.
        reference_sharpness: that of good parts; None where none is known.
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
    if limits.min_sharpness and reference_sharpness and sharpness(image) < limits.min_sharpness * reference_sharpness:
        faults.append(Reason.OUT_OF_FOCUS)
    return tuple(faults)


class FreezeDetector:
    """Counts how often the same picture came running.

    Args:
        max_repeats: so many are allowed; 0 for any number.
    """

    def __init__(self, max_repeats: int) -> None:
        self._max_repeats = max_repeats
        self._last: int | None = None
        self._repeats = 0

    def is_frozen(self, image: ImageU8) -> bool:
        """Whether this picture, ``[H, W, 3]`` uint8, is one too many of the same."""
        if not self._max_repeats:
            return False
        checksum = zlib.crc32(np.ascontiguousarray(image).data)
        self._repeats = self._repeats + 1 if checksum == self._last else 0
        self._last = checksum
        return self._repeats > self._max_repeats
