"""Frames of cameras and streams: read in a child process, found again after an outage."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from edge.sources.interface import Frame, make_frame
from edge.sources.isolated import STALL_TIMEOUT_S, Overwritten, read_in_child
from edge.sources.reconnect import Lost, reconnecting
from edge.sources.taken import ReadImages

OVERWRITTEN = "overwritten"
"""Why a frame was dropped: the camera's process wrote over it in the ring before it was read."""


def live_frames(
    name: str, read: ReadImages, stop: threading.Event, *, stall_timeout_s: float = STALL_TIMEOUT_S
) -> Iterator[Frame]:
    """A camera's frames. Each outage gives one frame without an image: parts may pass unseen, and that is said.

    Args:
        name: of the camera, without passwords.
        read: opens it and yields its images; runs in a child process.
        stop: ends it.
        stall_timeout_s: without an image for so long the camera is taken for hung.

    Raises:
        DataError: it cannot be opened the first time.
    """
    images = reconnecting(name, lambda event: read_in_child(read, name, event, stall_timeout_s=stall_timeout_s), stop)
    number = missed = 0
    for taken in images:
        if isinstance(taken, Overwritten):
            missed += 1
            continue
        lost = {OVERWRITTEN: missed} if missed else {}
        number, missed = number + missed, 0
        part_id = f"frame-{number:06d}"
        number += 1
        if isinstance(taken, Lost):
            yield make_frame(part_id=part_id, source=name, error=f"parts may pass unseen: {taken.reason}", missed=lost)
        else:
            yield make_frame(
                part_id=part_id,
                source=name,
                image_bgr=taken.image,
                captured_monotonic_s=taken.monotonic_s,
                captured_utc=taken.utc,
                missed=lost,
            )
