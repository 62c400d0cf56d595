"""Cameras that misbehave as real ones do; each runs in a child process, as a camera does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np

from edgeflame.errors import DataError
from edgeflame.images import ImageU8


def image(number: int, height: int = 48, width: int = 64) -> ImageU8:
    """Its number is in every pixel: half of one and half of another would show."""
    return np.full((height, width, 3), number % 251, np.uint8)


def works(_stop: threading.Event) -> Iterator[ImageU8]:
    for number in range(20):
        yield image(number)
        time.sleep(0.02)


def fast(_stop: threading.Event) -> Iterator[ImageU8]:
    for number in range(100_000):
        yield image(number, 480, 640)


def hangs(_stop: threading.Event) -> Iterator[ImageU8]:
    """As a driver does in an ioctl: it neither returns nor can be interrupted."""
    yield image(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    time.sleep(3600)


def crashes(_stop: threading.Event) -> Iterator[ImageU8]:
    yield image(1)
    os.kill(os.getpid(), signal.SIGSEGV)


def changes_size(_stop: threading.Event) -> Iterator[ImageU8]:
    for number in range(1, 4):
        yield image(number, 48 * number, 64)
        time.sleep(0.2)
    time.sleep(3600)


def is_not_there(_stop: threading.Event) -> Iterator[ImageU8]:
    msg = "camera:7: no such camera"
    raise DataError(msg)
    yield
