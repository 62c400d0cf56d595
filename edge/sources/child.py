"""Reads a live camera in a child process, so that a driver that hangs can be killed.

The child reads the camera and puts each image into a ring in shared memory; through a pipe it sends the slot and the
time of capture, or the error with which it ends. The parent waits for each message with a time limit, after which the
child is killed and the source raises; its reader may open it again.

The ring
--------
A ring of images in shared memory: one process writes, one reads, and neither waits for the other.

Each slot begins with a generation counter. The writer makes it odd, copies the image, and makes it even. The reader,
which has received slot and generation, copies the image and reads the counter again: if it has changed, the image was
overwritten meanwhile and is dropped.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge.frame import Frame, make_frame
from edge.result import Hop
from edge.sources.damage import LOST
from edgeflame.background import die_with_parent
from edgeflame.errors import DataError, EdgeFlameError
from edgeflame.images import ImageU8
from edgeflame.log import EventLog

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess


OLDEST_STAMP_S = 10.0
"""Greatest age of a driver's time stamp, seconds; an older one is not used, since cameras do not pause for so long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TakenImage:
    """An image and when it was taken, or the reason why there is none."""

    image: ImageU8 | None
    """None with an ``error``."""
    monotonic_s: float
    """Seconds on the machine's monotonic clock, which all processes share."""
    utc: dt.datetime
    error: str | None = None
    num_lost: int = 0
    """Number of images before it that the camera took and that did not arrive."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A message about a camera for its operator; written to the log."""

    text: str


ReadImages = Callable[[threading.Event], Iterator["TakenImage | Remark"]]
"""Opens a camera and yields its images; raises DataError if it cannot be opened, or when the images end."""


def taken_image(
    image: ImageU8 | None, *, error: str | None = None, num_lost: int = 0, stamp_s: float | None = None
) -> TakenImage:
    """An image captured at ``stamp_s`` on the monotonic clock; now, if that is None or not plausible."""
    now_s, utc = time.monotonic(), dt.datetime.now(dt.timezone.utc)
    age_s = 0.0 if stamp_s is None or not 0 <= now_s - stamp_s <= OLDEST_STAMP_S else now_s - stamp_s
    return TakenImage(
        image=image, error=error, num_lost=num_lost, monotonic_s=now_s - age_s, utc=utc - dt.timedelta(seconds=age_s)
    )


_HEADER_BYTES = 64
"""Size of the counter, on a cache line of its own."""


@dataclass(frozen=True, kw_only=True)
class RingName:
    """Name and layout of a ring, as its reader needs them."""

    name: str
    slots: int
    shape: tuple[int, int, int]
    """``[height, width, 3]`` of every image in it; another size needs another ring."""


SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux's folder of shared memory, not one for temporary files
"""Where shared memory is on Linux; in containers it is small unless they are given more."""

MORE_SHARED_MEMORY = "give the container more shared memory: docker run --shm-size 512m, shm_size in a compose file"


def ring_bytes(shape: tuple[int, ...], slots: int) -> int:
    """Size of a ring of images of this shape ``[height, width, 3]`` in shared memory."""
    return slots * _slot_bytes(shape)


def _slot_bytes(shape: tuple[int, ...]) -> int:
    image_bytes = math.prod(shape)
    return _HEADER_BYTES + image_bytes + -image_bytes % _HEADER_BYTES


class FrameRing:
    """A ring of images ``[height, width, 3]`` uint8 of one size in shared memory.

    Args:
        ring: name and layout.
        create: whether to create it. Otherwise it is attached and its name removed, so that the memory is freed with
            its last user.

    Raises:
        OSError: no shared memory of that name, or no room for that size.
    """

    def __init__(self, ring: RingName, *, create: bool) -> None:
        self.ring = ring
        self._image_bytes = math.prod(ring.shape)
        self._slot_bytes = _slot_bytes(ring.shape)
        size_bytes = ring_bytes(ring.shape, ring.slots)
        self._memory = SharedMemory(ring.name, create=create, size=size_bytes)
        if create:
            self._allocate(size_bytes)
        else:
            self._memory.unlink()
        self._written = 0

    def write(self, image: ImageU8) -> tuple[int, int]:
        """Copy an image into the oldest slot; returns the slot and its generation."""
        slot = self._written % self.ring.slots
        self._written += 1
        counter, pixels = self._views(slot)
        generation = int(counter[0]) + 2
        counter[0] = generation - 1
        pixels[:] = image
        counter[0] = generation
        return slot, generation

    def read(self, slot: int, generation: int) -> ImageU8 | None:
        """A copy of an image; None if it has been overwritten since."""
        counter, pixels = self._views(slot)
        if int(counter[0]) != generation:
            return None
        image = pixels.copy()
        return image if int(counter[0]) == generation else None

    def close(self) -> None:
        """Detach from the memory."""
        self._memory.close()

    def _allocate(self, size_bytes: int) -> None:
        """Take all the memory now; else the kernel kills whoever writes into the first page that it has no room for."""
        file = SHARED_MEMORY / self.ring.name
        if not file.exists():  # not Linux
            return
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError:
            self._memory.close()
            self._memory.unlink()
            raise
        finally:
            os.close(descriptor)

    def _views(self, slot: int) -> tuple[npt.NDArray[np.uint64], ImageU8]:
        start = slot * self._slot_bytes
        memory = self._memory.buf
        assert memory is not None
        counter = np.frombuffer(memory, np.uint64, 1, start)
        pixels = np.frombuffer(memory, np.uint8, self._image_bytes, start + _HEADER_BYTES)
        return counter, pixels.reshape(self.ring.shape)


log = EventLog("source")

STALL_TIMEOUT_S = 10.0
"""Time without an image after which a camera is taken for hung, seconds; the slowest take a few seconds to open."""

SLOTS = 4
"""Images in the ring: one being written, one being read, and two in case the reader is slow."""

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Overwritten:
    """Stands for an image that the child has overwritten before it was read."""


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


_Message = _Ring | _Image | TakenImage | Remark | _Broken


def read_in_child(
    read: ReadImages, name: str, stop: threading.Event, *, stall_timeout_s: float = STALL_TIMEOUT_S
) -> Iterator[TakenImage | Overwritten]:
    """Yield the images of a camera that a child process reads, in order, with :class:`Overwritten` for lost ones.

    Args:
        read: runs in the child; must be picklable.
        name: the camera's name, without passwords.
        stop: ends it.
        stall_timeout_s: time without an image after which the child is killed, seconds.

    Raises:
        DataError: the camera cannot be opened, its stream failed or hangs, or the child died.
        MissingDependencyError: the package that reads it is not installed.
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
                case TakenImage():
                    yield message
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
            raise DataError(f"{name}: the process that reads it died ({_how(child.exitcode)})") from exc
        if time.monotonic() > deadline:
            log.error("source_hangs", source=name, killed_after_s=stall_timeout_s)
            raise DataError(f"{name}: no image for {stall_timeout_s:g} s; the process that reads it was killed")
    return None


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


def _serve(read: ReadImages, sender: Connection) -> None:
    """The child: read until killed."""
    # Ctrl-C reaches all processes of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    ring: FrameRing | None = None
    number = 0
    # A broken pipe means that the parent is gone.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            for taken in read(threading.Event()):
                if isinstance(taken, Remark) or taken.image is None:
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
                    ring = _new_ring(RingName(name=f"edgeflame-{os.getpid()}-{number}", slots=SLOTS, shape=shape))
                    sender.send(_Ring(ring=ring.ring))
                slot, generation = ring.write(image)
                without_pixels = dataclasses.replace(taken, image=None)
                sender.send(_Image(slot=slot, generation=generation, taken=without_pixels))
            sender.send(_Broken(error=DataError("the stream ended")))
        except EdgeFlameError as exc:
            sender.send(_Broken(error=exc))


def _new_ring(ring: RingName) -> FrameRing:
    try:
        return FrameRing(ring, create=True)
    except OSError as exc:
        height, width, _ = ring.shape
        needed = f"{ring_bytes(ring.shape, ring.slots) / 1e6:.0f} MB"
        raise DataError(
            f"no room for its images of {width}x{height} in shared memory: {needed} are needed in {SHARED_MEMORY} "
            f"({exc.strerror}); {MORE_SHARED_MEMORY}"
        ) from exc


OVERWRITTEN = "overwritten"
"""Why a frame was dropped: the camera's process wrote over it in the ring before it was read."""


def live_frames(
    name: str, read: ReadImages, stop: threading.Event, *, stall_timeout_s: float = STALL_TIMEOUT_S
) -> Iterator[Frame]:
    """Yield a camera's frames, without part ids, until it fails or ``stop`` is set.

    Args:
        name: the camera's name, without passwords.
        read: opens the camera and yields its images; runs in a child process.
        stop: ends it.
        stall_timeout_s: time without an image after which the camera is taken for hung, seconds.

    Raises:
        DataError: the camera cannot be opened, its stream failed or hangs, or the child died.
        MissingDependencyError: the package that reads it is not installed.
    """
    missed: collections.Counter[str] = collections.Counter()
    for taken in read_in_child(read, name, stop, stall_timeout_s=stall_timeout_s):
        if isinstance(taken, Overwritten):
            missed[OVERWRITTEN] += 1
            continue
        missed[LOST] += taken.num_lost
        frame = make_frame(
            part_id="",
            source=name,
            image_bgr=taken.image,
            error=taken.error,
            captured_monotonic_s=taken.monotonic_s,
            captured_utc=taken.utc,
            missed=+missed,
        )
        frame.passes(Hop.RECEIVED)
        yield frame
        missed.clear()
