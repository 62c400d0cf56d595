"""A ring of images in shared memory: one process writes, one reads, and neither waits for the other.

Each slot begins with a generation counter. The writer makes it odd, copies the image, makes it even; a reader that
was told a slot and its generation copies the image out and looks at the counter again: if it has changed, the image
was overwritten meanwhile and is dropped, never shown half.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import numpy.typing as npt

from edgeflame.images import ImageU8

_HEADER_BYTES = 64
"""The counter, on a cache line of its own."""


@dataclass(frozen=True, kw_only=True)
class RingName:
    """What a reader needs to find a ring."""

    name: str
    slots: int
    shape: tuple[int, int, int]
    """``[height, width, 3]`` of every image in it; another size needs another ring."""


class FrameRing:
    """Images ``[height, width, 3]`` uint8 of one size.

    Args:
        ring: which one.
        create: make it; whoever attaches instead takes its name away, so that it is gone with its last user.

    Raises:
        OSError: no shared memory of that size or name.
    """

    def __init__(self, ring: RingName, *, create: bool) -> None:
        self.ring = ring
        self._image_bytes = int(np.prod(ring.shape))
        self._slot_bytes = _HEADER_BYTES + self._image_bytes + -self._image_bytes % _HEADER_BYTES
        self._memory = SharedMemory(ring.name, create=create, size=self._slot_bytes * ring.slots)
        if not create:
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
        """Let go of the memory."""
        self._memory.close()

    def _views(self, slot: int) -> tuple[npt.NDArray[np.uint64], ImageU8]:
        start = slot * self._slot_bytes
        memory = self._memory.buf
        assert memory is not None
        counter = np.frombuffer(memory, np.uint64, 1, start)
        pixels = np.frombuffer(memory, np.uint8, self._image_bytes, start + _HEADER_BYTES)
        return counter, pixels.reshape(self.ring.shape)
