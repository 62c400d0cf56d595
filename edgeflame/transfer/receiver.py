"""Which chunks of a blob are still missing, and when to say so. No I/O, no clock."""

from __future__ import annotations

from enum import Enum

import numpy as np

from edgeflame.messages import BlobNeed
from edgeflame.transfer.manifest import Manifest, Mask, pack_mask
from edgeflame.transfer.patience import Patience
from edgeflame.transfer.window import Window

ACKS_IN_WINDOW = 4
"""A quarter of the window is acknowledged at once, so that the acknowledgement arrives before the rest has."""
ACK_EVERY_S = 1.0
"""On a slow link a quarter of the window takes long; the sender is not to think that nobody is there."""

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
        self.window = Window(now)
        self._have = have.copy()
        self._num_missing = int(np.count_nonzero(~have))
        self._unacknowledged = 0
        self._acknowledged_at = now
        self._attempts = 0
        self._patience = Patience(now)

    @property
    def num_missing(self) -> int:
        return self._num_missing

    @property
    def is_complete(self) -> bool:
        """All chunks are there; whether they are the blob, only its hash tells."""
        return self._num_missing == 0

    def has(self, index: int) -> bool:
        """Whether a chunk is there."""
        return bool(self._have[index])

    def ack_due(self, now: float) -> bool:
        """Whether it is time for ``need``; asked after every chunk."""
        return self._unacknowledged > 0 and (
            self._unacknowledged * ACKS_IN_WINDOW >= self.window.chunks
            or self.is_complete
            or now - self._acknowledged_at >= ACK_EVERY_S
        )

    def chunk(self, index: int, data: bytes, *, now: float) -> ChunkKind:
        """Take a chunk. A ``NEW`` one must be on disk before ``need`` is called next."""
        if not 0 <= index < self.manifest.num_chunks or not self.manifest.matches(index, data):
            return ChunkKind.DAMAGED
        if self._have[index]:
            return ChunkKind.KNOWN
        self._have[index] = True
        self._num_missing -= 1
        self._unacknowledged += 1
        self._patience.heard(now)
        return ChunkKind.NEW

    def need(self, *, resend: bool, now: float) -> BlobNeed:
        """The message that says what is missing; see :class:`~edgeflame.messages.BlobNeed` for ``resend``."""
        if resend:
            self.window.restart(now)
        else:
            self.window.acknowledge(self._unacknowledged, now)
        self._unacknowledged = 0
        self._acknowledged_at = now
        self._patience.said(now)
        return BlobNeed(
            sha256=self.manifest.sha256,
            missing=pack_mask(~self._have),
            resend=resend,
            window=self.window.chunks,
        )

    def stalled(self, now: float) -> bool:
        """Whether nothing new came for so long that it is time to ask again; asking restarts the interval."""
        return not self.is_complete and self._patience.is_out(now)

    def start_over(self) -> bool:
        """The whole hash was wrong: forget all chunks. False: it has happened too often, give up."""
        self._attempts += 1
        self._have[:] = False
        self._num_missing = self.manifest.num_chunks
        self._unacknowledged = 0
        return self._attempts < MAX_ATTEMPTS
