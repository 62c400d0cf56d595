"""The drift reference: what images and scores of good parts are like, in a few numbers each.

Taken when a model is fitted (the reference in its package) and again of every part on the line, by the same code.
The names of the streams are part of the package's format:

    score        highest value of the anomaly map, as the verdict has it
    embedding    mean of the map: how far the embeddings of all positions lie from those of good parts. Any shift of
                 their distribution raises it (the expected squared Mahalanobis distance of x + d is C + |d|^2), also
                 one that no single position shows
    brightness   mean grey level, 0..255
    contrast     standard deviation of the grey levels
    colour       mean of blue minus mean of red
    sharpness    log of the Laplacian's variance
    noise        log of the noise's standard deviation (Immerkaer, "Fast noise variance estimation", 1996): structure is
                 taken out by a mask of second differences
    shift_x, shift_y   offset against the reference images by phase correlation, in hundredths of the image's side
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, PackageError
from edgeflame.images import ImageU8
from edgeflame.tensors import F32

PART_STREAMS = ("score", "embedding")
"""Values from the model's anomaly map of a part."""
IMAGE_STREAMS = ("brightness", "contrast", "colour", "sharpness", "noise")
"""Values of the picture, which camera and light decide."""
SHIFT_STREAMS = ("shift_x", "shift_y")
"""Where the part lies in the picture; known only where there is a template to compare it with."""
CAMERA_STREAMS = (*IMAGE_STREAMS, *SHIFT_STREAMS)
STREAMS = (*PART_STREAMS, *CAMERA_STREAMS)

NUM_QUANTILES = 101
MAX_REFERENCE_IMAGES = 2000
"""Pictures looked at for a reference: more would not make it better by anything that matters."""

_SIDE = 64
"""Of the pictures that are compared for their position."""
_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)


class StreamReference(msgspec.Struct, frozen=True, kw_only=True):
    """The distribution of one stream over good parts."""

    quantiles: tuple[float, ...]
    """At ``NUM_QUANTILES`` even steps from the least to the greatest value."""
    count: float
    """How many independent parts it was learnt from: how far it can be trusted."""

    def __post_init__(self) -> None:
        values = self.quantiles
        rising = all(low <= high for low, high in itertools.pairwise(values))
        if len(values) != NUM_QUANTILES or not rising or not all(map(math.isfinite, values)) or not self.count >= 1:
            raise PackageError(
                f"a reference of a stream needs {NUM_QUANTILES} finite, rising quantiles of at least one part"
            )


class DriftReference(msgspec.Struct, frozen=True, kw_only=True):
    """Member ``condition.json`` of a package: what is known of each stream; any may be missing."""

    streams: dict[str, StreamReference]


def make_stream_reference(values: npt.NDArray[np.floating], *, count: float | None = None) -> StreamReference:
    """The distribution of the finite ones of ``values [N]``, of which ``count`` (all) are independent.

    Raises:
        DataError: none is finite.
    """
    finite = np.asarray(values, dtype=np.float64)[np.isfinite(values)]
    if not len(finite):
        raise DataError("no finite value to take a reference from")
    quantiles = np.quantile(finite, np.linspace(0, 1, NUM_QUANTILES))
    # Interpolation may turn equal values into ones that fall by a rounding error.
    rising = np.maximum.accumulate(quantiles)
    return StreamReference(
        quantiles=tuple(float(f"{value:.9g}") for value in rising), count=len(finite) if count is None else count
    )


class AlignmentTemplate:
    """The picture that others are compared with for their position: the mean of some good ones.

    Args:
        images: ``[R, height, width, 3]`` uint8 BGR, R >= 1.
    """

    def __init__(self, images: Sequence[ImageU8] | ImageU8) -> None:
        self._mean: F32 = np.stack([_small_grey(image) for image in images]).mean(axis=0)
        self._window = cv2.createHanningWindow((_SIDE, _SIDE), cv2.CV_32F)

    def shift_of(self, image: ImageU8) -> tuple[float, float]:
        """Offset to the right and downwards in hundredths of the side; NaN where neither picture has any structure."""
        (x, y), _ = cv2.phaseCorrelate(self._mean, _small_grey(image), self._window)
        return 100 * x / _SIDE, 100 * y / _SIDE


def image_streams(image: ImageU8, template: AlignmentTemplate | None) -> dict[str, float]:
    """The camera's streams of one picture, ``[height, width, 3]`` uint8 BGR, pre-processed as the model sees it."""
    means, _ = cv2.meanStdDev(image)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)
    blue, _, red = (float(value) for value in means.ravel())
    inner = grey[1:-1, 1:-1].size
    noise = np.abs(cv2.filter2D(grey, cv2.CV_32F, _NOISE_MASK)[1:-1, 1:-1]).sum() * math.sqrt(math.pi / 2) / (6 * inner)
    found = {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "colour": blue - red,
        # Below these there is neither structure nor noise, and no use in telling smaller values apart.
        "sharpness": math.log(max(float(cv2.Laplacian(grey, cv2.CV_32F).var()), 1e-2)),
        "noise": math.log(max(float(noise), 1e-2)),
    }
    if template is not None:
        found["shift_x"], found["shift_y"] = template.shift_of(image)
    return found


def part_streams(score: float | None, anomaly_map: F32 | None) -> dict[str, float]:
    """The part's streams; those there are."""
    found = {}
    if score is not None:
        found["score"] = score
    if anomaly_map is not None and np.isfinite(mean := float(anomaly_map.mean(dtype=np.float64))):
        found["embedding"] = mean
    return found


def make_drift_reference(
    parts: Mapping[str, npt.NDArray[np.floating]],
    images: Sequence[Mapping[str, float]],
    *,
    num_parts: int,
    num_images: int,
) -> DriftReference:
    """The reference of a data set.

    Args:
        parts: ``[N]`` values of streams of ``PART_STREAMS``.
        images: what :func:`image_streams` gives for some or all of the pictures.
        num_parts: different parts among the pictures; photographs of one part are not independent.
        num_images: pictures.
    """
    columns = {name: np.asarray([one[name] for one in images]) for name in (images[0] if images else ())}
    share = min(1.0, num_parts / max(num_images, 1))
    return DriftReference(
        streams={
            name: make_stream_reference(values, count=max(1.0, share * len(values)))
            for name, values in {**parts, **columns}.items()
            if np.isfinite(values).any()
        }
    )


def encode_drift_reference(reference: DriftReference) -> bytes:
    """The member's bytes."""
    return msgspec.json.encode(reference)


def decode_drift_reference(data: bytes) -> DriftReference:
    """Read the member; streams that this version does not know are left alone.

    Raises:
        PackageError: not a reference.
    """
    try:
        return msgspec.json.decode(data, type=DriftReference)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PackageError(f"not a reference for drift ({exc})") from exc


def _small_grey(image: ImageU8) -> F32:
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
