"""Local cameras: USB by OpenCV's V4L2, CSI and industrial ones by GStreamer pipelines.

Their drivers may hang, so they are read in a process of their own (:mod:`edge.sources.child`).

USB
---
A camera is named by its number or by its path, for instance ``/dev/v4l/by-id/usb-...-index0``, which stays the same
when it is plugged in again and another camera has taken its number. The address's options are set in the driver;
drivers round values and ignore what they do not have, so they are read back and compared.

GStreamer
---------
The pipeline runs in :mod:`edge.sources.gst_child` under a Python that has GStreamer's bindings; the capture's child
process reads its images from a pipe and treats it like any other camera.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import cv2
import numpy as np

from edge.frame import Frame
from edge.sources import gst_child
from edge.sources.address import AddressQuery
from edge.sources.child import Remark, TakenImage, live_frames, taken_image
from edge.sources.damage import UNDECODED, PipelineDamage
from edgeflame.errors import DataError, MissingDependencyError, UsageError
from edgeflame.images import ImageU8
from edgeflame.masking import without_secrets

SYNTAX = (
    "camera:0 or camera:/dev/v4l/by-id/NAME, with ?width=1280&height=960&fps=30&pixel_format=MJPG&exposure=156&gain=0"
    "&white_balance=4600&focus=0"
)

_BY_ID = Path("/dev/v4l/by-id")

_MANUAL_EXPOSURE, _AUTO_EXPOSURE = 1.0, 3.0
"""V4L2_EXPOSURE_MANUAL and V4L2_EXPOSURE_APERTURE_PRIORITY, <linux/v4l2-controls.h>."""

_TOLERANCE = 0.01
"""Relative difference of a setting that is not reported: drivers may give 30.00003 for 30 frames a second."""


@dataclass(frozen=True, kw_only=True)
class CameraSettings:
    """Settings of a camera; None leaves a setting as the driver has it.

    Attributes:
        width, height: in pixels.
        fps: frames a second.
        pixel_format: four characters of V4L2, for instance ``MJPG`` or ``YUYV``.
        exposure: in the driver's unit, for USB cameras 100 µs; 0: automatic.
        gain: in the driver's unit.
        white_balance: in kelvin; 0: automatic.
        focus: in the driver's unit; automatic focus is switched off then.
    """

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    pixel_format: str | None = None
    exposure: float | None = None
    gain: float | None = None
    white_balance: float | None = None
    focus: float | None = None

    def requests(self) -> Iterator[tuple[str, int, float]]:
        """Name, OpenCV's property and value of each setting, in the order in which drivers need them."""
        # The pixel format first: the available sizes and rates depend on it.
        if self.pixel_format is not None:
            yield "pixel_format", cv2.CAP_PROP_FOURCC, float(cv2.VideoWriter.fourcc(*self.pixel_format))
        if self.width is not None and self.height is not None:
            yield "width", cv2.CAP_PROP_FRAME_WIDTH, self.width
            yield "height", cv2.CAP_PROP_FRAME_HEIGHT, self.height
        if self.fps is not None:
            yield "fps", cv2.CAP_PROP_FPS, self.fps
        if self.exposure is not None:
            mode = _MANUAL_EXPOSURE if self.exposure else _AUTO_EXPOSURE
            yield "auto_exposure", cv2.CAP_PROP_AUTO_EXPOSURE, mode
            if self.exposure:
                yield "exposure", cv2.CAP_PROP_EXPOSURE, self.exposure
        if self.gain is not None:
            yield "gain", cv2.CAP_PROP_GAIN, self.gain
        if self.white_balance is not None:
            yield "auto_white_balance", cv2.CAP_PROP_AUTO_WB, 0.0 if self.white_balance else 1.0
            if self.white_balance:
                yield "white_balance", cv2.CAP_PROP_WB_TEMPERATURE, self.white_balance
        if self.focus is not None:
            yield "auto_focus", cv2.CAP_PROP_AUTOFOCUS, 0.0
            yield "focus", cv2.CAP_PROP_FOCUS, self.focus


@dataclass(frozen=True, kw_only=True)
class CameraSource:
    """A V4L2 camera of this machine."""

    device: str
    """Its number or its path."""
    settings: CameraSettings = field(default_factory=CameraSettings)
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    @property
    def name(self) -> str:
        return f"camera:{self.device}"

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[TakenImage | Remark]:
        """Yield images, in the calling process; see :data:`edge.sources.child.ReadImages`."""
        device = Path(f"/dev/video{self.device}" if self.device.isdecimal() else self.device)
        # OpenCV would try every driver it has and print a warning for each.
        if sys.platform == "linux" and not device.exists():
            raise DataError(f"{self.name}: no such camera (looked for {device}; {_others()})")
        # A path by id is a link to the camera's present number.
        capture = cv2.VideoCapture(str(device.resolve()), cv2.CAP_V4L2)
        try:
            if not capture.isOpened():
                raise DataError(
                    f"{self.name}: the camera cannot be opened; is it in use, or may only another user read {device}?"
                )
            # To get the newest picture, not the oldest that the driver holds; not every driver obeys.
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            refused = apply_settings(capture, self.settings)
            if refused:
                yield Remark(text=f"the camera gives otherwise than asked: {', '.join(refused)}")
            while not stop.is_set():
                received, image = capture.read()
                if not received or image is None:
                    raise DataError(f"{self.name}: the camera gave no picture")
                # The driver's own stamp: before the picture was copied and decoded.
                stamp_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
                yield taken_image(np.asarray(image, dtype=np.uint8), stamp_s=stamp_ms / 1000 if stamp_ms > 0 else None)
        finally:
            capture.release()


def apply_settings(capture: cv2.VideoCapture, settings: CameraSettings) -> list[str]:
    """Set a camera's settings; returns in words those that the driver reports differently afterwards."""
    asked = list(settings.requests())
    for _, key, value in asked:
        capture.set(key, value)
    differences = []
    for name, key, value in asked:
        given = capture.get(key)
        if abs(given - value) > _TOLERANCE * max(abs(value), abs(given)):
            differences.append(f"{name} {_show(name, given)} instead of {_show(name, value)}")
    return differences


def camera_source(address: str) -> CameraSource:
    """Read an address such as ``camera:0?width=1280&height=960&fps=30``.

    Raises:
        UsageError: it is not of that form, or a value is out of its range.
    """
    device, _, text = address.removeprefix("camera:").partition("?")
    query = AddressQuery(address, text, known=CameraSettings.__dataclass_fields__, syntax=SYNTAX)
    if not (device.isdecimal() or device.startswith("/")):
        raise query.wrong("a camera is named by its number or its path")
    options: Mapping[str, str] = query.options
    if ("width" in options) != ("height" in options):
        raise query.wrong("width and height belong together")
    pixel_format = options.get("pixel_format")
    if pixel_format is not None and not (len(pixel_format) == 4 and pixel_format.isascii()):
        raise query.wrong(f"pixel_format has four characters, not {pixel_format!r}")

    def number(name: str, least: float, most: float) -> float | None:
        return query.number(name, 0.0, least=least, most=most) if name in options else None

    def pixels(name: str) -> int | None:
        return query.whole_number(name, 0, least=1, most=16384) if name in options else None

    return CameraSource(
        device=device,
        settings=CameraSettings(
            width=pixels("width"),
            height=pixels("height"),
            fps=number("fps", 0.01, 10_000),
            pixel_format=pixel_format,
            exposure=None if options.get("exposure") is None else _exposure(query),
            gain=number("gain", -1e6, 1e6),
            white_balance=number("white_balance", 0, 100_000),
            focus=number("focus", 0, 1e6),
        ),
    )


def _exposure(query: AddressQuery) -> float:
    return 0.0 if query.options["exposure"] == "auto" else query.number("exposure", 0, least=1, most=1e7)


def _show(name: str, value: float) -> str:
    if name == "pixel_format":
        return int(value).to_bytes(4, "little", signed=False).decode("ascii", "replace").strip("\0") or "none"
    return f"{value:g}"


def _others() -> str:
    try:
        found = sorted(path.name for path in _BY_ID.iterdir())
    except OSError:
        found = []
    return f"there are in {_BY_ID}: {', '.join(found)}" if found else "no camera is plugged in"


SYSTEM_PYTHON = Path("/usr/bin/python3")
"""The Python that has GStreamer's bindings on Debian, Ubuntu and JetPack."""

CSI_SYNTAX = "csi:0?width=1920&height=1080&fps=30&flip=0"


@dataclass(frozen=True, kw_only=True)
class GstSource:
    """Images of a GStreamer pipeline; one that ends or fails is started again."""

    name: str
    """Without passwords."""
    pipeline: str
    """Description as for ``gst-launch-1.0``, without a sink."""
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[TakenImage]:
        """Yield images, in the calling process; see :data:`edge.sources.child.ReadImages`."""
        command = [_python(), "-I", gst_child.__file__]
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as exc:
            raise _missing(f"{command[0]} cannot be run: {exc.strerror}") from exc
        assert child.stdin is not None
        assert child.stdout is not None
        # Not as an argument: everybody on the machine can read those, and the pipeline may hold a password.
        with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(self.pipeline.encode())
        try:
            damage = PipelineDamage()
            while not stop.is_set():
                yield from self._next(child.stdout, damage)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()

    def _next(self, stream: IO[bytes], damage: PipelineDamage) -> Iterator[TakenImage]:
        """Read one record: an image, or something about the images that come."""
        header = stream.read(gst_child.HEADER.size)
        if len(header) < gst_child.HEADER.size:
            raise DataError(f"{self.name}: the process that runs the pipeline died")
        kind, width, height, row_bytes, taken_ns, stamp_ns, num_bytes = gst_child.HEADER.unpack(header)
        payload = stream.read(num_bytes)
        stamp = None if stamp_ns == gst_child.NO_TIME else stamp_ns
        match kind:
            case gst_child.IMAGE if len(payload) == num_bytes:
                state = damage.take_image(stamp)
                yield from self._undecoded(state.num_undecoded)
                yield taken_image(
                    None if state.damage else _image(payload, width, height, row_bytes),
                    error=state.damage and f"{self.name}: {state.damage}",
                    num_lost=state.num_lost,
                    stamp_s=taken_ns / 1e9,
                )
                return
            case gst_child.PACKET:
                damage.add_packet(
                    None if taken_ns == gst_child.NO_TIME else taken_ns,
                    stamp,
                    is_key=bool(width & gst_child.KEY),
                    is_after_gap=bool(width & gst_child.AFTER_GAP),
                    is_corrupt=bool(width & gst_child.CORRUPT),
                )
                return
            case gst_child.PICTURE:
                damage.take_picture(stamp, is_corrupt=bool(width & gst_child.CORRUPT))
                return
            case gst_child.FAILED:
                msg = f"{self.name}: {_plain(payload)}"
            case gst_child.MISSING:
                raise _missing(_plain(payload))
            case _:
                yield from self._undecoded(damage.end())
                msg = f"{self.name}: the pipeline ended"
        raise DataError(msg)

    def _undecoded(self, count: int) -> Iterator[TakenImage]:
        for _ in range(count):
            yield taken_image(None, error=f"{self.name}: {UNDECODED}")


def gst_source(address: str) -> GstSource:
    """Read ``gst:PIPELINE``.

    Raises:
        UsageError: there is no pipeline.
    """
    pipeline = address.removeprefix("gst:").strip(" !")
    if not pipeline:
        raise UsageError(
            "--source gst: expected a GStreamer pipeline without its sink, for instance gst:v4l2src ! jpegdec"
        )
    return GstSource(name=f"gst:{without_secrets(pipeline)}", pipeline=pipeline)


def csi_source(address: str) -> GstSource:
    """Read ``csi:0?width=1920&height=1080&fps=30``: a camera on a Jetson's CSI port, by NVIDIA's own element.

    Raises:
        UsageError: it is not of that form, or a value is out of its range.
    """
    sensor, _, text = address.removeprefix("csi:").partition("?")
    query = AddressQuery(address, text, known=("width", "height", "fps", "flip"), syntax=CSI_SYNTAX)
    if not sensor.isdecimal():
        raise query.wrong("a CSI camera is named by its number")
    width = query.whole_number("width", 1920, least=1, most=16384)
    height = query.whole_number("height", 1080, least=1, most=16384)
    fps = query.whole_number("fps", 30, least=1, most=1000)
    flip = query.whole_number("flip", 0, least=0, most=7)
    return GstSource(
        name=f"csi:{sensor}",
        pipeline=(
            f"nvarguscamerasrc sensor-id={sensor} ! "
            f"video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1 ! "
            f"nvvidconv flip-method={flip} ! video/x-raw,format=BGRx"
        ),
    )


def _image(payload: bytes, width: int, height: int, row_bytes: int) -> ImageU8:
    # GStreamer pads rows to a multiple of four bytes.
    rows = np.frombuffer(payload, np.uint8).reshape(height, row_bytes)
    return np.ascontiguousarray(rows[:, : 3 * width]).reshape(height, width, 3)


def _python() -> str:
    return sys.executable if importlib.util.find_spec("gi") else str(SYSTEM_PYTHON)


def _missing(what: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"GStreamer sources need its Python bindings ({what}): "
        "apt install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good"
    )


def _plain(payload: bytes) -> str:
    return without_secrets(" ".join(payload.decode("utf-8", "replace").split()))
