"""Reading photographs, and the one pre-processing that training, evaluation and the line share.

What the trainer saw is what the line sees: every image, from whatever source, goes through
:meth:`Preprocessing.apply` and nothing else; colour order and normalisation are inside the exported graph.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import simplejpeg

from edgeflame.errors import ConfigError, DataError, StorageError
from edgeflame.state import atomic_write

ImageU8 = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

MAX_INPUT_SIDE = 4096
"""Largest model input side; larger ones are a mistake, not a camera (256 is the default)."""


MAX_PADDING = 16
"""Bytes that some cameras put between a JPEG's data and its end; more of them are data that were not understood."""


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rectangle in pixels of the camera frame: the region of interest that is cropped before resizing."""

    x: int
    """Its left edge."""
    y: int
    """Its upper edge."""
    width: int
    """At least 1."""
    height: int
    """At least 1."""

    def __post_init__(self) -> None:
        if self.x < 0 or self.y < 0 or self.width < 1 or self.height < 1:
            raise ConfigError(f"region of interest must have x, y >= 0 and width, height >= 1, not {self}")

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read ``X,Y,WIDTH,HEIGHT``.

        Raises:
            ConfigError: it is not four integers that make a rectangle.
        """
        try:
            x, y, width, height = (int(part) for part in text.split(","))
        except ValueError as exc:
            raise ConfigError(f"region of interest is written X,Y,WIDTH,HEIGHT in pixels, not {text!r}") from exc
        return cls(x=x, y=y, width=width, height=height)


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From a camera frame to the model's input: crop to the region of interest, resize, nothing else."""

    height: int = 256
    """Of the model's input, pixels."""
    width: int = 256
    """Of the model's input, pixels."""
    roi: Region | None = None
    resize: Literal["area", "halving"] | msgspec.UnsetType = msgspec.UNSET
    """``area``, also when unset: OpenCV's ``INTER_AREA``. ``halving``: nearly the same values in a third to a
    sixth of the time; see :func:`halved`. Left out of what is written where it is not set, so that versions without it
    read it."""

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if not 32 <= side <= MAX_INPUT_SIDE or side % 32:
                raise ConfigError(f"input {name} must be a multiple of 32 from 32 to {MAX_INPUT_SIDE}, not {side}")

    def crop(self, frame: ImageU8) -> ImageU8:
        """The region of interest of a frame (a view).

        Raises:
            DataError: the region reaches outside the frame.
        """
        roi = self.roi
        if roi is None:
            return frame
        height, width = frame.shape[:2]
        if roi.x + roi.width > width or roi.y + roi.height > height:
            raise DataError(
                f"the region of interest {roi.x},{roi.y},{roi.width},{roi.height} reaches outside "
                f"the {width}x{height} image"
            )
        return frame[roi.y : roi.y + roi.height, roi.x : roi.x + roi.width]

    def apply(self, frame: ImageU8) -> ImageU8:
        """Crop and resize (``resize``) a BGR frame.

        Args:
            frame: ``[frame_height, frame_width, 3]`` uint8, BGR.

        Returns:
            ``[height, width, 3]`` uint8, BGR, contiguous.

        Raises:
            DataError: wrong shape or type, or the region of interest does not fit.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise DataError(f"expected a uint8 BGR frame [height, width, 3], got {frame.dtype} {list(frame.shape)}")
        cropped = self.crop(frame)
        if cropped.shape[:2] == (self.height, self.width):
            return np.ascontiguousarray(cropped)
        if self.resize == "halving":
            return halved(cropped, height=self.height, width=self.width)
        resized = cv2.resize(cropped, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return np.asarray(resized, dtype=np.uint8)

    def apply_to_mask(self, mask: ImageU8) -> ImageU8:
        """The same crop and size for a defect mask ``[frame_height, frame_width]``; stays binary (0 or 255)."""
        cropped = self.crop(mask)
        resized = cv2.resize(cropped, (self.width, self.height), interpolation=cv2.INTER_NEAREST)
        return np.where(resized > 0, 255, 0).astype(np.uint8)


def halved(image: ImageU8, *, height: int, width: int) -> ImageU8:
    """Resize by what OpenCV does fast: means of 2 x 2 pixels, and one bilinear step between grids that differ little.

    ``INTER_AREA`` by a factor that is no whole number takes a slow path, 5 ms for 1920x1080 pixels. Here the image is
    halved as long as it is at least four times the output in one direction and twice in the other, brought bilinearly
    to twice the output's size, and halved. On noisy pictures of boards the values differ from those of ``INTER_AREA``
    by 0.2 to 0.5 grey levels in the mean and by 6 at most. Images that this does not suit, very long ones or of odd
    sides far above the output's, are resized by ``INTER_AREA``.

    Args:
        image: ``[H, W, 3]`` uint8.
        height: of the output.
        width: of the output.
    """
    now_height, now_width = image.shape[:2]
    while now_height % 2 == now_width % 2 == 0:
        factors = now_height / height, now_width / width
        if min(factors) < 2 or max(factors) < 4:
            break
        now_height, now_width = now_height // 2, now_width // 2
        image = np.asarray(cv2.resize(image, (now_width, now_height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if max(now_height / height, now_width / width) <= 4:
        # Beyond it the bilinear step would leave pixels out.
        image = np.asarray(cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def decode_image(data: bytes, name: str) -> ImageU8:
    """Decode a complete image file to BGR.

    Grey becomes three equal channels, alpha is dropped, 16 bit is scaled by its full range (65535 -> 255),
    EXIF orientation is applied. A file cut short, or a JPEG whose data break off or make no sense, is refused, where
    OpenCV alone would fill the rest with grey.

    Args:
        data: the whole file.
        name: what to call it in errors.

    Returns:
        ``[height, width, 3]`` uint8, BGR.

    Raises:
        DataError: not an image, cut short, damaged, or of a sample type other than 8 or 16 bit.
    """
    if not data:
        raise DataError(f"{name}: the file is empty")
    if _cut_short(data):
        raise DataError(f"{name}: the image file is cut short")
    if _is_bomb(data):
        raise DataError(f"{name}: not an image that can be decoded (it claims to be far larger than its file can hold)")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as exc:
        raise DataError(f"{name}: not an image that can be decoded ({exc.err})") from exc
    if image is None:
        raise DataError(f"{name}: not an image that can be decoded")
    damage = _jpeg_damage(data)
    if damage is not None:
        raise DataError(f"{name}: the image file is damaged ({damage})")
    if image.dtype == np.uint16:
        return np.asarray((image.astype(np.float32) / 257.0).round(), dtype=np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{name}: expected 8 or 16 bit samples, got {image.dtype}")
    return np.asarray(image, dtype=np.uint8)


def read_image(path: Path) -> ImageU8:
    """Read an image file to BGR; see :func:`decode_image`.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror})") from exc
    return decode_image(data, str(path))


def read_mask(path: Path) -> ImageU8:
    """Read a defect mask: ``[height, width]`` uint8, 0 where good, 255 where any channel is above zero.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    return np.where(read_image(path).max(axis=2) > 0, 255, 0).astype(np.uint8)


def shrink(image: ImageU8, max_side: int) -> ImageU8:
    """``[height, width, 3]`` with no side longer than ``max_side`` pixels; smaller images as they are."""
    factor = max_side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def write_image(path: Path, image: ImageU8) -> None:
    """Write an image in the format of the path's suffix, whole or not at all.

    Raises:
        StorageError: it cannot be encoded or written.
    """
    encoded, data = cv2.imencode(path.suffix, image)
    if not encoded:
        raise StorageError(f"{path}: cannot encode an image as {path.suffix}")
    atomic_write(path, data.data, durable=False)


def _is_bomb(data: bytes) -> bool:
    # OpenCV allocates what a PNG's header and its chunks claim before it looks for their bytes. Deflate packs 1032:1
    # at best; a binary mask packs eight pixels into a byte on top of that, so what is small anyway is left alone.
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    if width * height > max(1 << 23, 1032 * len(data)):
        return True
    position = 8
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return position > len(data)


def _jpeg_damage(data: bytes) -> str | None:
    """What libjpeg has to say about a JPEG that OpenCV decodes and keeps silent about; None if nothing.

    Measured on a generated board of 512x512: of 300 copies with 4 kB of zeros in them all are found, of those with 64
    bytes of noise 61%; in progressive JPEGs fewer. At an eighth of the size it takes a fifth of the decoder's time.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        simplejpeg.decode_jpeg(
            data, colorspace="GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8
        )
    except ValueError as exc:
        said = str(exc)
        padding = re.fullmatch(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", said)
        if padding is not None and int(padding[1]) <= MAX_PADDING:
            return None
        # Anything else is of a kind that this decoder does not know, and OpenCV does.
        return said if said.startswith(("Corrupt JPEG data", "Premature end")) else None
    return None


def _cut_short(data: bytes) -> bool:
    # Some cameras pad a JPEG after its end marker, so the marker is looked for in the last kilobytes.
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-4096:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-4096:]
    if data.startswith(b"BM") and len(data) >= 6:
        return int.from_bytes(data[2:6], "little") > len(data)
    return False
