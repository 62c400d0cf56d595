"""Which chunks of a blob are still missing, and when to say so. No I/O, no clock."""

from __future__ import annotations

from enum import Enum

import numpy as np

from edgeflame.messages import BlobNeed
from edgeflame.transfer.manifest import Manifest, Mask, pack_mask

ACK_EVERY_CHUNKS = 4
"""A quarter of the sender's window, so that acknowledgements arrive before it is empty."""

STALL_S = 5.0
"""Without a new chunk for so long the receiver asks again for all it lacks, seconds."""
MAX_STALL_S = 30.0
"""The interval doubles from ``STALL_S`` up to this, seconds."""

MAX_ATTEMPTS = 3
"""Whole-hash mismatches after which a blob is given up: every chunk had its announced checksum, so the manifest
itself must be wrong."""


class ChunkKind(Enum):
    """What an arriving chunk is."""

    NEW = "new"
    KNOWN = "known"
    """There already: doubled on the way, or repaired for another receiver."""
    DAMAGED = "damaged"
    """Not the bytes the manifest announces, or no chunk of it at all."""


class Receiver:
    """One blob's arrival.

    Args:
        manifest: the blob.
        have: ``[num_chunks]``, what is on disk already.
        now: monotonic clock, seconds.
    """

    def __init__(self, manifest: Manifest, *, have: Mask, now: float) -> None:
        self.manifest = manifest
        self._have = have.copy()
        self._unacknowledged = 0
        self._attempts = 0
        self._quiet_since = now
        self._stall_s = STALL_S

    @property
    def num_missing(self) -> int:
        return int(np.count_nonzero(~self._have))

    @property
    def is_complete(self) -> bool:
        """All chunks are there; whether they are the blob, only its hash tells."""
        return bool(self._have.all())

    @property
    def ack_due(self) -> bool:
        return self._unacknowledged >= ACK_EVERY_CHUNKS or (self._unacknowledged > 0 and self.is_complete)

    def chunk(self, index: int, data: bytes, *, now: float) -> ChunkKind:
        """Take a chunk. A ``NEW`` one must be on disk before ``need`` is called next."""
        if not 0 <= index < self.manifest.num_chunks or not self.manifest.matches(index, data):
            return ChunkKind.DAMAGED
        if self._have[index]:
            return ChunkKind.KNOWN
        self._have[index] = True
        self._unacknowledged += 1
        self._quiet_since = now
        self._stall_s = STALL_S
        return ChunkKind.NEW

    def need(self, *, resend: bool) -> BlobNeed:
        """The message that says what is missing; see :class:`~edgeflame.messages.BlobNeed` for ``resend``."""
        self._unacknowledged = 0
        return BlobNeed(sha256=self.manifest.sha256, missing=pack_mask(~self._have), resend=resend)

    def stalled(self, now: float) -> bool:
        """Whether nothing new came for so long that it is time to ask again; asking restarts the interval."""
        if self.is_complete or now - self._quiet_since < self._stall_s:
            return False
        self._quiet_since = now
        self._stall_s = min(2 * self._stall_s, MAX_STALL_S)
        return True

    def start_over(self) -> bool:
        """The whole hash was wrong: forget all chunks. False: it has happened too often, give up."""
        self._attempts += 1
        self._have[:] = False
        self._unacknowledged = 0
        return self._attempts < MAX_ATTEMPTS
