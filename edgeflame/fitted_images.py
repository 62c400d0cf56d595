"""Which images a model was fitted on, so that they are not taken for new ones: a digest each, never the image.

A digest is over the pixels as they were decoded, so that a copy is recognised under another name, in another folder,
and in another format without loss. It tells nothing about an image to whoever does not have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from edgeflame.errors import PackageError
from edgeflame.images import ImageU8, ImageU16, printable_name

DIGEST_BYTES = 16

MAX_FITTED_BYTES = DIGEST_BYTES << 20
"""Of a million images."""


def image_digest(frame: ImageU8 | ImageU16) -> bytes:
    """The digest of a decoded frame ``[height, width, 3]``, before it is cropped or resized."""
    digest = hashlib.blake2b(repr(frame.shape).encode(), digest_size=DIGEST_BYTES)
    digest.update(frame.tobytes())
    return digest.digest()


def known_among(found: Mapping[Path, bytes], known: Collection[bytes]) -> str | None:
    """How many images, given by their digests, are among the known ones, in words for a message; None if none is."""
    names = [path for path, digest in found.items() if digest in known]
    return f"{len(names)} of {len(found)} images, such as {printable_name(str(names[0]))}," if names else None


def encode_fitted_images(digests: Iterable[bytes]) -> bytes:
    """The package's member: digests one after another in rising order, of no more images than it may hold."""
    return b"".join(sorted(set(digests))[: MAX_FITTED_BYTES // DIGEST_BYTES])


def decode_fitted_images(data: bytes) -> frozenset[bytes]:
    """Read the member.

    Raises:
        PackageError: it is no list of digests.
    """
    if len(data) % DIGEST_BYTES:
        raise PackageError(f"not a list of fitted images ({len(data)} bytes are no digests of {DIGEST_BYTES})")
    return frozenset(data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES))
