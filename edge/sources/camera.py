"""USB cameras, through OpenCV, whose drivers may hang: read in a process of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from edge.sources.interface import Frame
from edge.sources.live import live_frames
from edgeflame.errors import DataError
from edgeflame.images import ImageU8


@dataclass(frozen=True, kw_only=True)
class CameraSource:
    """The camera ``/dev/video<index>``. One that is unplugged is waited for."""

    index: int
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    @property
    def name(self) -> str:
        return f"camera:{self.index}"

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[ImageU8]:
        """Images, in the process that calls; see :data:`edge.sources.isolated.ReadImages`."""
        device = Path(f"/dev/video{self.index}")
        # OpenCV would try every driver it has and print a warning of each.
        if sys.platform == "linux" and not device.exists():
            msg = f"{self.name}: no such camera (looked for {device})"
            raise DataError(msg)
        capture = cv2.VideoCapture(self.index)
        try:
            if not capture.isOpened():
                msg = f"{self.name}: the camera cannot be opened; is it in use, or may only another user read {device}?"
                raise DataError(msg)
            # The newest picture, not the oldest the driver still holds; not every driver obeys.
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            while not stop.is_set():
                received, image = capture.read()
                if not received or image is None:
                    msg = f"{self.name}: the camera gave no picture"
                    raise DataError(msg)
                yield np.asarray(image, dtype=np.uint8)
        finally:
            capture.release()
