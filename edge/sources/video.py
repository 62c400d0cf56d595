"""Video files and RTSP cameras, read with PyAV, which has time-outs where OpenCV's capture can hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from edge.frame import Frame, make_frame
from edge.sources.child import TakenImage, live_frames, taken_image
from edgeflame.errors import DataError, require_extra
from edgeflame.images import ImageU8
from edgeflame.masking import without_secrets

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0

_MAX_IN_DECODER = 64
"""Number of packets whose time of arrival is kept; no decoder holds back more frames than this."""


@dataclass(frozen=True, kw_only=True)
class VideoFileSource:
    """A video file, each frame of which is a part. A damaged stretch gives frames with an error, then the rest."""

    name: str
    is_live: bool = False
    is_endless: bool = False
    num_frames: int | None = None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        av = _import_av()
        number = 0
        for image, error, _ in _decode(av, self.name, self.name, stop, timeout=None, options={}):
            yield make_frame(part_id=f"frame-{number:06d}", source=self.name, image_bgr=image, error=error)
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
        for image, error, arrived_s in decoded:
            if image is None:
                raise DataError(error)
            yield taken_image(image, stamp_s=arrived_s)


def _decode(
    av: ModuleType,
    address: str,
    name: str,
    stop: threading.Event,
    *,
    timeout: tuple[float, float] | None,
    options: dict[str, str],
) -> Iterator[tuple[ImageU8 | None, str | None, float | None]]:
    """Yield decoded frames (BGR) or an error in place of one, and the monotonic time when the frame's packet arrived.

    Raises:
        DataError: the video cannot be opened, or reading fails.
    """
    failures = (av.error.FFmpegError, OSError, ValueError)
    try:
        container = av.open(address, timeout=timeout, options=options)
    except failures as exc:
        raise DataError(f"{name}: cannot be opened as video ({_reason(exc)})") from exc
    with container:
        if not container.streams.video:
            raise DataError(f"{name}: no video stream in it")
        stream = container.streams.video[0]
        if timeout is None:
            stream.thread_type = "AUTO"
        else:
            # Threads that decode a frame each hold back as many frames as there are threads.
            stream.thread_type = "SLICE"
            stream.codec_context.options = {"flags": "low_delay"}
        arrivals: dict[int | None, float] = {}
        packets = container.demux(stream)
        while not stop.is_set():
            try:
                packet = next(packets, None)
            except failures as exc:
                raise DataError(f"{name}: reading failed ({_reason(exc)})") from exc
            if packet is None:
                return
            if len(arrivals) > _MAX_IN_DECODER:
                arrivals.clear()
            arrivals[packet.pts] = time.monotonic()
            try:
                images = [(_to_bgr(frame), arrivals.pop(frame.pts, None)) for frame in packet.decode()]
            except failures as exc:
                yield None, f"{name}: a frame cannot be decoded ({_reason(exc)})", None
                continue
            for image, arrived_s in images:
                yield image, None, arrived_s


def _to_bgr(frame: Any) -> ImageU8:
    return np.asarray(frame.to_ndarray(format="bgr24"), dtype=np.uint8)


def _reason(error: BaseException) -> str:
    # FFmpeg's message repeats the address, password included.
    return getattr(error, "strerror", None) or type(error).__name__


def _import_av() -> ModuleType:
    with require_extra("video", "reading video needs PyAV"):
        import av
    module: ModuleType = av
    return module
