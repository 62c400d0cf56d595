"""Fetching a released package from its publisher, as lines do, into a file: for whoever wants to look at it, or fit by
its backbone.
"""

from __future__ import annotations

import shutil
import time
import uuid
from functools import partial
from pathlib import Path

from edgeflame.errors import FederationError, NegativeAnswerError, PackageError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.mqtt.messages import BlobNeed, encode_message
from edgeflame.mqtt.release_messages import Release, decode_release
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.package import read_package
from edgeflame.signing import verify_signature
from edgeflame.state import atomic_writer
from edgeflame.transfer.store import BlobStore, Download

log = EventLog("fetch")

MAX_BYTES = 4 << 30
"""Largest package that is fetched; one is tens of megabytes."""

TICK_S = 0.5
_OWNER = "publisher"


def find_release(url: BrokerUrl, topics: Topics, product: str, *, connect_timeout_s: float | None) -> Release:
    """What is announced for a product.

    Raises:
        NegativeAnswerError: nothing is.
        LinkError: the broker refuses us, or was not reached in time.
        FederationError: the announcement is damaged.
    """
    filters = (topics.release(product),)
    with Session(url, name="fetch", filters=filters, connect_timeout_s=connect_timeout_s) as session:
        for message in session.retained():
            match topics.parse(message.topic):
                case MessageTopic(kind="release", product=name) if name == product and message.payload:
                    release = decode_release(message.payload, product)
                    if not release.withdrawn:
                        return release
    raise NegativeAnswerError(f"nothing is released for the product {product!r} in the fleet {topics.fleet}")


def fetch_release(
    release: Release,
    path: Path,
    *,
    broker: BrokerUrl,
    topics: Topics,
    line: str | None,
    public_key: Path | None,
    connect_timeout_s: float | None,
    timeout_s: float,
    progress: Progress = no_progress,
) -> None:
    """Fetch a released package from its publisher, and write it, whole and verified or not at all.

    What has come stays beside ``path`` until all of it is here, and is not fetched again.

    Args:
        release: its announcement.
        path: the file.
        broker: the broker's address.
        topics: those of the fleet.
        line: the line in whose name it is asked for; None for one without a name of its own.
        public_key: which must have signed it; None asks for no signature.
        connect_timeout_s: give up if the broker was not reached within this time; None: never.
        timeout_s: give up after so long without a chunk.
        progress: counts chunks.

    Raises:
        NegativeAnswerError: nobody serves it, or not any more.
        PackageError: no sound package, or not signed by the key.
        FederationError: it is too large, or does not have its announced hash.
        LinkError: the broker refuses us, or was not reached in time.
        StorageError: the disk is full or fails.
    """
    manifest = release.manifest
    if manifest.size_bytes > MAX_BYTES or manifest.codec != "raw":
        raise FederationError(f"{release.product!r}: announced with {manifest.size_bytes} bytes as {manifest.codec!r}")
    folder = path.parent / f".{path.name}.{manifest.sha256[:12]}"
    store = BlobStore(folder)
    up = topics.line_up(line or f"fetch-{uuid.uuid4().hex[:12]}")
    filters = (topics.release_chunks(manifest.sha256),)
    with Session(broker, name="fetch", filters=filters, connect_timeout_s=connect_timeout_s) as session:

        def ask(need: BlobNeed) -> None:
            session.publish(up, encode_message(need))

        now = time.monotonic()
        download = Download(store, manifest, owner=_OWNER, send=ask, now=now)
        try:
            is_here, heard = download.request_missing(now=now), now
            while not is_here:
                message = session.receive(TICK_S)
                now = time.monotonic()
                match None if message is None else topics.parse(message.topic):
                    case ChunkTopic(is_release=True, sha256=manifest.sha256, index=index) if message is not None:
                        is_here, heard = download.add_chunk(index, message.payload, now=now), now
                        progress(*download.progress)
                download.tick(now)
                if now - heard > timeout_s:
                    raise NegativeAnswerError(
                        f"nobody has served {release.product!r} for {timeout_s:g} s ({download.progress[0]} of "
                        f"{manifest.num_chunks} chunks are here); `edgeflame model publish --stay` serves it"
                    )
        finally:
            download.close()
    fetched = store.path(manifest.sha256)
    try:
        read_package(fetched, accept=None if public_key is None else partial(verify_signature, public_key=public_key))
        with atomic_writer(path) as stream, fetched.open("rb") as source:
            shutil.copyfileobj(source, stream)
    except PackageError as exc:
        raise PackageError(f"what is released for {release.product!r}: {exc}") from exc
    shutil.rmtree(folder, ignore_errors=True)
