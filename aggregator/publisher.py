"""What the aggregator publishes to all sites: the retained state of the run, and the blobs it names (the base
model, the pooled statistics, the ledger), sent in chunks to whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from aggregator.events import RunState
from aggregator.ledger import build_ledger
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, BlobManifest, BlobNeed, RoundState, StatisticsWanted
from edgeflame.state import write_json
from edgeflame.transfer.protocol import describe_file, unpack_mask
from edgeflame.transfer.store import BlobStore, OutgoingBlob


class StatePublisher:
    """Describes a run as a message, and serves the blobs that the message names.

    Args:
        store: holds the blobs.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._chunk_bytes = DEFAULT_CHUNK_BYTES
        self._manifests: dict[str, BlobManifest] = {}
        self._outgoing: dict[str, OutgoingBlob] = {}
        self._ledger: str | None = None

    def set_chunk_size(self, chunk_bytes: int) -> None:
        """Describe blobs in chunks of this size from now on; called on each new connection."""
        if chunk_bytes != self._chunk_bytes:
            self._chunk_bytes = chunk_bytes
            self._manifests.clear()
            self._stop_all_but(set())

    def round_state(self, state: RunState, available: tuple[str, ...]) -> RoundState:
        """The message to publish; the blobs it names are served from now on, and no others.

        Args:
            state: the run.
            available: sites that are not lost.
        """
        current, config = state.latest_round, state.config
        base = ledger_manifest = statistics = wanted = None
        asked: tuple[str, ...] = ()
        match state.phase:
            case "initialise":
                asked = state.initial_sites_asked[-1:]
            case "train" if current is not None:
                base, asked = self._manifest(current.base_sha256), current.asked
            case "statistics" if state.model is not None and state.statistics is not None:
                base, asked = self._manifest(state.model), state.statistics.asked
                form, rank = config.statistics_form, config.statistics_rank
                wanted = StatisticsWanted(form=form, rank=rank if form == "low_rank" else 0)
            case "finish" if state.model is not None:
                base, asked = self._manifest(state.model), available
                ledger_manifest = self._manifest(self._ledger_blob(state))
            case "done" if state.model is not None:
                base = self._manifest(state.model)
                # For sites that come late, if the aggregator stays; and for their provenance.
                ledger_manifest = self._manifest(self._ledger_blob(state))
            case _:
                pass
        if (
            state.phase in ("finish", "done")
            and state.statistics is not None
            and state.statistics.result_sha256 is not None
        ):
            statistics = self._manifest(state.statistics.result_sha256)
        named = (base, ledger_manifest, statistics)
        self._stop_all_but({manifest.sha256 for manifest in named if manifest is not None})
        return RoundState(
            run=state.run,
            phase=state.phase,
            round=current.number if current is not None else 0,
            num_rounds=config.rounds,
            asked=asked,
            learning=msgspec.Raw(msgspec.json.encode(config.learning)),
            base=base,
            wanted=wanted,
            statistics=statistics,
            ledger=ledger_manifest,
            deadline_s=config.deadline_s,
            detail=_status_detail(state, available)[:500],
            codec=config.compression,
            paused=tuple(sorted(site for site, by in state.paused.items() if "operator" in by)),
        )

    def chunks_requested(self, site: str, need: BlobNeed, *, now: float) -> bool:
        """Take a site's request for chunks; returns False if its blob is not served.

        Raises:
            FederationError: it does not fit the blob.
        """
        manifest = self._manifests.get(need.sha256)
        if manifest is None:
            return False
        missing = unpack_mask(need.missing, manifest.num_chunks)
        outgoing = self._outgoing.get(need.sha256)
        if outgoing is None:
            outgoing = self._outgoing[need.sha256] = OutgoingBlob(self._store.path(need.sha256), manifest)
        outgoing.sender.handle_request(site, missing, resend=need.resend, now=now, window=need.window)
        return True

    def send_pending(self, publish: Callable[[str, int, bytes], None]) -> None:
        """Publish the chunks that may be sent now: SHA-256, chunk number, bytes."""
        for sha256, outgoing in self._outgoing.items():

            def send(index: int, data: bytes, sha256: str = sha256) -> None:
                publish(sha256, index, data)

            outgoing.send_window(send)

    def close(self) -> None:
        """Close all files."""
        self._stop_all_but(set())

    @property
    def served_blobs(self) -> frozenset[str]:
        """SHA-256 of the blobs that the last message names; they must stay in the store."""
        return frozenset(self._manifests)

    def _ledger_blob(self, state: RunState) -> str:
        if self._ledger is None or self._ledger not in self._store:
            # As it was when training ended: a restarted aggregator must name the same blob.
            trained = replace(state, finished={}, not_finished={}, left={}, ended=None)
            draft = self._store.draft_path("ledger")
            write_json(draft, build_ledger(trained))
            self._ledger = self._store.add(draft).sha256
        return self._ledger

    def _manifest(self, sha256: str) -> BlobManifest:
        manifest = self._manifests.get(sha256)
        if manifest is None:
            manifest = describe_file(self._store.path(sha256), chunk_bytes=self._chunk_bytes)
            self._manifests[sha256] = manifest
        return manifest

    def _stop_all_but(self, wanted: set[str]) -> None:
        for sha256 in self._outgoing.keys() - wanted:
            self._outgoing.pop(sha256).close()
        for sha256 in self._manifests.keys() - wanted:
            del self._manifests[sha256]


def _status_detail(state: RunState, available: tuple[str, ...]) -> str:
    if state.ended:
        return state.ended.reason
    if state.phase == "finish" and state.ended_early is not None:
        return state.ended_early.reason
    if state.phase in ("initialise", "train") and not available:
        return "every site is paused"
    return ""
