"""What reading a camera gives: its images with the time of their taking, and what it did otherwise than asked."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgeflame.images import ImageU8

OLDEST_STAMP_S = 10.0
"""A driver's time stamp older than this is no time stamp: a camera silent for so long is taken for hung."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TakenImage:
    """An image and when it was taken."""

    image: ImageU8
    monotonic_s: float
    """On this machine's monotonic clock, as all processes on it share."""
    utc: dt.datetime


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something about a camera that its operator should know; goes to the log."""

    text: str


ReadImages = Callable[[threading.Event], Iterator["TakenImage | Remark"]]
"""Opens a camera and yields its images; raises DataError when it cannot, or when they end."""


def take(image: ImageU8, *, stamp_s: float | None = None) -> TakenImage:
    """An image that was taken at ``stamp_s`` of the monotonic clock; now, where that is not known or cannot be."""
    now_s, utc = time.monotonic(), dt.datetime.now(dt.timezone.utc)
    if stamp_s is None or not 0 <= now_s - stamp_s <= OLDEST_STAMP_S:
        return TakenImage(image=image, monotonic_s=now_s, utc=utc)
    return TakenImage(image=image, monotonic_s=stamp_s, utc=utc - dt.timedelta(seconds=now_s - stamp_s))
