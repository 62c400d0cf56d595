"""A camera in a process of its own: a driver that hangs or crashes takes nothing with it, and can be killed.

The child reads the camera and puts each image into a ring in shared memory; down a pipe it says which slot, when it
was taken, or why it gave up. The parent waits for that with a time limit. What the child does not say within it, it
will not say later either: the child is killed, and the caller tries again with a new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from edge.sources.ring import FrameRing, RingName
from edge.sources.taken import ReadImages, Remark, TakenImage
from edgeflame.console import EventLog
from edgeflame.errors import DataError, EdgeFlameError
from edgeflame.images import ImageU8
from edgeflame.processes import die_with_parent

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

log = EventLog("source")

STALL_TIMEOUT_S = 10.0
"""Without an image for so long a camera is taken for hung; the slowest of them to open take a few seconds."""

SLOTS = 4
"""Images in the ring: one being written, one being read, and two for the reader's bad moments."""

_POLL_S = 0.2
_NO_PIXELS: ImageU8 = np.zeros((0, 0, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Overwritten:
    """In place of an image: the child wrote over it before it was read."""


@dataclass(frozen=True, kw_only=True)
class _Ring:
    ring: RingName


@dataclass(frozen=True, kw_only=True)
class _Image:
    slot: int
    generation: int
    taken: TakenImage
    """Without its pixels, which are in the ring."""


@dataclass(frozen=True, kw_only=True)
class _Broken:
    error: EdgeFlameError


_Message = _Ring | _Image | Remark | _Broken


def read_in_child(
    read: ReadImages, name: str, stop: threading.Event, *, stall_timeout_s: float = STALL_TIMEOUT_S
) -> Iterator[TakenImage | Overwritten]:
    """Images of a camera that a child process reads, in order; what was lost between them is told in its place.

    Args:
        read: runs in the child; can be pickled.
        name: of the camera, without passwords.
        stop: ends it.
        stall_timeout_s: without an image for so long the child is killed.

    Raises:
        DataError: the camera cannot be opened, its stream broke or hangs, or the child died.
        MissingDependencyError: what reads it is not installed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(read, sender), name=f"edgeflame {name}", daemon=True)
    child.start()
    sender.close()
    ring: FrameRing | None = None
    try:
        while (message := _receive(receiver, child, name, stop, stall_timeout_s)) is not None:
            match message:
                case _Ring():
                    if ring is not None:
                        ring.close()
                    ring = FrameRing(message.ring, create=False)
                case _Image() if ring is not None:
                    image = ring.read(message.slot, message.generation)
                    yield Overwritten() if image is None else dataclasses.replace(message.taken, image=image)
                case Remark():
                    log.warning("source_remark", source=name, remark=message.text)
                case _Broken():
                    raise message.error
    finally:
        child.kill()
        child.join()
        child.close()
        receiver.close()
        if ring is not None:
            ring.close()


def _receive(
    receiver: Connection, child: SpawnProcess, name: str, stop: threading.Event, stall_timeout_s: float
) -> _Message | None:
    """The child's next message; None when asked to stop."""
    deadline = time.monotonic() + stall_timeout_s
    while not stop.is_set():
        try:
            if receiver.poll(_POLL_S):
                message: _Message = receiver.recv()
                return message
        except (EOFError, OSError) as exc:
            child.join(1.0)
            msg = f"{name}: the process that reads it died ({_how(child.exitcode)})"
            raise DataError(msg) from exc
        if time.monotonic() > deadline:
            log.error("source_hangs", source=name, killed_after_s=stall_timeout_s)
            msg = f"{name}: no image for {stall_timeout_s:g} s; the process that reads it was killed"
            raise DataError(msg)
    return None


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


def _serve(read: ReadImages, sender: Connection) -> None:
    """The child: read until killed."""
    # Ctrl-C goes to the whole terminal; it is the parent that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    ring: FrameRing | None = None
    number = 0
    # The parent is gone when the pipe breaks: there is nobody left to tell.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            for taken in read(threading.Event()):
                if isinstance(taken, Remark):
                    sender.send(taken)
                    continue
                image = taken.image
                shape = (image.shape[0], image.shape[1], image.shape[2])
                if ring is None or ring.ring.shape != shape:
                    # A camera that changes its size in mid-stream: a new ring; the old one's last images may be
                    # lost with it, and the parent still holds its memory for as long as it reads.
                    if ring is not None:
                        ring.close()
                    number += 1
                    ring = FrameRing(
                        RingName(name=f"edgeflame-{os.getpid()}-{number}", slots=SLOTS, shape=shape), create=True
                    )
                    sender.send(_Ring(ring=ring.ring))
                slot, generation = ring.write(image)
                told = dataclasses.replace(taken, image=_NO_PIXELS)
                sender.send(_Image(slot=slot, generation=generation, taken=told))
            sender.send(_Broken(error=DataError("the stream ended")))
        except EdgeFlameError as exc:
            sender.send(_Broken(error=exc))
