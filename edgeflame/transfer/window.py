"""How many chunks of a blob may be on their way to a receiver: its choice, made anew with every acknowledgement.

Too few and a fast link waits for acknowledgements; too many and, on a slow one, everything else that is said (the
heartbeat above all) stands behind them in a queue, and a break of the connection loses more. So a receiver asks for
what it takes in ``TARGET_S``. It learns its rate from its own arrivals: while the window is what limits them, the rate
says that more would come, and the window grows; once the link does, the rate no longer grows with the window. No clock.
"""

from __future__ import annotations

DEFAULT_WINDOW_CHUNKS = 16
"""To begin with, and what a receiver of protocol 1.0 means, which does not say."""
MAX_WINDOW_CHUNKS = 64
"""16 MiB at 256 KiB. A broker sends 20 (Mosquitto) to 100 (the embedded one) of them at once and queues the others; it
drops silently beyond 1000."""
MIN_WINDOW_CHUNKS = 2
TARGET_S = 2.0
"""Longer than any link's round trip, shorter than the silence after which a site counts as gone."""


class Window:
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
        """There was a pause that says nothing about the link."""
        self._since = now
