"""One blob at a time between the site and the aggregator: the shells around the pure sender and receiver.

The site keeps the timers for both directions. Nothing here gives up: how long a site may be without progress is
for the aggregator's deadline to say.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeflame.console import EventLog
from edgeflame.errors import FederationError
from edgeflame.messages import BlobNeed, Offer, UpMessage
from edgeflame.transfer.manifest import Manifest, unpack_mask
from edgeflame.transfer.patience import Patience
from edgeflame.transfer.receiver import ChunkKind
from edgeflame.transfer.store import BlobStore, Outgoing

log = EventLog("site")

REPEAT_S = 5.0
"""What was not answered is said again after so long, seconds."""

OWNER = "aggregator"
"""Whose unfinished blobs ours are, in the store."""


class Download:
    """A blob from the aggregator, which publishes it to all who ask.

    Args:
        store: where it goes.
        manifest: what it is.
        send: speaks to the aggregator.
        now: monotonic clock, seconds.

    Raises:
        StorageError: the disk is full or fails.
    """

    def __init__(self, store: BlobStore, manifest: Manifest, *, send: Callable[[UpMessage], None], now: float) -> None:
        self.manifest = manifest
        self._incoming = store.receive(manifest, owner=OWNER, now=now)
        self._send = send

    @property
    def progress(self) -> tuple[int, int]:
        """Chunks that are here, and all."""
        total = self.manifest.num_chunks
        return total - self._incoming.receiver.num_missing, total

    def ask(self, *, now: float) -> bool:
        """Ask for what is missing; True if nothing is, and the blob is in the store."""
        if self._incoming.receiver.is_complete and self._finish():
            return True
        self._send(self._incoming.receiver.need(resend=True, now=now))
        return False

    def chunk(self, index: int, data: bytes, *, now: float) -> bool:
        """Take a chunk; True if the blob is now whole and in the store.

        Raises:
            FederationError: all chunks are right and the whole is not, again and again.
        """
        receiver = self._incoming.receiver
        kind = self._incoming.chunk(index, data, now=now)
        if kind is ChunkKind.DAMAGED:
            log.warning("chunk_damaged", sha256=self.manifest.sha256[:12], chunk=index)
        if kind is ChunkKind.NEW and receiver.is_complete:
            # The acknowledgement ends the sender's interest in us; after a wrong hash `ask` begins anew.
            self._send(receiver.need(resend=False, now=now))
            return self._finish() or self.ask(now=now)
        if receiver.ack_due(now):
            self._send(receiver.need(resend=False, now=now))
        return False

    def tick(self, now: float) -> None:
        """Ask again if nothing came for a while."""
        if self._incoming.receiver.stalled(now):
            self._send(self._incoming.receiver.need(resend=True, now=now))

    def close(self) -> None:
        """Stop; what has come stays on disk."""
        self._incoming.close()

    def _finish(self) -> bool:
        if self._incoming.finish():
            return True
        if not self._incoming.receiver.start_over():
            msg = f"blob {self.manifest.sha256[:12]} from the aggregator does not have its announced hash"
            raise FederationError(msg)
        return False


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
