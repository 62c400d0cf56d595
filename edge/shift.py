"""Has the camera been moved? Its picture is laid over the package's reference images by phase correlation.

That takes something in the picture that stays in its place from part to part: a fixture, the part's own outline. Where
parts fill the picture with a texture that is never the same twice there is nothing to lay over, and the check is
refused rather than left to guess.

Compared are log gradient magnitudes, which light does not change much. With F_i the references' spectra, M their mean
and X a picture's, the shift is where the inverse transform of

    w * M conj(X) / |M conj(X)|,     w = coherence * low-pass,     coherence = (n |M|^2 / mean |F_i|^2 - 1) / (n - 1)

is highest (generalised cross-correlation, Knapp and Carter 1976). Frequencies that the references do not share weigh
nothing. Plain phase correlation weighs all alike, and of boards between three pins lost some that had moved by 1%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.errors import ConfigError
from edgeflame.images import ImageU8

SIDE = 128
"""Pictures are compared at this size: a shift of 1% is a pixel, and it takes a millisecond."""

SMOOTHING = 1.2
"""Standard deviation of the low-pass, in pixels: a shift is rarely a whole number of them."""

MIN_AGREEMENT = 0.2
"""Peak, of 1 at most, from which on a shift is believed: each reference must reach it against the others, and a picture
to be called shifted. Photographs of magnetic tiles, which share nothing, reach 0.16 (95% of them); boards between a
fixture's pins 0.5, and 0.21 when they are moved by a quarter of the width."""

MIN_REFERENCES = 3

Spectrum = npt.NDArray[np.complex128]


@final
class ShiftCheck:
    """Tells whether pictures are where the references are.

    Args:
        references: ``[H, W, 3]`` uint8 BGR each, the model's input.
        max_shift: largest shift, as a share of the side.

    Raises:
        ConfigError: the references show nothing that stays in its place, or are too few.
    """

    def __init__(self, references: Sequence[ImageU8], max_shift: float) -> None:
        if len(references) < MIN_REFERENCES:
            msg = (
                f"health.max_shift compares with the package's reference images and needs {MIN_REFERENCES} of them, "
                f"not {len(references)}; leave it out"
            )
            raise ConfigError(msg)
        self._max_shift = max_shift
        spectra = [_spectrum(image) for image in references]
        for index, own in enumerate(spectra):
            distance, agreement = _Common(spectra[:index] + spectra[index + 1 :]).find(own)
            if distance > max_shift or agreement < MIN_AGREEMENT:
                msg = (
                    "health.max_shift: the package's reference images show nothing that stays in its place within "
                    f"{max_shift:g} of the side, so a moved camera cannot be told from another part; leave it out"
                )
                raise ConfigError(msg)
        self._common = _Common(spectra)

    def is_shifted(self, image: ImageU8) -> bool:
        """Whether a picture, ``[H, W, 3]`` uint8 BGR, is farther off than allowed; not where that is not clear."""
        distance, agreement = self._common.find(_spectrum(image))
        return distance > self._max_shift and agreement >= MIN_AGREEMENT


class _Common:
    """What spectra have in common."""

    def __init__(self, spectra: Sequence[Spectrum]) -> None:
        number = len(spectra)
        self._mean = np.mean(spectra, axis=0)
        share = np.square(np.abs(self._mean)) / np.mean(np.square(np.abs(spectra)), axis=0).clip(min=1e-12)
        rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
        low_pass = np.exp(-0.5 * np.square(2 * np.pi * SMOOTHING) * (np.square(rows) + np.square(columns)))
        self._weights = np.clip((number * share - 1) / (number - 1), 0, 1) * low_pass
        self._most = float(_transformed_back(self._weights)[0, 0])

    def find(self, spectrum: Spectrum) -> tuple[float, float]:
        """The shift, as a share of the side, and how clear it is, 1 at most."""
        cross = self._mean * np.conj(spectrum)
        correlation = _transformed_back(self._weights * cross / np.abs(cross).clip(min=1e-12))
        row, column = np.unravel_index(int(correlation.argmax()), correlation.shape)
        distance = math.hypot(min(row, SIDE - row), min(column, SIDE - column)) / SIDE
        return distance, float(correlation.max()) / self._most if self._most > 0 else 0.0


def _transformed_back(spectrum: npt.NDArray[np.complexfloating] | npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.fft.irfft2(spectrum, s=(SIDE, SIDE))


def _spectrum(image: ImageU8) -> Spectrum:
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    edges = np.log1p(cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)))
    return np.fft.rfft2((edges - edges.mean()) * _WINDOW)


def _window() -> npt.NDArray[np.float64]:
    # It fades out where the transform would see an edge, and only there: that is where fixtures are.
    fading = SIDE // 8
    edge = 0.5 - 0.5 * np.cos(np.pi * (np.arange(fading) + 0.5) / fading)
    profile = np.concatenate([edge, np.ones(SIDE - 2 * fading), edge[::-1]])
    return np.outer(profile, profile)


_WINDOW = _window()
