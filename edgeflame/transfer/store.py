"""Blobs on disk: whole ones by their SHA-256, and unfinished ones that a restart continues; sending and downloading.

ROOT/blobs/<sha256>              whole, verified, on the disk for good
ROOT/partial/<owner>/<sha256>    arriving; which of its chunks are there, their checksums tell

:class:`Download` is the receiving end of a published blob: the shell around the pure receiver.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgeflame.errors import FederationError, StorageError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, BlobManifest, BlobNeed
from edgeflame.state import file_sha256, fsync_folder, storage_errors
from edgeflame.transfer.protocol import ChunkKind, Mask, Receiver, Sender, describe_file

log = EventLog("store")

SPARE_BYTES = 64 << 20
"""What must stay free on the disk beside an arriving blob."""


CATCH_UP_CHUNKS = 4
"""Chunks read again for the hash with each that arrives, at most."""


class BlobStore:
    """A folder of blobs, used by one process; damaged ones are dropped when it is opened.

    Raises:
        StorageError: here and in every method, when the disk fails.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        with storage_errors(root, "create the blob store"):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(parents=True, exist_ok=True)
            for path in self._blobs.iterdir():
                # A power cut may damage what was synced, on disks that only say so. Whoever needs it gets it again.
                if file_sha256(path) != path.name:
                    log.warning("damaged_blob_dropped", sha256=path.name[:12])
                    path.unlink()

    def path(self, sha256: str) -> Path:
        """The path of a blob, whether or not it is there."""
        return self._blobs / sha256

    def draft_path(self, name: str) -> Path:
        """A path on the store's file system, to write to what :meth:`add` then takes."""
        return self._root / f".{name}.draft"

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def add(self, source: Path, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> BlobManifest:
        """Move a file in under its hash, durably."""
        manifest = describe_file(source, chunk_bytes=chunk_bytes)
        with storage_errors(source, "move into the blob store"):
            _fsync_file(source)
            source.replace(self.path(manifest.sha256))
            fsync_folder(self._blobs)
        return manifest

    def has_room(self, size_bytes: int) -> bool:
        """Whether so much more fits on the disk."""
        with storage_errors(self._partial, "measure"):
            return shutil.disk_usage(self._partial).free >= size_bytes + SPARE_BYTES

    def receive(self, manifest: BlobManifest, *, owner: str, now: float) -> IncomingBlob:
        """Begin to receive a blob, or continue: chunks already on disk are found by their checksums.

        Args:
            manifest: the blob.
            owner: who sends it; a file name. Two owners' unfinished blobs never mix, whatever they claim to be.
            now: monotonic clock, seconds.
        """
        folder = self._partial / owner
        path = folder / manifest.sha256
        with storage_errors(path, "prepare for a blob"):
            folder.mkdir(exist_ok=True)
            present = path.stat().st_blocks * 512 if path.exists() else 0
            if not self.has_room(manifest.size_bytes - present):
                free = shutil.disk_usage(folder).free
                raise StorageError(
                    f"{folder}: {free >> 20} MiB free, a blob of {manifest.size_bytes >> 20} MiB does not fit"
                )
            stream = path.open("r+b" if path.exists() else "w+b")
            have = _chunks_on_disk(stream, manifest)
            # Sparse: nothing is allocated before it arrives.
            stream.truncate(manifest.size_bytes)
        return IncomingBlob(
            stream=stream, partial=path, final=self.path(manifest.sha256), manifest=manifest, have=have, now=now
        )

    def prune(self, keep: Collection[str]) -> None:
        """Delete all whole blobs but these."""
        for path in self._blobs.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


class IncomingBlob:
    """A blob on its way to the disk. Close it when it is whole, or when it is no longer wanted."""

    def __init__(
        self, *, stream: BinaryIO, partial: Path, final: Path, manifest: BlobManifest, have: Mask, now: float
    ) -> None:
        self.manifest = manifest
        self.receiver = Receiver(manifest, have=have, now=now)
        self._stream = stream
        self._partial = partial
        self._final = final
        self._digest = hashlib.sha256()
        self._num_hashed = 0
        """Chunks from the first on that are in the digest."""

    def add_chunk(self, index: int, data: bytes, *, now: float) -> ChunkKind:
        """Check a chunk, and write it if it is new."""
        kind = self.receiver.add_chunk(index, data, now=now)
        if kind is ChunkKind.NEW:
            with storage_errors(self._partial, "write"):
                # Not kept in this process: what was acknowledged must survive it.
                _pwrite(self._stream.fileno(), data, self.manifest.offset(index))
                self._hash_on(index, data)
        return kind

    def finish(self) -> bool:
        """Hash what is not hashed yet; if the whole is what was announced, it is in the store, durably. Else False."""
        with storage_errors(self._partial, "finish"):
            while self._num_hashed < self.manifest.num_chunks:
                self._digest.update(self._read(self._num_hashed))
                self._num_hashed += 1
            found, self._digest, self._num_hashed = self._digest.hexdigest(), hashlib.sha256(), 0
            if found != self.manifest.sha256:
                return False
            os.fsync(self._stream.fileno())
            self._partial.replace(self._final)
            fsync_folder(self._final.parent)
            self._stream.close()
        return True

    def close(self) -> None:
        """Stop; what has come stays on disk."""
        self._stream.close()

    def discard(self) -> None:
        """Stop and delete what has come."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    def _hash_on(self, index: int, data: bytes) -> None:
        # Chunks mostly come in order, so the hash is done when the last has come. Those that came too early, or before
        # a restart, are read again, a few with each chunk, so that no one chunk takes long.
        if index == self._num_hashed:
            self._digest.update(data)
            self._num_hashed += 1
        for _ in range(CATCH_UP_CHUNKS):
            if self._num_hashed == self.manifest.num_chunks or not self.receiver.has(self._num_hashed):
                return
            self._digest.update(self._read(self._num_hashed))
            self._num_hashed += 1

    def _read(self, index: int) -> bytes:
        return os.pread(self._stream.fileno(), self.manifest.length(index), self.manifest.offset(index))


class OutgoingBlob:
    """A file on its way to others: reads the chunks that its sender asks for, and publishes them."""

    def __init__(self, path: Path, manifest: BlobManifest, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.sender = Sender(manifest)
        self._path = path
        self._clock = clock
        with storage_errors(path, "open"):
            self._stream = path.open("rb")

    def send_window(self, publish: Callable[[int, bytes], None]) -> None:
        """Publish chunks until the window is full."""
        manifest = self.sender.manifest
        while (index := self.sender.next_chunk(self._clock())) is not None:
            with storage_errors(self._path, "read"):
                data = os.pread(self._stream.fileno(), manifest.length(index), manifest.offset(index))
            publish(index, data)

    def close(self) -> None:
        self._stream.close()


def _chunks_on_disk(stream: BinaryIO, manifest: BlobManifest) -> Mask:
    have = np.zeros(manifest.num_chunks, dtype=np.bool_)
    stream.seek(0)
    for index in range(manifest.num_chunks):
        data = stream.read(manifest.length(index))
        if not data:
            break
        have[index] = manifest.matches(index, data)
    return have


def _pwrite(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        # A disk that gets full takes a part, and refuses the rest.
        written += os.pwrite(descriptor, data[written:], offset + written)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


transfer_log = EventLog("transfer")


class Download:
    """The download of a published blob into the store; the receiver keeps the timers.

    Args:
        store: where it goes.
        manifest: what it is.
        owner: who sends it; unfinished blobs of different senders never mix.
        send: sends the request for the missing chunks to the blob's sender.
        now: monotonic clock, seconds.

    Raises:
        StorageError: the disk is full or fails.
    """

    def __init__(
        self, store: BlobStore, manifest: BlobManifest, *, owner: str, send: Callable[[BlobNeed], None], now: float
    ) -> None:
        self.manifest = manifest
        self._incoming = store.receive(manifest, owner=owner, now=now)
        self._send = send

    @property
    def progress(self) -> tuple[int, int]:
        """Chunks that are here, and all."""
        total = self.manifest.num_chunks
        return total - self._incoming.receiver.num_missing, total

    def request_missing(self, *, now: float) -> bool:
        """Ask for what is missing; True if nothing is, and the blob is in the store."""
        if self._incoming.receiver.is_complete and self._finish():
            return True
        self._send(self._incoming.receiver.make_request(resend=True, now=now))
        return False

    def add_chunk(self, index: int, data: bytes, *, now: float) -> bool:
        """Take a chunk; True if the blob is now whole and in the store.

        Raises:
            FederationError: all chunks are right and the whole is not, again and again.
        """
        receiver = self._incoming.receiver
        kind = self._incoming.add_chunk(index, data, now=now)
        if kind is ChunkKind.DAMAGED:
            transfer_log.warning("chunk_damaged", sha256=self.manifest.sha256[:12], chunk=index)
        if kind is ChunkKind.NEW and receiver.is_complete:
            # The acknowledgement ends the sender's interest in us; after a wrong hash `request_missing` begins anew.
            self._send(receiver.make_request(resend=False, now=now))
            return self._finish() or self.request_missing(now=now)
        if receiver.ack_due(now):
            self._send(receiver.make_request(resend=False, now=now))
        return False

    def tick(self, now: float) -> None:
        """Ask again if nothing came for a while."""
        if self._incoming.receiver.is_stalled(now):
            self._send(self._incoming.receiver.make_request(resend=True, now=now))

    def close(self) -> None:
        """Stop; what has come stays on disk."""
        self._incoming.close()

    def _finish(self) -> bool:
        if self._incoming.finish():
            return True
        if not self._incoming.receiver.restart():
            raise FederationError(f"blob {self.manifest.sha256[:12]} does not have its announced hash")
        return False
