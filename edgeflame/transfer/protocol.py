"""The transfer protocol, pure: which chunks a sender sends next, which a receiver lacks, and when it reports them.

No I/O and no clock, except that :func:`describe_file` reads a file to make its manifest.

The window is how many chunks of a blob may be on their way to a receiver: the receiver's choice, made anew with
every acknowledgement. Too few and a fast link waits for acknowledgements; too many and, on a slow one, every other
message (the heartbeat above all) stands behind them in a queue, and a break of the connection loses more. So a
receiver asks for what it takes in ``TARGET_S``. It learns its rate from its own arrivals: while the window is what
limits them, the rate says that more would come, and the window grows; once the link does, the rate no longer grows
with the window.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeflame.background import RetryTimer
from edgeflame.errors import FederationError, StorageError
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, DEFAULT_WINDOW_CHUNKS, MAX_CHUNKS, BlobManifest, BlobNeed

Mask = npt.NDArray[np.bool_]
"""``[num_chunks]``."""


def describe_file(path: Path, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> BlobManifest:
    """The manifest of a file; reads it once, a chunk at a time.

    Raises:
        StorageError: it cannot be read, is empty, or has more than ``MAX_CHUNKS`` chunks.
    """
    digest = hashlib.sha256()
    crcs = bytearray()
    size = 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(chunk_bytes):
                digest.update(block)
                crcs += zlib.crc32(block).to_bytes(4, "little")
                size += len(block)
    except OSError as exc:
        raise StorageError(f"{path}: cannot read ({exc.strerror})") from exc
    if not 1 <= len(crcs) // 4 <= MAX_CHUNKS:
        raise StorageError(f"{path}: {size} bytes cannot be sent in 1 to {MAX_CHUNKS} chunks of {chunk_bytes}")
    return BlobManifest(sha256=digest.hexdigest(), size_bytes=size, chunk_bytes=chunk_bytes, crc32s=bytes(crcs))


def pack_mask(mask: Mask) -> bytes:
    """Bits, lowest first."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(data: bytes, num_chunks: int) -> Mask:
    """Read :func:`pack_mask`'s bits.

    Raises:
        FederationError: not as many bits as there are chunks, or some set beyond the last.
    """
    if len(data) != -(-num_chunks // 8):
        raise FederationError(f"a bitmap of {len(data)} bytes for {num_chunks} chunks")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little").astype(np.bool_)
    if bits[num_chunks:].any():
        raise FederationError(f"a bitmap with bits set beyond its {num_chunks} chunks")
    return bits[:num_chunks]


MAX_WINDOW_CHUNKS = 64
"""16 MiB at 256 KiB. A broker sends 20 (Mosquitto) to 100 (the embedded one) of them at once and queues the others; it
drops silently beyond 1000."""
MIN_WINDOW_CHUNKS = 2
TARGET_S = 2.0
"""Longer than any link's round trip, shorter than the silence after which a site counts as gone."""


class TransferWindow:
    """One receiver's window.

    Args:
        now: monotonic clock, seconds.
    """

    def __init__(self, now: float) -> None:
        self._chunks = DEFAULT_WINDOW_CHUNKS
        self._since = now
        self.limit = MAX_WINDOW_CHUNKS
        """The most that may be asked for; lower where several blobs arrive at once."""

    @property
    def chunks(self) -> int:
        """The window."""
        return max(1, min(self._chunks, self.limit))

    def acknowledge(self, num_chunks: int, now: float) -> None:
        """Set it by what arrived since the last acknowledgement; at most double it."""
        elapsed = now - self._since
        self._since = now
        in_target = MAX_WINDOW_CHUNKS if elapsed <= 0 else num_chunks * TARGET_S / elapsed
        self._chunks = int(max(MIN_WINDOW_CHUNKS, min(in_target, 2 * self._chunks, MAX_WINDOW_CHUNKS)))

    def restart(self, now: float) -> None:
        """Measure the rate from now on: there was a pause, which says nothing about the link."""
        self._since = now


RECEIVER_SILENCE_S = 5.0
"""A receiver that acknowledges nothing for so long, seconds, counts as silent: it no longer holds up the others, and no
chunk is sent for its sake until its next acknowledgement."""
FORGET_RECEIVER_S = 120.0
"""A receiver that is silent for so long, seconds, is forgotten, with the chunks on their way to it."""


@dataclass
class _ReceiverProgress:
    waiting: Mask
    """``[num_chunks]``: missing at the receiver and not on their way to it."""
    in_flight: Mask
    num_in_flight: int
    window: int
    heard_at: float
    is_silent: bool = False


class Sender:
    """One blob's chunks, in the order that serves most receivers first.

    Args:
        manifest: the blob.
        silence_s: see ``RECEIVER_SILENCE_S``.
    """

    def __init__(self, manifest: BlobManifest, *, silence_s: float = RECEIVER_SILENCE_S) -> None:
        self.manifest = manifest
        self._silence_s = silence_s
        self._receivers: dict[str, _ReceiverProgress] = {}
        # How many receivers wait for each chunk: the sum of the `waiting` of those that are not silent.
        self._demand = np.zeros(manifest.num_chunks, dtype=np.int32)

    @property
    def receivers(self) -> frozenset[str]:
        """The receivers that are being served."""
        return frozenset(name for name, receiver in self._receivers.items() if not receiver.is_silent)

    def handle_request(
        self, receiver: str, missing: Mask, *, resend: bool, now: float, window: int = DEFAULT_WINDOW_CHUNKS
    ) -> None:
        """Record which chunks a receiver lacks.

        Args:
            receiver: its name.
            missing: ``[num_chunks]``, what it lacks.
            resend: what is on its way to it is to be considered lost.
            now: monotonic clock, seconds.
            window: most chunks on their way to it.
        """
        old = self._receivers.pop(receiver, None)
        if old is not None and not old.is_silent:
            self._demand -= old.waiting
        if not missing.any():
            return
        in_flight = np.zeros_like(missing) if resend or old is None else old.in_flight & missing
        waiting = missing & ~in_flight
        self._demand += waiting
        self._receivers[receiver] = _ReceiverProgress(
            waiting=waiting,
            in_flight=in_flight,
            num_in_flight=int(np.count_nonzero(in_flight)),
            window=min(window, MAX_WINDOW_CHUNKS),
            heard_at=now,
        )

    def next_chunk(self, now: float) -> int | None:
        """The chunk to send now, which counts as sent; None when all is sent or a window is full."""
        self._skip_silent(now)
        heard = [receiver for receiver in self._receivers.values() if not receiver.is_silent]
        if any(receiver.num_in_flight >= receiver.window for receiver in heard):
            return None
        # The chunk most receivers wait for; of those, the first. A receiver that joins late thereby shares the
        # rest with the others, and then gets the beginning alone.
        index = int(self._demand.argmax())
        if self._demand[index] == 0:
            return None
        for receiver in heard:
            if receiver.waiting[index]:
                receiver.waiting[index] = False
                receiver.in_flight[index] = True
                receiver.num_in_flight += 1
        self._demand[index] = 0
        return index

    def _skip_silent(self, now: float) -> None:
        for name, receiver in list(self._receivers.items()):
            silent_s = now - receiver.heard_at
            if silent_s >= self._silence_s and not receiver.is_silent:
                receiver.is_silent = True
                self._demand -= receiver.waiting
            if silent_s >= FORGET_RECEIVER_S:
                del self._receivers[name]


ACKS_IN_WINDOW = 4
"""A quarter of the window is acknowledged at once, so that the acknowledgement arrives before the rest has."""
ACK_EVERY_S = 1.0
"""On a slow link a quarter of the window takes long; the receiver must not seem gone to the sender."""

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

    def __init__(self, manifest: BlobManifest, *, have: Mask, now: float) -> None:
        self.manifest = manifest
        self.window = TransferWindow(now)
        self._have = have.copy()
        self._num_missing = int(np.count_nonzero(~have))
        self._unacknowledged = 0
        self._acknowledged_at = now
        self._attempts = 0
        self._retry = RetryTimer(now)

    @property
    def num_missing(self) -> int:
        return self._num_missing

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are there; whether they are the announced blob, only its hash tells."""
        return self._num_missing == 0

    def has(self, index: int) -> bool:
        """Whether a chunk is there."""
        return bool(self._have[index])

    def ack_due(self, now: float) -> bool:
        """Whether it is time to send :meth:`make_request`'s message; asked after every chunk."""
        return self._unacknowledged > 0 and (
            self._unacknowledged * ACKS_IN_WINDOW >= self.window.chunks
            or self.is_complete
            or now - self._acknowledged_at >= ACK_EVERY_S
        )

    def add_chunk(self, index: int, data: bytes, *, now: float) -> ChunkKind:
        """Take a chunk. A ``NEW`` one must be on disk before :meth:`make_request` is called next."""
        if not 0 <= index < self.manifest.num_chunks or not self.manifest.matches(index, data):
            return ChunkKind.DAMAGED
        if self._have[index]:
            return ChunkKind.KNOWN
        self._have[index] = True
        self._num_missing -= 1
        self._unacknowledged += 1
        self._retry.progressed(now)
        return ChunkKind.NEW

    def make_request(self, *, resend: bool, now: float) -> BlobNeed:
        """The message that says what is missing; see :class:`~edgeflame.mqtt.messages.BlobNeed` for ``resend``."""
        if resend:
            self.window.restart(now)
        else:
            self.window.acknowledge(self._unacknowledged, now)
        self._unacknowledged = 0
        self._acknowledged_at = now
        self._retry.sent(now)
        return BlobNeed(
            sha256=self.manifest.sha256,
            missing=pack_mask(~self._have),
            resend=resend,
            window=self.window.chunks,
        )

    def is_stalled(self, now: float) -> bool:
        """Whether nothing new came for so long that it is time to ask again; asking restarts the interval."""
        return not self.is_complete and self._retry.is_due(now)

    def restart(self) -> bool:
        """The whole hash was wrong: forget all chunks. False: it has happened too often, give up."""
        self._attempts += 1
        self._have[:] = False
        self._num_missing = self.manifest.num_chunks
        self._unacknowledged = 0
        return self._attempts < MAX_ATTEMPTS
