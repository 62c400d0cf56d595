"""A blob from the site to the aggregator: the shell around the pure sender.

The site keeps the timers for both directions. Nothing here gives up: how long a site may be without progress is
for the aggregator's deadline to say.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeflame.messages import BlobNeed, Offer, UpMessage
from edgeflame.transfer.manifest import unpack_mask
from edgeflame.transfer.patience import Patience
from edgeflame.transfer.store import Outgoing

REPEAT_S = 5.0
"""What was not answered is said again after so long, seconds."""

OWNER = "aggregator"
"""Whose unfinished blobs ours are, in the store."""


class Upload:
    """A model to the aggregator, offered until it is answered.

    Args:
        outgoing: the file.
        offer: what to say of it.
        send: speaks to the aggregator.
        publish: sends a chunk: number and bytes.
    """

    def __init__(
        self,
        outgoing: Outgoing,
        offer: Offer,
        *,
        send: Callable[[UpMessage], None],
        publish: Callable[[int, bytes], None],
    ) -> None:
        self._outgoing = outgoing
        self._offer = offer
        self._send = send
        self._publish = publish
        self._patience = Patience(0.0)
        self._num_missing = offer.manifest.num_chunks

    @property
    def progress(self) -> tuple[int, int]:
        """Chunks that the aggregator has, and all."""
        total = self._offer.manifest.num_chunks
        return total - self._num_missing, total

    def ask(self, *, now: float) -> None:
        """Offer it."""
        self._patience.said(now)
        self._send(self._offer)

    def need(self, need: BlobNeed, *, now: float) -> None:
        """Take the aggregator's bitmap.

        Raises:
            FederationError: it does not fit the blob.
        """
        if need.sha256 != self._offer.manifest.sha256:
            return
        missing = unpack_mask(need.missing, self._offer.manifest.num_chunks)
        self._num_missing = int(missing.sum())
        self._patience.heard(now)
        self._outgoing.sender.need(OWNER, missing, resend=need.resend, now=now, window=need.window)

    def pump(self) -> None:
        """Send chunks until the window is full."""
        self._outgoing.pump(self._publish)

    def tick(self, now: float) -> None:
        """Offer it again if nothing was heard for a while."""
        if self._patience.is_out(now):
            self._send(self._offer)

    def close(self) -> None:
        """Stop."""
        self._outgoing.close()
