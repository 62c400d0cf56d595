"""Which chunk of a blob to send next, to one receiver or to many at once. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeflame.transfer.manifest import Manifest, Mask
from edgeflame.transfer.window import DEFAULT_WINDOW_CHUNKS, MAX_WINDOW_CHUNKS

SILENCE_S = 5.0
"""A receiver that acknowledges nothing for so long no longer holds up the others, seconds; nothing is sent for it
until it is heard again."""
FORGET_S = 120.0
"""After so long even what is on its way to it is forgotten, seconds."""


@dataclass
class _Receiver:
    waiting: Mask
    """Missing there and not on its way."""
    in_flight: Mask
    num_in_flight: int
    window: int
    heard_at: float
    is_silent: bool = False


class Sender:
    """One blob's chunks, in the order that serves most receivers first.

    Args:
        manifest: the blob.
        silence_s: see ``SILENCE_S``.
    """

    def __init__(self, manifest: Manifest, *, silence_s: float = SILENCE_S) -> None:
        self.manifest = manifest
        self._silence_s = silence_s
        self._receivers: dict[str, _Receiver] = {}
        # How many receivers wait for each chunk: the sum of the `waiting` of those that are not silent.
        self._demand = np.zeros(manifest.num_chunks, dtype=np.int32)

    @property
    def receivers(self) -> frozenset[str]:
        """Who is being served."""
        return frozenset(name for name, receiver in self._receivers.items() if not receiver.is_silent)

    def need(
        self, receiver: str, missing: Mask, *, resend: bool, now: float, window: int = DEFAULT_WINDOW_CHUNKS
    ) -> None:
        """Take a receiver's bitmap.

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
        self._receivers[receiver] = _Receiver(
            waiting=waiting,
            in_flight=in_flight,
            num_in_flight=int(np.count_nonzero(in_flight)),
            window=min(window, MAX_WINDOW_CHUNKS),
            heard_at=now,
        )

    def next_chunk(self, now: float) -> int | None:
        """The chunk to send now, which counts as sent; None when all is sent or a window is full."""
        self._pass_over_the_silent(now)
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

    def _pass_over_the_silent(self, now: float) -> None:
        for name, receiver in list(self._receivers.items()):
            silent_s = now - receiver.heard_at
            if silent_s >= self._silence_s and not receiver.is_silent:
                receiver.is_silent = True
                self._demand -= receiver.waiting
            if silent_s >= FORGET_S:
                del self._receivers[name]
