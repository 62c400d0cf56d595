"""Receives the blobs that sites upload: at most one for each site at a time, in chunks, continued after a
restart. How much may be in flight from all sites together is bounded, and shared out among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeflame.log import EventLog
from edgeflame.mqtt.messages import BlobNeed, Offer
from edgeflame.transfer.protocol import ChunkKind
from edgeflame.transfer.store import BlobStore, IncomingBlob

log = EventLog("aggregator")

MAX_CHUNKS_IN_FLIGHT = 256
"""Chunks in flight from all sites together: 64 MiB. They queue at the broker for the aggregator; Mosquitto keeps 1000
messages of a queue and drops the others silently."""


@dataclass(frozen=True, kw_only=True)
class ReceivedUpload:
    """An offer whose blob is whole; ``intact`` if its hash is the announced one, else it was given up."""

    offer: Offer
    intact: bool


@dataclass(kw_only=True)
class _PendingUpload:
    offer: Offer
    incoming: IncomingBlob
    window: int = 0
    """Chunks in flight that the site was last allowed."""


class UploadReceiver:
    """Receives offered blobs.

    Args:
        store: where the blobs go.
        send: sends a :class:`BlobNeed` to a site.
    """

    def __init__(self, store: BlobStore, send: Callable[[str, BlobNeed], None]) -> None:
        self._store = store
        self._send = send
        self._pending: dict[str, _PendingUpload] = {}

    def start(self, site: str, offer: Offer, *, now: float) -> ReceivedUpload | None:
        """Begin or continue to receive a blob; the finished upload if it is in the store already."""
        upload = self._pending.get(site)
        if upload is not None and upload.offer.manifest != offer.manifest:
            # The same blob in other chunks goes on where it was; another one supersedes it.
            if upload.offer.manifest.sha256 == offer.manifest.sha256:
                upload.incoming.close()
            else:
                upload.incoming.discard()
            upload = None
        if upload is None:
            if offer.manifest.sha256 in self._store:
                self._pending.pop(site, None)
                return ReceivedUpload(offer=offer, intact=True)
            incoming = self._store.receive(offer.manifest, owner=site, now=now)
            upload = _PendingUpload(offer=offer, incoming=incoming)
        # The latest offer counts: the same bytes may be offered for another round.
        upload.offer = offer
        self._pending[site] = upload
        if upload.incoming.receiver.is_complete:
            return self._finish(site, upload, now)
        self._send_need(site, upload, resend=True, now=now)
        return None

    def receive_chunk(
        self, site: str, sha256: str, index: int, data: bytes, *, now: float
    ) -> tuple[bool, ReceivedUpload | None]:
        """Take a chunk: whether it is new, and the finished upload if it was the last."""
        upload = self._pending.get(site)
        if upload is None or upload.offer.manifest.sha256 != sha256:
            return False, None
        kind = upload.incoming.add_chunk(index, data, now=now)
        if kind is ChunkKind.DAMAGED:
            log.warning("chunk_damaged", site=site, sha256=sha256[:12], chunk=index)
        receiver = upload.incoming.receiver
        if kind is ChunkKind.NEW and receiver.is_complete:
            return True, self._finish(site, upload, now)
        if receiver.ack_due(now):
            self._send_need(site, upload, resend=False, now=now)
        return kind is ChunkKind.NEW, None

    def cancel(self, site: str) -> None:
        """Stop receiving a site's blob, and delete what has arrived of it."""
        upload = self._pending.pop(site, None)
        if upload is not None:
            upload.incoming.discard()

    def close(self) -> None:
        """Stop receiving; what has arrived stays on disk."""
        for upload in self._pending.values():
            upload.incoming.close()
        self._pending.clear()

    def _send_need(self, site: str, upload: _PendingUpload, *, resend: bool, now: float) -> None:
        # The site's share of the chunks in flight, and no more than the other sites leave: these learn of a smaller
        # share only with their next acknowledgement.
        promised = sum(other.window for name, other in self._pending.items() if name != site)
        window = upload.incoming.receiver.window
        window.limit = min(MAX_CHUNKS_IN_FLIGHT // len(self._pending), MAX_CHUNKS_IN_FLIGHT - promised)
        need = upload.incoming.receiver.make_request(resend=resend, now=now)
        upload.window = need.window
        self._send(site, need)

    def _finish(self, site: str, upload: _PendingUpload, now: float) -> ReceivedUpload | None:
        receiver = upload.incoming.receiver
        if upload.incoming.finish():
            del self._pending[site]
            return ReceivedUpload(offer=upload.offer, intact=True)
        log.warning("blob_damaged", site=site, sha256=upload.offer.manifest.sha256[:12])
        if receiver.restart():
            self._send_need(site, upload, resend=True, now=now)
            return None
        self.cancel(site)
        return ReceivedUpload(offer=upload.offer, intact=False)
