"""Is this an image of a part at all? A covered lens or a dead lamp must not be read as "nothing found"."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import final

import cv2
import msgspec
import numpy as np

from edge.colour import ColourCheck
from edge.shift import ShiftCheck
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

    min_colour: float = 0.25
    """Least chroma, as a share of that of the package's least colourful reference image: less is a camera that fell
    back to grey. Also has exchanged red and blue noticed. Says nothing about grey products. 0 switches it off."""
    max_shift: float = 0.0
    """Largest shift against the package's reference images, as a share of the picture's side; 0, the default, allows
    any. It takes something that stays in its place from part to part; where there is nothing it is refused."""

    def __post_init__(self) -> None:
        for name, value, most in (("min_colour", self.min_colour, 0.9), ("max_shift", self.max_shift, 0.5)):
            if not 0 <= value <= most:
                msg = f"health.{name} must be 0..{most:g}, not {value}"
                raise ConfigError(msg)
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


@final
class ImageHealth:
    """All checks of one camera's images.

    Args:
        limits: where wrong begins.
        references: images of good parts, ``[H, W, 3]`` uint8 BGR each, the model's input; maybe none.
        is_live: whether the images come from a camera; only then one that repeats itself is frozen, and one that
            changes its size in mid-stream is wrong.
        frame: width and height that every frame must have; None for no such rule.

    Raises:
        ConfigError: a check is asked for that these references do not allow.
    """

    def __init__(
        self,
        limits: HealthLimits,
        references: Sequence[ImageU8],
        *,
        is_live: bool,
        frame: tuple[int, int] | None = None,
    ) -> None:
        self._limits = limits
        self._is_live = is_live
        self._frame = frame
        # A file may be there twice; a camera that sees parts pass gives no picture twice.
        self._freeze = FreezeDetector(limits.max_repeats if is_live else 0)
        sharp = [sharpness(image) for image in references] if limits.min_sharpness else []
        self._sharpness = float(np.median(sharp)) if sharp else None
        self._colour = ColourCheck(references, limits.min_colour)
        self._shift = ShiftCheck(references, limits.max_shift) if limits.max_shift else None

    def is_wrong_size(self, frame: ImageU8) -> bool:
        """Whether a frame, as the camera gave it, has another size than it should have."""
        size = (frame.shape[1], frame.shape[0])
        if self._frame is None and self._is_live:
            self._frame = size
        return self._frame not in (None, size)

    def faults(self, image: ImageU8) -> tuple[Reason, ...]:
        """What is wrong with an image as an image, ``[H, W, 3]`` uint8 BGR, the model's input; empty if nothing is.

        On any thread; what an image has to do with the ones before it is asked for apart from this.
        """
        faults = list(image_faults(image, self._limits, reference_sharpness=self._sharpness))
        if not faults:
            # A dark picture has no colours, either; one reason is enough.
            faults += self._colour.faults(image)
            if self._shift is not None and self._shift.is_shifted(image):
                faults.append(Reason.SHIFTED)
        return tuple(faults)

    def is_frozen(self, image: ImageU8) -> bool:
        """Whether the camera gave this picture, ``[H, W, 3]`` uint8, once too often; asked once for each, in order."""
        return self._freeze.is_frozen(image)


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
