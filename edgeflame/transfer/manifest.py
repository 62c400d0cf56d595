"""What a blob is before any of its bytes has come: size, hash and the checksums of its chunks."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import FederationError, StorageError

DEFAULT_CHUNK_BYTES = 256 << 10
"""Small enough for every broker's packet limit and for a smooth bounded window, large enough to be fast."""
MAX_CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 1 << 16
"""Keeps a manifest (4 bytes of checksum a chunk) and a need bitmap (a bit a chunk) short; 16 GiB at 256 KiB."""

Codec = Literal["raw", "float16", "zstd", "float16_zstd"]
"""Forms of an update, see :mod:`edgeflame.transfer.codec`; whatever else is sent is raw."""

Mask = npt.NDArray[np.bool_]
"""``[num_chunks]``."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A blob, described. All numbers are checked when it is built, so also when it is decoded."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS * MAX_CHUNK_BYTES)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_BYTES)]
    crc32s: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_CHUNKS)]
    """CRC-32 of each chunk, little-endian: finds a damaged chunk before the whole blob is there."""
    codec: Codec = "raw"
    """What to do to the bytes once they are there; the hash is of what is sent."""

    def __post_init__(self) -> None:
        num_chunks = -(-self.size_bytes // max(self.chunk_bytes, 1))
        if num_chunks > MAX_CHUNKS or len(self.crc32s) != 4 * num_chunks:
            # ValueError, so that msgspec reports it as a validation error of the message it came in.
            msg = f"a manifest of {num_chunks} chunks with {len(self.crc32s)} bytes of checksums"
            raise ValueError(msg)

    @property
    def num_chunks(self) -> int:
        return len(self.crc32s) // 4

    def offset(self, index: int) -> int:
        """Where a chunk begins in the blob, bytes."""
        return index * self.chunk_bytes

    def length(self, index: int) -> int:
        """Size of a chunk, bytes; the last may be shorter."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def matches(self, index: int, data: bytes) -> bool:
        """Whether these are the bytes of a chunk, as far as size and CRC-32 tell."""
        crc = int.from_bytes(self.crc32s[4 * index : 4 * index + 4], "little")
        return len(data) == self.length(index) and zlib.crc32(data) == crc


def describe_file(path: Path, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Manifest:
    """The manifest of a file; reads it once, a chunk at a time.

    Raises:
        StorageError: it cannot be read, is empty, or has more than ``MAX_CHUNKS`` chunks.
    """
    digest = hashlib.sha256()
    crcs = bytearray()
    size = 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(chunk_bytes):
                digest.update(block)
                crcs += zlib.crc32(block).to_bytes(4, "little")
                size += len(block)
    except OSError as exc:
        msg = f"{path}: cannot read ({exc.strerror})"
        raise StorageError(msg) from exc
    if not 1 <= len(crcs) // 4 <= MAX_CHUNKS:
        msg = f"{path}: {size} bytes cannot be sent in 1 to {MAX_CHUNKS} chunks of {chunk_bytes}"
        raise StorageError(msg)
    return Manifest(sha256=digest.hexdigest(), size_bytes=size, chunk_bytes=chunk_bytes, crc32s=bytes(crcs))


def pack_mask(mask: Mask) -> bytes:
    """Bits, lowest first."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(data: bytes, num_chunks: int) -> Mask:
    """Read :func:`pack_mask`'s bits.

    Raises:
        FederationError: not as many bits as there are chunks, or some set beyond the last.
    """
    if len(data) != -(-num_chunks // 8):
        msg = f"a bitmap of {len(data)} bytes for {num_chunks} chunks"
        raise FederationError(msg)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little").astype(np.bool_)
    if bits[num_chunks:].any():
        msg = f"a bitmap with bits set beyond its {num_chunks} chunks"
        raise FederationError(msg)
    return bits[:num_chunks]
