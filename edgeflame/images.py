"""Reading photographs, and the one pre-processing that training, evaluation and the line share.

What the trainer saw is what the line sees: every image, from whatever source, goes through
:meth:`Preprocessing.apply` and nothing else; colour order and normalisation are inside the exported graph.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgeflame.bounds import Pixel, Side
from edgeflame.errors import ConfigError, DataError, StorageError
from edgeflame.image_files import ImageFile, jpeg_damage, look_through, other_format
from edgeflame.state import atomic_write

ImageU8 = npt.NDArray[np.uint8]
ImageU16 = npt.NDArray[np.uint16]
Samples = TypeVar("Samples", ImageU8, ImageU16, ImageU8 | ImageU16)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

OTHER_SUFFIXES = frozenset(
    (
        *(".avif", ".exr", ".gif", ".hdr", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpx", ".jxl", ".psd"),
        *(".pam", ".pbm", ".pgm", ".pnm", ".ppm", ".tga"),
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
    )
)
"""Suffixes of pictures of other formats. They are listed with the images, so that none is left out in silence; what is
in them decides whether they can be read."""

LISTED_SUFFIXES = IMAGE_SUFFIXES | OTHER_SUFFIXES

MAX_INPUT_SIDE = 4096
"""Largest model input side; larger ones are a mistake, not a camera (256 is the default)."""

MAX_MEGAPIXELS = 100.0
MAX_PIXELS = int(MAX_MEGAPIXELS * 1e6)
"""Largest picture that is decoded unless a setting allows more: 300 MB of memory, and more than nearly all cameras."""

LITTLE_USED = 1 / 8
"""Share of the range of samples below which they are probably of fewer bits than their file has."""

if "OPENCV_LOG_LEVEL" not in os.environ:
    # What it has to say of a file is said by our errors; its own lines would stand among the verdicts.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rectangle in pixels of the camera frame: the region of interest that is cropped before resizing."""

    x: Pixel
    """Its left edge."""
    y: Pixel
    """Its upper edge."""
    width: Side
    """Its width."""
    height: Side
    """Its height."""

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
        try:
            return msgspec.convert({"x": x, "y": y, "width": width, "height": height}, cls)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"region of interest must have x, y >= 0 and width, height >= 1, not {text!r}") from exc


Resize = Literal["area", "halving"]

InputSide = Annotated[int, msgspec.Meta(ge=32, le=MAX_INPUT_SIDE, multiple_of=32)]
"""A side of a model's input."""


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From a camera frame to the model's input: crop to the region of interest, make 8 bits of more, resize."""

    height: InputSide = 256
    """Of the model's input, pixels."""
    width: InputSide = 256
    """Of the model's input, pixels."""
    roi: Region | None = None
    resize: Resize | msgspec.UnsetType = msgspec.UNSET
    """``area``: OpenCV's ``INTER_AREA``. ``halving``, the default preset's: nearly the same values in a third to a
    sixth of the time; see :func:`halved`. Packages of earlier versions have no such key, and are resized by area."""
    bits: Annotated[int, Meta(ge=8, le=16)] | msgspec.UnsetType = msgspec.UNSET
    """Bits of the samples in files of 16 bits: 10 or 12 for what cameras call Mono10 and Mono12; their range is what
    the model sees. Unset: 16. Left out of what is written where it is not set, as is ``max_megapixels``."""
    max_megapixels: Annotated[float, Meta(gt=0, le=1000)] | msgspec.UnsetType = msgspec.UNSET
    """Largest photograph that is decoded, in millions of pixels; one that claims more is unreadable. Unset: 100. A line
    has its own (``capture.max_megapixels``)."""

    @property
    def resized_by(self) -> Resize:
        """How a frame is resized; by area where nothing is said."""
        return "area" if self.resize is msgspec.UNSET else self.resize

    @property
    def sample_bits(self) -> int:
        """Bits of the samples in files of 16 bits."""
        return 16 if self.bits is msgspec.UNSET else self.bits

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest photograph that is decoded."""
        return MAX_PIXELS if self.max_megapixels is msgspec.UNSET else int(self.max_megapixels * 1e6)

    def without_roi(self) -> Preprocessing:
        """The same for pictures that were cropped to the region of interest before."""
        return self if self.roi is None else msgspec.structs.replace(self, roi=None)

    def read(self, path: Path) -> ImageU8 | ImageU16:
        """Read a photograph as :meth:`apply` and :meth:`picture` take it; see :func:`read_samples`."""
        return read_samples(path, max_pixels=self.max_pixels)

    def picture(self, frame: ImageU8 | ImageU16) -> ImageU8:
        """The region of interest at the frame's resolution, for people to look at.

        Raises:
            DataError: the region reaches outside the frame, or samples have more than ``bits``.
        """
        return to_8_bit(self.crop(frame), self.sample_bits)

    def crop(self, frame: Samples) -> Samples:
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

    def apply(self, frame: ImageU8 | ImageU16) -> ImageU8:
        """Crop, bring to 8 bits (``bits``) and resize (``resize``) a BGR frame.

        Args:
            frame: ``[frame_height, frame_width, 3]`` uint8 or uint16, BGR.

        Returns:
            ``[height, width, 3]`` uint8, BGR, contiguous.

        Raises:
            DataError: wrong shape or type, the region of interest does not fit, or samples have more than ``bits``.
        """
        if frame.dtype not in (np.uint8, np.uint16) or frame.ndim != 3 or frame.shape[2] != 3:
            raise DataError(f"expected a uint8 BGR frame [height, width, 3], got {frame.dtype} {list(frame.shape)}")
        cropped = to_8_bit(self.crop(frame), self.sample_bits)
        if cropped.shape[:2] == (self.height, self.width):
            return np.ascontiguousarray(cropped)
        if self.resized_by == "halving":
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


def to_8_bit(image: ImageU8 | ImageU16, bits: int = 16) -> ImageU8:
    """Samples of 16 bits scaled by the range of ``bits``, so that its end becomes 255; of 8 bits as they are.

    Raises:
        DataError: a sample is beyond that range.
    """
    if image.dtype == np.uint8:
        return np.asarray(image, dtype=np.uint8)
    most = (1 << bits) - 1
    largest = int(image.max(initial=0)) if bits < 16 else 0
    if largest > most:
        raise DataError(f"samples reach {largest}, more than input.bits = {bits} can hold (0..{most})")
    return np.asarray(cv2.convertScaleAbs(image, alpha=255 / most), dtype=np.uint8)


def share_of_range(image: ImageU8 | ImageU16, bits: int = 16) -> float:
    """The largest sample as a share of the range: of 8 bits, or of ``bits`` where the samples have 16."""
    return float(image.max(initial=0)) / (255 if image.dtype == np.uint8 else (1 << bits) - 1)


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> ImageU8:
    """Decode a complete image file to BGR of 8 bits; 16 bits are scaled by their full range. See `decode_samples`."""
    return to_8_bit(decode_samples(data, name, max_pixels=max_pixels))


def decode_samples(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> ImageU8 | ImageU16:
    """Decode a complete image file to BGR, with samples as they are.

    Grey becomes three equal channels, alpha is dropped, EXIF orientation is applied. A file that is cut short, or whose
    data are damaged as far as anything tells, is refused, where OpenCV alone would fill the rest with grey; so is one
    that is too large, before it is decoded.

    Args:
        data: the whole file.
        name: what to call it in errors.
        max_pixels: width times height of the largest picture that is decoded.

    Returns:
        ``[height, width, 3]`` uint8 or uint16, BGR.

    Raises:
        DataError: not an image, cut short, damaged, too large, or of a sample type other than 8 or 16 bit.
    """
    _require_sound(data, name, max_pixels)
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as exc:
        raise DataError(f"{name}: not an image that can be decoded ({exc.err})") from exc
    if image is None:
        raise DataError(f"{name}: not an image that can be decoded")
    if image.dtype == np.uint16:
        return np.asarray(image, dtype=np.uint16)
    if image.dtype != np.uint8:
        raise DataError(f"{name}: expected 8 or 16 bit samples, got {image.dtype}")
    return np.asarray(image, dtype=np.uint8)


def printable_name(name: str) -> str:
    """A file's name for display: bytes that are not UTF-8, and control characters, as hexadecimal escapes."""
    if name.isprintable():
        return name
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> ImageU8:
    """Read an image file to BGR of 8 bits; see :func:`decode_image`.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    return to_8_bit(read_samples(path, max_pixels=max_pixels))


def read_samples(path: Path, *, max_pixels: int = MAX_PIXELS) -> ImageU8 | ImageU16:
    """Read an image file to BGR with samples as they are; see :func:`decode_samples`.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    try:
        # A pipe or a device would be waited for, or read without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{printable_name(str(path))}: cannot be read (not a regular file)")
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{printable_name(str(path))}: cannot be read ({exc.strerror})") from exc
    return decode_samples(data, printable_name(str(path)), max_pixels=max_pixels)


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> ImageU8:
    """Read a defect mask: ``[height, width]`` uint8, 0 where good, 255 where any channel is above zero.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    return np.where(read_samples(path, max_pixels=max_pixels).max(axis=2) > 0, 255, 0).astype(np.uint8)


def shrink(image: ImageU8, max_side: int) -> ImageU8:
    """``[height, width, 3]`` with no side longer than ``max_side`` pixels; smaller images as they are."""
    factor = max_side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def write_image(path: Path, image: ImageU8 | ImageU16) -> None:
    """Write an image in the format of the path's suffix, whole or not at all.

    Raises:
        StorageError: it cannot be encoded or written.
    """
    encoded, data = cv2.imencode(path.suffix, image)
    if not encoded:
        raise StorageError(f"{path}: cannot encode an image as {path.suffix}")
    atomic_write(path, data.data, durable=False)


def _require_sound(data: bytes, name: str, max_pixels: int) -> None:
    """Refuse what must not be decoded, or would be without a word about what is missing."""
    if not data:
        raise DataError(f"{name}: the file is empty")
    file = look_through(data)
    if file is None:
        other = other_format(data)
        said = "" if other is None else f": {other} is not read, only JPEG, PNG, BMP, TIFF and WebP"
        raise DataError(f"{name}: not an image that can be decoded{said}")
    largest = max(file.width * file.height, 0 if file.tiff is None else file.tiff.piece_pixels)
    if largest > max_pixels:
        raise DataError(
            f"{name}: {file.width}x{file.height} pixels are more than the {max_pixels / 1e6:g} megapixels that may be "
            "decoded (max_megapixels)"
        )
    if file.num_pictures > 1:
        raise DataError(f"{name}: the file has {file.num_pictures} pictures; one is wanted")
    if file.is_cut_short:
        raise DataError(f"{name}: the image file is cut short")
    if file.tiff is not None and file.tiff.is_float:
        raise DataError(f"{name}: expected 8 or 16 bit samples, got float{file.tiff.bits}")
    damage = _damage(data, file)
    if damage is not None:
        raise DataError(f"{name}: the image file is damaged ({damage})")


def _damage(data: bytes, file: ImageFile) -> str | None:
    if file.damage is not None or file.tiff is None:
        return file.damage or jpeg_damage(data)
    return file.tiff.damage(data) or next(filter(None, map(jpeg_damage, file.tiff.jpegs(data))), None)
