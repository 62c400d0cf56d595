"""Whether a picture is fit to be judged at all, by its light and its colours: on a line, and to learn from.

Colours
-------
Whether the camera has lost its colours, or exchanged red and blue. Cameras fall back to grey when a driver is reset or
the light is taken for night, and a changed pixel format exchanges the outer channels. A model finds something odd about
every part then, or nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.images import ImageU8

MIN_MEAN, MAX_MEAN, MIN_SPREAD, MIN_COLOUR = 3.0, 252.0, 0.5, 0.25
"""What a line refuses unless it is configured otherwise: grey levels, and a share of the reference images' chroma."""

TOO_DARK, TOO_BRIGHT, BLANK = "too_dark", "too_bright", "blank"
COLOUR_LOST, COLOUR_SWAPPED = "colour_lost", "colour_swapped"
"""The words are those of a line's results."""


def picture_faults(
    image: ImageU8, *, min_mean: float = MIN_MEAN, max_mean: float = MAX_MEAN, min_spread: float = MIN_SPREAD
) -> tuple[str, ...]:
    """What is wrong with the light of a picture, ``[H, W, 3]`` uint8; empty if nothing is."""
    means, spreads = cv2.meanStdDev(image)
    mean, spread = float(means.mean()), float(spreads.max())
    faults = []
    if mean < min_mean:
        faults.append(TOO_DARK)
    if mean > max_mean:
        faults.append(TOO_BRIGHT)
    if spread < min_spread:
        faults.append(BLANK)
    return tuple(faults)


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

    def faults(self, image: ImageU8) -> tuple[str, ...]:
        """What is wrong with an image's colours, ``[H, W, 3]`` uint8 BGR."""
        if self._min_chroma and chroma(image) < self._min_chroma:
            return (COLOUR_LOST,)
        if self._means and self._is_mirrored(_means(image)):
            return (COLOUR_SWAPPED,)
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
