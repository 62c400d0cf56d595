"""Checks of image quality: whether an image is fit to be inspected at all.

Brightness, spread, sharpness, the frame's size, and repetition (a frozen camera) are compared with configured limits: a
covered lens or a dead lamp must not be read as "nothing found". Two checks compare with the package's reference images:
of colours, in :mod:`edgeflame.image_quality`, and of the shift.

Shift
-----
Whether the camera has been moved: its picture is aligned with the package's reference images by phase correlation.

That needs something in the picture that stays in its place from part to part: a fixture, the part's own outline. Where
parts fill the picture with a texture that is never the same twice, nothing can be aligned, and the check is refused.

Log gradient magnitudes are compared, which light does not change much. With F_i the references' spectra, M their mean
and X a picture's, the shift is where the inverse transform of

    w * M conj(X) / |M conj(X)|,     w = coherence * low-pass,     coherence = (n |M|^2 / mean |F_i|^2 - 1) / (n - 1)

is highest (generalised cross-correlation, Knapp and Carter 1976). Frequencies that the references do not share get no
weight. Plain phase correlation weighs all alike, and missed some boards between three pins that had moved by 1%.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import final

import cv2
import numpy as np
import numpy.typing as npt

from edge.config.inspection import ImageQualityConfig
from edge.result import Reason
from edgeflame.errors import ConfigError
from edgeflame.frame_sizes import FrameSizes
from edgeflame.image_quality import ColourCheck, picture_faults
from edgeflame.images import ImageU8
from edgeflame.log import EventLog


def sharpness(image: ImageU8) -> float:
    """Variance of the Laplacian of an image's grey levels, ``[H, W, 3]`` uint8."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F).var())


def image_faults(
    image: ImageU8, limits: ImageQualityConfig, *, reference_sharpness: float | None = None
) -> tuple[Reason, ...]:
    """What is wrong with an image as an image; empty if nothing is.

    Args:
        image: ``[H, W, 3]`` uint8, the model's input.
        limits: where wrong begins.
        reference_sharpness: :func:`sharpness` of good parts; None: unknown, sharpness is not checked.
    """
    faults = list(
        picture_faults(image, min_mean=limits.min_mean, max_mean=limits.max_mean, min_spread=limits.min_spread)
    )
    if limits.min_sharpness and reference_sharpness and sharpness(image) < limits.min_sharpness * reference_sharpness:
        faults.append(Reason.OUT_OF_FOCUS)
    return tuple(map(Reason, faults))


log = EventLog("health")

MAX_SIZES_TOLD = 8
"""Number of sizes, other than the model's, that the log tells of: a camera that changes its size must not fill it."""


@final
class ImageHealth:
    """All checks of one camera's images.

    Args:
        limits: where wrong begins.
        references: images of good parts, ``[H, W, 3]`` uint8 BGR each, the model's input; maybe none.
        is_live: whether the images come from a camera; only then one that repeats itself is frozen, and one that
            changes its size in mid-stream is wrong.
        frame: width and height that every frame must have; None for no such rule.
        made_of: sizes of the photographs that the model was made of; None: not known.
        is_strict: whether other sizes than those are wrong; the log tells of them in any case.

    Raises:
        ConfigError: a configured check is impossible with these references.
    """

    def __init__(
        self,
        limits: ImageQualityConfig,
        references: Sequence[ImageU8],
        *,
        is_live: bool,
        frame: tuple[int, int] | None = None,
        made_of: FrameSizes | None = None,
        is_strict: bool = True,
    ) -> None:
        self._limits = limits
        self._made_of = made_of
        self._is_strict = is_strict
        self._other_sizes: set[tuple[int, int]] = set()
        self._is_live = is_live
        self._frame = frame
        # A file may be there twice; a camera that sees parts pass gives no picture twice.
        self._freeze = FreezeDetector(limits.max_repeats if is_live else 0)
        sharp = [sharpness(image) for image in references] if limits.min_sharpness else []
        self._sharpness = float(np.median(sharp)) if sharp else None
        self._colour = ColourCheck(references, limits.min_colour)
        self._shift = ShiftCheck(references, limits.max_shift) if limits.max_shift else None

    def size_fault(self, frame: ImageU8) -> str | None:
        """What is wrong with the size of a frame, as the camera gave it; None if nothing is."""
        size = (frame.shape[1], frame.shape[0])
        said = f"the frame has {size[0]}x{size[1]} pixels"
        is_other = self._made_of is not None and not self._made_of.has(*size)
        if is_other and size not in self._other_sizes and len(self._other_sizes) < MAX_SIZES_TOLD:
            self._other_sizes.add(size)
            log.warning("frame_of_another_size", frame=f"{size[0]}x{size[1]}", model_made_of=str(self._made_of))
        if is_other and self._is_strict:
            return f"{said}, the model was made of {self._made_of} (image_quality.frame_size)"
        if self._frame is None and self._is_live:
            self._frame = size
        return None if self._frame in (None, size) else said

    def faults(self, image: ImageU8) -> tuple[Reason, ...]:
        """What is wrong with an image as an image, ``[H, W, 3]`` uint8 BGR, the model's input; empty if nothing is.

        Any thread may call it; the checks against earlier images are separate methods.
        """
        faults = list(image_faults(image, self._limits, reference_sharpness=self._sharpness))
        if not faults:
            # A dark picture has no colours, either; one reason is enough.
            faults += map(Reason, self._colour.faults(image))
            if self._shift is not None and self._shift.is_shifted(image):
                faults.append(Reason.SHIFTED)
        return tuple(faults)

    def is_frozen(self, image: ImageU8) -> bool:
        """Whether the camera repeats this picture, ``[H, W, 3]`` uint8, too often; call it once for each, in order."""
        return self._freeze.is_frozen(image)


class FreezeDetector:
    """Counts how many times in a row the same picture came.

    Args:
        max_repeats: number of repetitions allowed; 0: any number.
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


SIDE = 128
"""Height and width at which pictures are compared: a shift of 1% is about a pixel, and it takes a millisecond."""

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
            raise ConfigError(
                "image_quality.max_shift compares with the package's reference images and "
                f"needs {MIN_REFERENCES} of them, not {len(references)}; leave it out"
            )
        self._max_shift = max_shift
        spectra = [_spectrum(image) for image in references]
        for index, own in enumerate(spectra):
            distance, agreement = _Common(spectra[:index] + spectra[index + 1 :]).find(own)
            if distance > max_shift or agreement < MIN_AGREEMENT:
                raise ConfigError(
                    "image_quality.max_shift: the package's reference images show nothing that stays in its place "
                    f"within {max_shift:g} of the side, so a moved camera cannot be told from another part; leave it "
                    "out"
                )
        self._common = _Common(spectra)

    def is_shifted(self, image: ImageU8) -> bool:
        """Whether a picture, ``[H, W, 3]`` uint8 BGR, is shifted farther than allowed; False if that is not clear."""
        distance, agreement = self._common.find(_spectrum(image))
        return distance > self._max_shift and agreement >= MIN_AGREEMENT


class _Common:
    """The common part of several spectra, weighted by their coherence."""

    def __init__(self, spectra: Sequence[Spectrum]) -> None:
        number = len(spectra)
        self._mean = np.mean(spectra, axis=0)
        share = np.square(np.abs(self._mean)) / np.mean(np.square(np.abs(spectra)), axis=0).clip(min=1e-12)
        rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
        low_pass = np.exp(-0.5 * np.square(2 * np.pi * SMOOTHING) * (np.square(rows) + np.square(columns)))
        self._weights = np.clip((number * share - 1) / (number - 1), 0, 1) * low_pass
        self._most = float(_transformed_back(self._weights)[0, 0])

    def find(self, spectrum: Spectrum) -> tuple[float, float]:
        """The shift of a picture as a share of the side, and its agreement with the common part, 1 at most."""
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
    # It fades out at the border only, where the transform would see an edge: fixtures lie close to it.
    fading = SIDE // 8
    edge = 0.5 - 0.5 * np.cos(np.pi * (np.arange(fading) + 0.5) / fading)
    profile = np.concatenate([edge, np.ones(SIDE - 2 * fading), edge[::-1]])
    return np.outer(profile, profile)


_WINDOW = _window()
