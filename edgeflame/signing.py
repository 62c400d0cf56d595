"""Signed packages: Ed25519 over the manifest, which holds the SHA-256 of every other member.

The signature covers the manifest's bytes as they lie in the package, after a prefix that no other signature of
EdgeFlame shares. It is a member of its own, ``signature.json``, so that signing changes nothing that is signed. Keys
are PEM files: PKCS #8 for the private key, SubjectPublicKeyInfo for the public one, as OpenSSL writes them.

A package is good for ever, and so is its signature; that there is a newer one it cannot know. So whoever signs numbers
the release, in rising order for each product, and signs the number with the manifest; a line takes no lower one than it
has seen. That signature is a second one beside the first, which earlier versions verify alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgeflame.archive import open_archive, write_archive
from edgeflame.errors import PackageError, StorageError, UsageError, require_extra
from edgeflame.package import MANIFEST_MEMBER, SIGNATURE_MEMBER, Package, PackageHead, read_members, read_package
from edgeflame.state import fsync_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM = "ed25519"
PREFIX = b"EdgeFlame package manifest 1\n"
RELEASE_PREFIX = b"EdgeFlame package release 1\n"
MAX_RELEASE_NUMBER = 2**53

PRIVATE_KEY, PUBLIC_KEY = "edgeflame-key.pem", "edgeflame-key.pub"
"""Names of the files that :func:`write_keys` makes."""

_MAX_KEY_BYTES = 1 << 16


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """The member ``signature.json``."""

    algorithm: str
    key_id: str
    """First 16 hexadecimal digits of the SHA-256 of the raw public key."""
    signature: str
    """Base64 of 64 bytes."""
    release: Annotated[int, msgspec.Meta(ge=0, le=MAX_RELEASE_NUMBER)] = 0
    """The release's number; 0 in packages of earlier versions, which have none."""
    release_signature: str = ""
    """Base64 of 64 bytes: over the number and the manifest."""


def write_keys(folder: Path) -> str:
    """Make a key pair; the private key is readable by its owner alone. Neither file is ever overwritten.

    Returns:
        The key's id.

    Raises:
        StorageError: a file is there already, or cannot be written.
        MissingDependencyError: cryptography is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    files = ((folder / PRIVATE_KEY, secret, 0o600), (folder / PUBLIC_KEY, public, 0o644))
    for path, _, _ in files:
        if path.exists():
            raise StorageError(f"{path}: there is a key already; it is not overwritten")
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data, mode in files:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        fsync_folder(folder)
    except OSError as exc:
        # An empty key would be taken for one that must not be overwritten.
        for path in made:
            path.unlink(missing_ok=True)
        raise StorageError(f"{folder}: the keys cannot be written ({exc.strerror})") from exc
    return key_id(private.public_key())


def sign_package(path: Path, private_key: Path, *, release: int | None = None) -> str:
    """Sign a package in place, atomically; an earlier signature is replaced.

    Args:
        path: the package.
        private_key: the key's file.
        release: the release's number; None: the one that this key has given it before, or else the time, in seconds
            since 1970, which is higher than that of any release before.

    Returns:
        The key's id.

    Raises:
        PackageError: not a sound package.
        UsageError: not a private Ed25519 key.
        StorageError: it cannot be written; the old file is intact.
        MissingDependencyError: cryptography is not installed.
    """
    key = _read_private(private_key)
    package = read_package(path)
    identity = key_id(key.public_key())
    number = release or _release_given(package, key.public_key()) or int(time.time())
    signature = Signature(
        algorithm=ALGORITHM,
        key_id=identity,
        signature=base64.b64encode(key.sign(PREFIX + package.manifest_json)).decode(),
        release=number,
        release_signature=base64.b64encode(key.sign(_numbered(number, package.manifest_json))).decode(),
    )
    with open_archive(path) as archive:
        members = read_members(path, archive, package.manifest)
    document = msgspec.json.format(msgspec.json.encode(signature), indent=2)
    write_archive(path, {MANIFEST_MEMBER: package.manifest_json, **members, SIGNATURE_MEMBER: document})
    return identity


def read_signature(package: Package | PackageHead) -> Signature | None:
    """A package's signature, unverified; None if it has none.

    Raises:
        PackageError: there is one that cannot be read.
    """
    if package.signature_json is None:
        return None
    try:
        return msgspec.json.decode(package.signature_json, type=Signature)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PackageError(f"the package's {SIGNATURE_MEMBER} cannot be read ({exc})") from exc


def verify_release(package: Package | PackageHead, public_key: Path) -> int:
    """The number that the holder of a key gave to this release of exactly this package; 0 if none was given.

    Raises:
        PackageError: a number was altered, or is of another package. Whether the package itself is signed says
            :func:`verify_signature`.
        UsageError: not a public Ed25519 key.
        MissingDependencyError: cryptography is not installed.
    """
    key = _read_public(public_key)
    signature = read_signature(package)
    if signature is None or not signature.release:
        return 0
    if not _is_signed(key, signature.release_signature, _numbered(signature.release, package.manifest_json)):
        raise PackageError(
            f"the package's release number {signature.release} was altered after key {key_id(key)} signed it"
        )
    return signature.release


def _release_given(package: Package, key: Ed25519PublicKey) -> int:
    try:
        signature = read_signature(package)
    except PackageError:
        return 0
    if signature is None:
        return 0
    signed = _numbered(signature.release, package.manifest_json)
    return signature.release if _is_signed(key, signature.release_signature, signed) else 0


def _numbered(release: int, manifest_json: bytes) -> bytes:
    return RELEASE_PREFIX + f"{release}\n".encode() + manifest_json


def _is_signed(key: Ed25519PublicKey, signature: str, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(signature, validate=True), data)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def verify_signature(package: Package | PackageHead, public_key: Path) -> str:
    """Make sure that the holder of a key signed exactly this package.

    What was verified is the package in memory: the file may change afterwards without effect. Of a head, read before
    the rest, it is the manifest; the rest is read by the manifest's hashes.

    Returns:
        The key's id.

    Raises:
        PackageError: unsigned, signed by another key, or altered since.
        UsageError: not a public Ed25519 key.
        MissingDependencyError: cryptography is not installed.
    """
    key = _read_public(public_key)
    expected = key_id(key)
    signature = read_signature(package)
    if signature is None:
        raise PackageError(
            f"the package is not signed; a signature of key {expected} is asked for (edgeflame model sign)"
        )
    if signature.algorithm != ALGORITHM:
        raise PackageError(f"the package is signed with {signature.algorithm!r}; this version verifies {ALGORITHM}")
    if signature.key_id != expected:
        raise PackageError(f"the package is signed with key {signature.key_id!r}, not with {expected}")
    if not _is_signed(key, signature.signature, PREFIX + package.manifest_json):
        raise PackageError(
            f"the package was altered after key {expected} signed it: the signature does not fit its manifest"
        )
    return expected


def key_id(key: Ed25519PublicKey) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the raw public key."""
    from cryptography.hazmat.primitives import serialization

    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def public_key_id(path: Path) -> str:
    """The id of a public key's file.

    Raises:
        UsageError: not a public Ed25519 key.
        MissingDependencyError: cryptography is not installed.
    """
    return key_id(_read_public(path))


def _read_private(path: Path) -> Ed25519PrivateKey:
    data = _read_key(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise UsageError(
            f"{path}: not an unencrypted private key in PEM form (edgeflame model keygen makes one)"
        ) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path}: not an Ed25519 key")
    return key


def _read_public(path: Path) -> Ed25519PublicKey:
    data = _read_key(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UsageError(f"{path}: not a public key in PEM form") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path}: not an Ed25519 key")
    return key


def _read_key(path: Path) -> bytes:
    _require_cryptography()
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_KEY_BYTES)
    except OSError as exc:
        raise UsageError(f"{path}: the key cannot be read ({exc.strerror})") from exc


def _require_cryptography() -> None:
    with require_extra("sign", "signatures need cryptography"):
        import cryptography  # noqa: F401 - asked for by name, with one message for all its parts
