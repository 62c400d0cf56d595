"""Receives the blobs that sites upload: at most one for each site at a time, in chunks, continued after a
restart. How much may be in flight from all sites together is bounded, and shared out among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeflame.log import EventLog
from edgeflame.mqtt.messages import BlobNeed, Offer
from edgeflame.transfer.protocol import ChunkKind
from edgeflame.transfer.store import BlobStore, Incoming

log = EventLog("aggregator")

MAX_CHUNKS_IN_FLIGHT = 256
"""On their way to us from all sites together: 64 MiB. They queue at the broker as our messages, of which Mosquitto
keeps 1000 and drops the others silently."""


@dataclass(frozen=True, kw_only=True)
class ReceivedUpload:
    """An offer whose blob is whole; ``intact`` if its hash is the announced one, else it was given up."""

    offer: Offer
    intact: bool


@dataclass(kw_only=True)
class _PendingUpload:
    offer: Offer
    incoming: Incoming
    window: int = 0
    """What we last allowed its site."""


class UploadReceiver:
    """Receives offered blobs.

    Args:
        store: where they go.
        need: sends a :class:`BlobNeed` to a site.
    """

    def __init__(self, store: BlobStore, need: Callable[[str, BlobNeed], None]) -> None:
        self._store = store
        self._need = need
        self._arrivals: dict[str, _PendingUpload] = {}

    def offer(self, site: str, offer: Offer, *, now: float) -> ReceivedUpload | None:
        """Begin or continue to receive a blob; what :class:`ReceivedUpload` if it is there already."""
        arrival = self._arrivals.get(site)
        if arrival is not None and arrival.offer.manifest != offer.manifest:
            # The same blob in other chunks goes on where it was; another one supersedes it.
            if arrival.offer.manifest.sha256 == offer.manifest.sha256:
                arrival.incoming.close()
            else:
                arrival.incoming.discard()
            arrival = None
        if arrival is None:
            if offer.manifest.sha256 in self._store:
                self._arrivals.pop(site, None)
                return ReceivedUpload(offer=offer, intact=True)
            incoming = self._store.receive(offer.manifest, owner=site, now=now)
            arrival = _PendingUpload(offer=offer, incoming=incoming)
        # The latest offer counts: the same bytes may be offered for another round.
        arrival.offer = offer
        self._arrivals[site] = arrival
        if arrival.incoming.receiver.is_complete:
            return self._finish(site, arrival, now)
        self._say_need(site, arrival, resend=True, now=now)
        return None

    def chunk(
        self, site: str, sha256: str, index: int, data: bytes, *, now: float
    ) -> tuple[bool, ReceivedUpload | None]:
        """Take a chunk: whether it is new, and what has :class:`ReceivedUpload` with it."""
        arrival = self._arrivals.get(site)
        if arrival is None or arrival.offer.manifest.sha256 != sha256:
            return False, None
        kind = arrival.incoming.chunk(index, data, now=now)
        if kind is ChunkKind.DAMAGED:
            log.warning("chunk_damaged", site=site, sha256=sha256[:12], chunk=index)
        receiver = arrival.incoming.receiver
        if kind is ChunkKind.NEW and receiver.is_complete:
            return True, self._finish(site, arrival, now)
        if receiver.ack_due(now):
            self._say_need(site, arrival, resend=False, now=now)
        return kind is ChunkKind.NEW, None

    def drop(self, site: str) -> None:
        """A site's blob is no longer wanted."""
        arrival = self._arrivals.pop(site, None)
        if arrival is not None:
            arrival.incoming.discard()

    def close(self) -> None:
        """Stop; what has come stays on disk."""
        for arrival in self._arrivals.values():
            arrival.incoming.close()
        self._arrivals.clear()

    def _say_need(self, site: str, arrival: _PendingUpload, *, resend: bool, now: float) -> None:
        # Its share of what may come; and no more than the others leave, who learn of their smaller share only with
        # their next acknowledgement.
        promised = sum(other.window for name, other in self._arrivals.items() if name != site)
        window = arrival.incoming.receiver.window
        window.limit = min(MAX_CHUNKS_IN_FLIGHT // len(self._arrivals), MAX_CHUNKS_IN_FLIGHT - promised)
        need = arrival.incoming.receiver.need(resend=resend, now=now)
        arrival.window = need.window
        self._need(site, need)

    def _finish(self, site: str, arrival: _PendingUpload, now: float) -> ReceivedUpload | None:
        receiver = arrival.incoming.receiver
        if arrival.incoming.finish():
            del self._arrivals[site]
            return ReceivedUpload(offer=arrival.offer, intact=True)
        log.warning("blob_damaged", site=site, sha256=arrival.offer.manifest.sha256[:12])
        if receiver.start_over():
            self._say_need(site, arrival, resend=True, now=now)
            return None
        self.drop(site)
        return ReceivedUpload(offer=arrival.offer, intact=False)
