"""Video files and RTSP cameras, read with PyAV, which has time-outs where OpenCV's capture can hang.

What FFmpeg's decoders cannot read they make up, and say so in their log only; so that is read, line by line, beside the
packets and pictures that it is about (:mod:`edge.sources.damage`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.frame import Frame, make_frame
from edge.sources.child import TakenImage, live_frames, taken_image
from edge.sources.damage import LOST, UNDECODED, StreamDamage
from edgeflame.errors import DataError, require_extra
from edgeflame.images import ImageU8, printable_name
from edgeflame.masking import without_secrets

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0

_TELLING = (
    "Frame num gap",
    "Skipping invalid undecodable NALU",
    "EOI missing",
    "concealing",
    "overread",
    "RTP: missed",
)
"""Beginnings of lines below the level of errors that tell of a picture that is lost or damaged."""

_ERROR = 16  # AV_LOG_ERROR, <libavutil/log.h>; what is worse is less

_HARMLESS = ("SEI type",)
"""Beginnings of errors that are about no picture: what some cameras add to theirs is not read."""

_MAX_COMPLAINT = 120  # characters; one line of a result

_ONE_PICTURE_A_PACKET = frozenset(
    {"av1", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "mpeg2video", "mpeg4", "vp8", "vp9"}
)
"""Codecs whose packets each give one picture, if it is not interlaced, but for those of :func:`_shows_nothing`."""
_MAX_NOT_CODED_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class VideoFileSource:
    """A video file, each frame of which is a part. A damaged stretch gives frames with an error, then the rest.

    Lost pictures are counted, and leave a gap in the part ids.
    """

    path: Path
    is_live: bool = False
    is_endless: bool = False
    num_frames: int | None = None

    @property
    def name(self) -> str:
        return printable_name(str(self.path))

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        av = _import_av()
        number = 0
        for picture in _decode(av, str(self.path), self.name, stop, timeout=None, options={}):
            number += picture.num_lost
            yield make_frame(
                part_id=f"frame-{number:06d}",
                source=self.name,
                image_bgr=picture.image,
                error=picture.error,
                missed={LOST: picture.num_lost} if picture.num_lost else {},
            )
            number += 1
        if number == 0 and not stop.is_set():
            raise DataError(f"{self.name}: no video frame in it")


@dataclass(frozen=True, kw_only=True)
class RtspSource:
    """A network camera, decoded in a process of its own."""

    url: str
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    @property
    def name(self) -> str:
        return without_secrets(self.url)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        # A missing library is reported at once; it is not an outage.
        _import_av()
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[TakenImage]:
        """Yield images, in the calling process; see :data:`edge.sources.child.ReadImages`."""
        decoded = _decode(
            _import_av(),
            self.url,
            self.name,
            stop,
            timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
            # Over UDP a lost packet smears the picture, and a smear looks like a defect.
            options={"rtsp_transport": "tcp", "fflags": "nobuffer"},
        )
        for picture in decoded:
            yield taken_image(picture.image, error=picture.error, num_lost=picture.num_lost, stamp_s=picture.arrived_s)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Picture:
    image: ImageU8 | None
    """BGR; None with an ``error``."""
    error: str | None = None
    arrived_s: float | None = None
    """The monotonic time at which its packet arrived; None: not known."""
    num_lost: int = 0
    """Number of pictures that are missing before it."""


def _decode(
    av: ModuleType,
    address: str,
    name: str,
    stop: threading.Event,
    *,
    timeout: tuple[float, float] | None,
    options: dict[str, str],
) -> Iterator[_Picture]:
    """Yield decoded pictures, or an error in place of one.

    Raises:
        DataError: the video cannot be opened, or reading fails.
    """
    failures = (av.error.FFmpegError, OSError, ValueError)
    # The gaps in the numbers of frames are told at this level only.
    av.logging.set_level(av.logging.DEBUG)
    is_live = timeout is not None
    try:
        with av.logging.Capture():
            container = av.open(address, timeout=timeout, options=options)
    except failures as exc:
        raise DataError(f"{name}: cannot be opened as video ({_reason(exc)})") from exc
    with container:
        if not container.streams.video:
            raise DataError(f"{name}: no video stream in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f"{name}: the video's codec is not known here, or the file is cut short")
        # One thread. Several that decode a frame each hold back as many frames, and do not say what is wrong with
        # which; several for the slices of a frame do not notice that one is missing.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"flags": "+copy_opaque+low_delay" if is_live else "+copy_opaque"}
        packets = container.demux(stream)
        damage = StreamDamage()
        while not stop.is_set():
            with av.logging.Capture() as lines:
                try:
                    packet = next(packets, None)
                except failures as exc:
                    raise DataError(f"{name}: reading failed ({_reason(exc)})") from exc
                if packet is None:
                    return
                pictures = list(_pictures(packet, damage, lines, name, failures))
            yield from pictures


def _pictures(
    packet: Any,
    damage: StreamDamage,
    lines: Sequence[tuple[int, str, str]],
    name: str,
    failures: tuple[type[Exception], ...],
) -> Iterator[_Picture]:
    """The pictures that come out of the decoder when a packet goes into it; those before it, in most videos."""
    is_last = packet.dts is None and packet.pts is None and not packet.size
    arrived_s = time.monotonic()
    if not is_last:
        decoded_at = packet.pts if packet.dts is None else packet.dts
        number = damage.add_packet(
            decoded_at, shown=packet.pts, is_key=packet.is_keyframe, gives_picture=not _shows_nothing(packet)
        )
        packet.opaque = (number, arrived_s)
        if packet.is_corrupt:
            damage.complain("a part of it did not arrive")
        if _has_hole(packet):
            damage.complain("there is a hole in its data")
    frames = []
    try:
        frames = packet.decode()
    except failures as exc:
        error = f"a picture cannot be decoded ({_reason(exc)})"
        damage.fail_packet(error)
        yield _Picture(image=None, error=f"{name}: {error}", arrived_s=arrived_s)
    complaint = _complaint(lines)
    if complaint is not None:
        damage.complain(complaint)
    for frame in frames:
        shown, shown_arrived_s = frame.opaque or (None, None)
        state = damage.take_picture(shown, is_key=bool(frame.key_frame))
        if _gives_each_packet(packet, frame):
            yield from _undecoded(state.num_undecoded, name)
        wrong = state.damage or ("the video is damaged: the decoder says so" if frame.is_corrupt else None)
        yield _Picture(
            image=_to_bgr(frame) if wrong is None else None,
            error=None if wrong is None else f"{name}: {wrong}",
            arrived_s=shown_arrived_s,
            num_lost=state.num_lost,
        )
    if is_last and packet.stream.codec_context.name in _ONE_PICTURE_A_PACKET:
        yield from _undecoded(damage.end(), name)


def _has_hole(packet: Any) -> bool:
    """Whether a packet of H.264 or H.265 has zeros in it that no encoder writes, and H.265's decoder takes for data.

    Their data never have three zeros in a row. Units that follow each other have their length in front, with three
    zeros at most; where they have start codes instead, as in transport streams, there may be any number of them.
    """
    context = packet.stream.codec_context
    has_lengths = context.name in ("h264", "hevc") and bytes(context.extradata or b"")[:1] == b"\1"
    return has_lengths and bytes(4) in bytes(packet)


def _shows_nothing(packet: Any) -> bool:
    """Whether a packet is one that is not to be shown: VP8 says so in its head (RFC 6386, 9.1); of MPEG-4, where the
    picture is the one before it, there is a head only.
    """
    codec = packet.stream.codec_context.name
    return (codec == "mpeg4" and packet.size <= _MAX_NOT_CODED_BYTES) or (
        codec == "vp8" and bool(packet.size) and not bytes(packet)[0] & 0x10
    )


def _gives_each_packet(packet: Any, frame: Any) -> bool:
    return packet.stream.codec_context.name in _ONE_PICTURE_A_PACKET and not frame.interlaced_frame


def _undecoded(count: int, name: str) -> Iterator[_Picture]:
    for _ in range(count):
        yield _Picture(image=None, error=f"{name}: {UNDECODED}")


def _complaint(lines: Sequence[tuple[int, str, str]]) -> str | None:
    """The first of the log lines that tells of a picture that is lost or damaged; None: there is none."""
    for level, _, text in lines:
        if text.startswith(_TELLING) or (level <= _ERROR and not text.startswith(_HARMLESS)):
            return without_secrets("".join(filter(str.isprintable, " ".join(text.split()))))[:_MAX_COMPLAINT]
    return None


def _to_bgr(frame: Any) -> ImageU8:
    """The picture as it is to be shown: cameras and phones write down how they were held, and turn nothing."""
    image = np.asarray(frame.to_ndarray(format="bgr24"), dtype=np.uint8)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return image if matrix is None else _upright(image, np.frombuffer(bytes(matrix), np.int32))


def _upright(image: ImageU8, matrix: npt.NDArray[np.int32]) -> ImageU8:
    """Turn and mirror ``[height, width, 3]`` by quarters, by ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y."""
    a, b, _, c, d = matrix[:5].tolist()
    if abs(b) > abs(a):
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _reason(error: BaseException) -> str:
    # FFmpeg's message repeats the address, password included.
    return getattr(error, "strerror", None) or type(error).__name__


def _import_av() -> ModuleType:
    with require_extra("video", "reading video needs PyAV"):
        import av
    libav = logging.getLogger("libav")
    if libav.propagate:
        # Its lines are read where they tell something; elsewhere they are not shown: addresses may be among them.
        libav.propagate = False
        libav.addHandler(logging.NullHandler())
    module: ModuleType = av
    return module
