"""The receiving end of a blob on disk: the shell around the pure receiver."""

from __future__ import annotations

from collections.abc import Callable

from edgeflame.console import EventLog
from edgeflame.errors import FederationError
from edgeflame.messages import BlobNeed
from edgeflame.transfer.manifest import Manifest
from edgeflame.transfer.receiver import ChunkKind
from edgeflame.transfer.store import BlobStore

log = EventLog("transfer")


class Download:
    """A blob from one who publishes it to all who ask; the receiver keeps the timers.

    Args:
        store: where it goes.
        manifest: what it is.
        owner: who sends it: the unfinished blobs of different senders never mix.
        send: tells the sender what is missing.
        now: monotonic clock, seconds.

    Raises:
        StorageError: the disk is full or fails.
    """

    def __init__(
        self, store: BlobStore, manifest: Manifest, *, owner: str, send: Callable[[BlobNeed], None], now: float
    ) -> None:
        self.manifest = manifest
        self._incoming = store.receive(manifest, owner=owner, now=now)
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
            msg = f"blob {self.manifest.sha256[:12]} does not have its announced hash"
            raise FederationError(msg)
        return False
