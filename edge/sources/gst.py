"""GStreamer pipelines: CSI cameras of a Jetson, industrial cameras, and whatever else has an element for it.

The pipeline runs in :mod:`edge.sources.gst_child` under a Python that has GStreamer's bindings; the capture's child
process reads its images from a pipe and treats it like any other camera.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edge.sources import gst_child
from edge.sources.interface import Frame
from edge.sources.live import live_frames
from edge.sources.query import Query
from edge.sources.taken import TakenImage, take
from edgeflame.errors import DataError, MissingDependencyError, UsageError
from edgeflame.images import ImageU8

SYSTEM_PYTHON = Path("/usr/bin/python3")
"""Debian, Ubuntu and JetPack put GStreamer's bindings there."""

CSI_SYNTAX = "csi:0?width=1920&height=1080&fps=30&flip=0"

_SECRETS = re.compile(r"((?:user-pw|user-id|password|passphrase|key)\s*=\s*)(\"[^\"]*\"|\S+)", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(://)[^/\s@]+@")


@dataclass(frozen=True, kw_only=True)
class GstSource:
    """Images of a GStreamer pipeline; one that ends or breaks is started again."""

    name: str
    """Without passwords."""
    pipeline: str
    """In the words of ``gst-launch-1.0``, without a sink."""
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[TakenImage]:
        """Images, in the process that calls; see :data:`edge.sources.taken.ReadImages`."""
        command = [_python(), "-I", gst_child.__file__, self.pipeline]
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as exc:
            raise _missing(f"{command[0]} cannot be run: {exc.strerror}") from exc
        assert child.stdout is not None
        try:
            while not stop.is_set():
                yield self._next(child.stdout)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()

    def _next(self, stream: IO[bytes]) -> TakenImage:
        header = stream.read(gst_child.HEADER.size)
        if len(header) < gst_child.HEADER.size:
            msg = f"{self.name}: the process that runs the pipeline died"
            raise DataError(msg)
        kind, width, height, row_bytes, taken_ns, num_bytes = gst_child.HEADER.unpack(header)
        payload = stream.read(num_bytes)
        match kind:
            case gst_child.IMAGE if len(payload) == num_bytes:
                return take(_image(payload, width, height, row_bytes), stamp_s=taken_ns / 1e9)
            case gst_child.FAILED:
                msg = f"{self.name}: {_plain(payload)}"
            case gst_child.MISSING:
                raise _missing(_plain(payload))
            case _:
                msg = f"{self.name}: the pipeline ended"
        raise DataError(msg)


def gst_source(address: str) -> GstSource:
    """Read ``gst:PIPELINE``.

    Raises:
        UsageError: there is no pipeline.
    """
    pipeline = address.removeprefix("gst:").strip(" !")
    if not pipeline:
        msg = "--source gst: expected a GStreamer pipeline without its sink, for instance gst:v4l2src ! jpegdec"
        raise UsageError(msg)
    return GstSource(name=f"gst:{_without_secrets(pipeline)}", pipeline=pipeline)


def csi_source(address: str) -> GstSource:
    """Read ``csi:0?width=1920&height=1080&fps=30``: a camera on a Jetson's CSI port, by NVIDIA's own element.

    Raises:
        UsageError: it is not of that form, or a value is out of its range.
    """
    sensor, _, text = address.removeprefix("csi:").partition("?")
    query = Query(address, text, known=("width", "height", "fps", "flip"), syntax=CSI_SYNTAX)
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
    # GStreamer fills rows up to four bytes.
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
    return _without_secrets(" ".join(payload.decode("utf-8", "replace").split()))


def _without_secrets(text: str) -> str:
    return _USER_IN_URL.sub(r"\1***@", _SECRETS.sub(r"\1***", text))
