"""Reference images: a few good images in the package, and what the trained model said of them.

A runtime that scores them otherwise is not running the model that was trained, and does not get to judge. The images
leave the site with the package; a package may hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError
from edgeflame.images import ImageU8, Preprocessing, decode_image

DEFAULT_REFERENCES = 4
MAX_REFERENCES = 64
"""Each costs the start of an inspection one image's time."""

_PNG = b"\x89PNG\r\n\x1a\n"


class ReferenceScore(msgspec.Struct, frozen=True, kw_only=True):
    """What the trained model says of one reference image, in float32 or better."""

    score: float
    map_max: float
    map_mean: float
    """Of the anomaly map; tells a map that is right in its maximum only."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One reference image, still encoded, and its score."""

    png: bytes
    expected: ReferenceScore

    def image(self, preprocessing: Preprocessing) -> ImageU8:
        """The pre-processed image ``[height, width, 3]`` uint8, BGR.

        Raises:
            DataError: not a PNG of the model's input size; one of another size is not even decoded.
        """
        width, height = (int.from_bytes(self.png[start : start + 4], "big") for start in (16, 20))
        expected = (preprocessing.width, preprocessing.height)
        if not self.png.startswith(_PNG) or (width, height) != expected:
            msg = f"a reference image is not a PNG of {expected[0]}x{expected[1]} pixels"
            raise DataError(msg)
        return decode_image(self.png, "a reference image")


def make_references(images: ImageU8, maps: npt.NDArray[np.floating]) -> tuple[Reference, ...]:
    """References of images ``[R, height, width, 3]`` uint8 BGR and their anomaly maps ``[R, h, w]``."""
    return tuple(
        Reference(
            png=_encode(image),
            expected=ReferenceScore(
                score=float(one.max()), map_max=float(one.max()), map_mean=float(one.mean(dtype=np.float64))
            ),
        )
        for image, one in zip(images, maps, strict=True)
    )


def evenly_spaced(total: int, count: int) -> Sequence[int]:
    """Up to ``count`` different indices below ``total``, from the first to the last."""
    return sorted({round(float(step)) for step in np.linspace(0, total - 1, min(total, count))}) if total else []


def _encode(image: ImageU8) -> bytes:
    encoded, data = cv2.imencode(".png", image)
    assert encoded, "an 8-bit image of three channels is always a PNG"
    return bytes(data.tobytes())
