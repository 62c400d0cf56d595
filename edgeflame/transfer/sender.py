"""Which chunk of a blob to send next, to one receiver or to many at once. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeflame.transfer.manifest import Manifest, Mask

WINDOW_CHUNKS = 16
"""Chunks on their way to a receiver that has not acknowledged them: 4 MiB at 256 KiB. Less than the 20 messages
Mosquitto keeps in flight to a client by default, and less than the 1000 it queues before it drops silently."""

SILENCE_S = 5.0
"""A receiver that acknowledges nothing for so long no longer holds up the others; it is forgotten until it asks
again, seconds."""


@dataclass
class _Receiver:
    waiting: Mask
    """Missing there and not on its way."""
    in_flight: Mask
    heard_at: float


class Sender:
    """One blob's chunks, in the order that serves most receivers first.

    Args:
        manifest: the blob.
        window_chunks: most chunks on their way to any receiver.
        silence_s: see ``SILENCE_S``.
    """

    def __init__(self, manifest: Manifest, *, window_chunks: int = WINDOW_CHUNKS, silence_s: float = SILENCE_S) -> None:
        self.manifest = manifest
        self._window = window_chunks
        self._silence_s = silence_s
        self._receivers: dict[str, _Receiver] = {}
        # How many receivers wait for each chunk: the sum of their `waiting`.
        self._demand = np.zeros(manifest.num_chunks, dtype=np.int64)

    @property
    def receivers(self) -> frozenset[str]:
        """Who is being served."""
        return frozenset(self._receivers)

    def need(self, receiver: str, missing: Mask, *, resend: bool, now: float) -> None:
        """Take a receiver's bitmap.

        Args:
            receiver: its name.
            missing: ``[num_chunks]``, what it lacks.
            resend: what is on its way to it is to be considered lost.
            now: monotonic clock, seconds.
        """
        old = self._receivers.pop(receiver, None)
        if old is not None:
            self._demand -= old.waiting
        if not missing.any():
            return
        in_flight = np.zeros_like(missing) if resend or old is None else old.in_flight & missing
        waiting = missing & ~in_flight
        self._demand += waiting
        self._receivers[receiver] = _Receiver(waiting=waiting, in_flight=in_flight, heard_at=now)

    def forget(self, receiver: str) -> None:
        """Serve a receiver no longer, until it asks again."""
        old = self._receivers.pop(receiver, None)
        if old is not None:
            self._demand -= old.waiting

    def next_chunk(self, now: float) -> int | None:
        """The chunk to send now, which counts as sent; None when all is sent or the window is full."""
        for name in [name for name, r in self._receivers.items() if now - r.heard_at >= self._silence_s]:
            self.forget(name)
        if any(np.count_nonzero(receiver.in_flight) >= self._window for receiver in self._receivers.values()):
            return None
        # The chunk most receivers wait for; of those, the first. A receiver that joins late thereby shares the
        # rest with the others, and then gets the beginning alone.
        index = int(self._demand.argmax())
        if self._demand[index] == 0:
            return None
        for receiver in self._receivers.values():
            if receiver.waiting[index]:
                receiver.waiting[index] = False
                receiver.in_flight[index] = True
        self._demand[index] = 0
        return index
