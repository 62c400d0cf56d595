"""Has the camera lost its colours, or exchanged red and blue? Told from the package's reference images.

Cameras fall back to grey when a driver is reset or the light is taken for night, and a changed pixel format exchanges
the outer channels. A model sees either as something odd about every part, or as nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import cv2
import numpy as np
import numpy.typing as npt

from edge.verdict import Reason
from edgeflame.images import ImageU8

MIN_CHROMA = 4.0
"""Mean chroma, in grey levels, that all reference images must have: less is a grey product, or a grey camera."""

MIN_CAST = 8.0
"""Least difference of mean red and mean blue in a reference image for telling one from the other."""

MIRROR_TOLERANCE = 0.25
"""How far a mean may be from the exchanged one, as a share of that difference."""


@final
class ColourCheck:
    """Compares the colours of images with those of good ones.

    Args:
        references: ``[H, W, 3]`` uint8 BGR each, the model's input; none for no check.
        min_colour: least share of the references' chroma.
    """

    def __init__(self, references: Sequence[ImageU8], min_colour: float) -> None:
        least = min((chroma(image) for image in references), default=0.0)
        self._min_chroma = min_colour * least if least >= MIN_CHROMA else 0.0
        means = [_means(image) for image in references]
        self._means = [mean for mean in means if abs(mean[2] - mean[0]) >= MIN_CAST] if min_colour else []

    def faults(self, image: ImageU8) -> tuple[Reason, ...]:
        """What is wrong with an image's colours, ``[H, W, 3]`` uint8 BGR."""
        if self._min_chroma and chroma(image) < self._min_chroma:
            return (Reason.COLOUR_LOST,)
        if self._means and self._is_mirrored(_means(image)):
            return (Reason.COLOUR_SWAPPED,)
        return ()

    def _is_mirrored(self, mean: npt.NDArray[np.float64]) -> bool:
        # Green stays where it is; it tells how much brighter the picture is.
        if mean[1] == 0:
            return False
        for reference in self._means:
            scaled = mean * (reference[1] / mean[1])
            tolerance = MIRROR_TOLERANCE * abs(reference[2] - reference[0])
            if max(abs(scaled[0] - reference[2]), abs(scaled[2] - reference[0])) <= tolerance:
                return True
        return False


def chroma(image: ImageU8) -> float:
    """Mean over the pixels of their largest minus their smallest channel, in grey levels; 0 is grey."""
    blue, green, red = cv2.split(image)
    largest, smallest = cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red)
    return float(cv2.subtract(largest, smallest).mean())


def _means(image: ImageU8) -> npt.NDArray[np.float64]:
    return np.asarray(cv2.mean(image)[:3])
