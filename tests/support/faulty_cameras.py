"""Cameras that misbehave as real ones do; each runs in a child process, as a camera does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge.sources.child import Remark, TakenImage, taken_image
from edgeflame.errors import DataError, MissingDependencyError
from edgeflame.images import ImageU8


def pixels(number: int, height: int = 48, width: int = 64) -> ImageU8:
    """A picture with its number in every pixel, so that a mixture of two would show."""
    return np.full((height, width, 3), number % 251, np.uint8)


def image(number: int, height: int = 48, width: int = 64) -> TakenImage:
    """The picture of a number, taken now."""
    return taken_image(pixels(number, height, width))


def works(_stop: threading.Event) -> Iterator[TakenImage]:
    for number in range(20):
        yield image(number)
        time.sleep(0.02)


def fast(_stop: threading.Event) -> Iterator[TakenImage]:
    for number in range(100_000):
        yield image(number, 480, 640)


def hangs(_stop: threading.Event) -> Iterator[TakenImage]:
    """As a driver does in an ioctl: it neither returns nor can be interrupted."""
    yield image(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    time.sleep(3600)


def crashes(_stop: threading.Event) -> Iterator[TakenImage]:
    yield image(1)
    os.kill(os.getpid(), signal.SIGSEGV)


def changes_size(_stop: threading.Event) -> Iterator[TakenImage]:
    for number in range(1, 4):
        yield image(number, 48 * number, 64)
        time.sleep(0.2)
    time.sleep(3600)


def is_not_there(_stop: threading.Event) -> Iterator[TakenImage]:
    raise DataError("camera:7: no such camera")
    yield


def bursts(go: Path, written: Path, _stop: threading.Event) -> Iterator[TakenImage]:
    """One image; once ``go`` is there, thirty at once, then ``written`` is there, and nothing more comes."""
    yield image(0)
    while not go.exists():
        time.sleep(0.01)
    for number in range(1, 31):
        yield image(number)
    written.touch()
    time.sleep(3600)


def stamps(_stop: threading.Event) -> Iterator[TakenImage | Remark]:
    """As a driver does that stamps its pictures: half a second ago; a minute ago, which cannot be; in the future."""
    yield Remark(text="the camera gives otherwise than asked: width 640 instead of 1280")
    for age_s in (0.5, 60.0, -60.0):
        yield taken_image(pixels(0), stamp_s=time.monotonic() - age_s)
    time.sleep(3600)


def is_not_installed(_stop: threading.Event) -> Iterator[TakenImage]:
    raise MissingDependencyError("its driver is missing: apt install driver")
    yield
