"""Released packages in the state folder, and the checks of a package before it is tried on parts.

STATE/models/<sha256>.edgeflame     packages in use or being checked
STATE/models/incoming/              packages being fetched; see :mod:`edgeflame.transfer.store`
STATE/models/shadow/<sha256>/       report of a shadow run, and pictures of the parts with the largest differences
STATE/models/record.json            the decisions; see :mod:`edge.models.state`
STATE/models/release-numbers.json   the highest release number seen, by product
STATE/models/checking               the release being checked; still there at a start, the check ended the process
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from edgeflame.errors import DataError, EdgeFlameError, NegativeAnswerError, PackageError, RuntimeUnavailableError
from edgeflame.mqtt.release_messages import Release
from edgeflame.package import Package, PackageHead, read_package
from edgeflame.signing import public_key_id, read_signature, verify_release, verify_signature
from edgeflame.state import atomic_write, fsync_folder, read_json, storage_errors, write_record
from edgeflame.transfer.store import BlobStore


class RefusedError(EdgeFlameError):
    """A released package is refused.

    Args:
        reason: one word for programs.
        detail: the reason for people.
    """

    exit_code = PackageError.exit_code

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TrustedKeys:
    """The public keys whose packages are accepted.

    Args:
        files: the keys' files.

    Raises:
        UsageError: a file is not a public Ed25519 key.
        MissingDependencyError: cryptography is not installed.
    """

    def __init__(self, files: tuple[str, ...]) -> None:
        self._files: Mapping[str, Path] = {public_key_id(Path(file)): Path(file) for file in files}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __str__(self) -> str:
        return ", ".join(sorted(self._files))

    def verify(self, package: PackageHead) -> int:
        """Verify a package's signature; returns the number of its release, 0 if it has none.

        Raises:
            RefusedError: ``unsigned``, ``untrusted`` or ``altered``.
        """
        try:
            signature = read_signature(package)
        except PackageError as exc:
            raise RefusedError("unsigned", str(exc)) from exc
        if signature is None:
            raise RefusedError("unsigned", f"the package is not signed; trusted keys are {self}")
        file = self._files.get(signature.key_id)
        if file is None:
            raise RefusedError("untrusted", f"signed with key {signature.key_id[:16]!r}; trusted keys are {self}")
        try:
            verify_signature(package, file)
            return verify_release(package, file)
        except PackageError as exc:
            raise RefusedError("altered", str(exc)) from exc

    def release_number(self, package: Package) -> int:
        """The number of a package's release; 0 if it has none that a trusted key vouches for."""
        head = PackageHead(
            manifest=package.manifest, manifest_json=package.manifest_json, signature_json=package.signature_json
        )
        try:
            return self.verify(head)
        except RefusedError:
            return 0


def refuse_announced(release: Release, *, keys: TrustedKeys, max_bytes: int) -> None:
    """Check an announcement, so that a package that would be refused anyway is not fetched.

    Raises:
        RefusedError: ``too_large``, ``package`` (its encoding is not read) or ``untrusted``.
    """
    if release.manifest.size_bytes > max_bytes:
        detail = f"{release.manifest.size_bytes} bytes; at most {max_bytes} are taken (models.max_bytes)"
        raise RefusedError("too_large", detail)
    if release.manifest.codec != "raw":
        raise RefusedError("package", f"announced as {release.manifest.codec!r}; packages travel raw")
    if release.key not in keys:
        raise RefusedError("untrusted", f"announced as signed with key {release.key}; trusted keys are {keys}")


def read_trusted(path: Path, *, sha256: str, product: str, keys: TrustedKeys, least: int = 0) -> int:
    """Read a package and check its signature, product and hash; the first two before anything large is read.

    Args:
        path: the package's file.
        sha256: the expected hash of the file.
        product: the expected product.
        keys: the trusted keys.
        least: the lowest release number that is accepted.

    Returns:
        The number of its release; 0 if it has none.

    Raises:
        RefusedError: ``package`` (broken, or of a format that is not read), ``hash``, ``unsigned``, ``untrusted``,
            ``altered``, ``product`` or ``older``.
    """
    number = 0

    def accept(head: PackageHead) -> None:
        nonlocal number
        number = keys.verify(head)
        found = head.manifest.product
        if found != product:
            raise RefusedError("product", f"the package is for {found[:80]!r}, not for {product[:80]!r}")
        if number < least:
            raise RefusedError(
                "older",
                f"release number {number or 'none'}, and number {least} was seen here: an older model, or one signed "
                "by an earlier version. To take it all the same: edgeflame line switch-model ... --allow-older",
            )

    try:
        package = read_package(path, accept=accept)
    except PackageError as exc:
        # Our path means nothing to the publisher.
        raise RefusedError("package", str(exc).removeprefix(f"{path}: ")) from exc
    if package.sha256 != sha256:
        raise RefusedError("hash", f"the file's SHA-256 is {package.sha256}, announced was {sha256}")
    return number


def as_refusal(exc: EdgeFlameError) -> RefusedError:
    """The refusal for an error met while a package was opened."""
    if isinstance(exc, RefusedError):
        return exc
    match exc:
        case NegativeAnswerError():
            reason = "parity"
        case PackageError() | DataError():
            reason = "package"
        case RuntimeUnavailableError():
            reason = "runtime"
        case _:
            reason = "not_opened"
    return RefusedError(reason, str(exc))


MODELS_FOLDER, RECORD_FILE, CHECKING_FILE, NUMBERS_FILE = "models", "record.json", "checking", "release-numbers.json"
PUBLISHER_OWNER = "publisher"
"""Owner of unfinished packages in the blob store."""

_PACKAGE = re.compile(r"([0-9a-f]{64})\.edgeflame")
"""Only files named like this are ever deleted."""


class PackageStore:
    """The folder of packages, used by one process.

    Args:
        root: the folder; created if it does not exist.

    Raises:
        StorageError: the disk fails; so in every method.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_errors(root, "create the folder for models"):
            root.mkdir(parents=True, exist_ok=True)
        self.incoming = BlobStore(root / "incoming")

    def path(self, sha256: str) -> Path:
        """Path of a package, whether or not it exists."""
        return self._root / f"{sha256}.edgeflame"

    def shadow_folder(self, sha256: str) -> Path:
        """Folder for the report and the pictures of a shadow run."""
        return self._root / "shadow" / sha256

    def adopt(self, sha256: str) -> Path:
        """Move a package that has arrived to its place, durably; returns its path. Does nothing if it is there."""
        path, arrived = self.path(sha256), self.incoming.path(sha256)
        with storage_errors(path, "store a package"):
            if arrived.is_file():
                arrived.replace(path)
                fsync_folder(self._root)
        return path

    def has(self, sha256: str) -> bool:
        """Whether a package is in its place, or has arrived."""
        return self.path(sha256).is_file() or sha256 in self.incoming

    @contextlib.contextmanager
    def checking(self, release: str) -> Iterator[None]:
        """Keep on the disk, while the block runs, that a release is being checked."""
        atomic_write(self._root / CHECKING_FILE, release.encode())
        try:
            yield
        finally:
            self.forget_check()

    def died_checking(self, release: str) -> bool:
        """Whether a process ended, other than in order, while it was checking a release."""
        path = self._root / CHECKING_FILE
        with storage_errors(path, "read"):
            return path.is_file() and path.read_bytes() == release.encode()

    def release_number(self, product: str) -> int | None:
        """The highest release number seen of a product, or the one that a person has allowed since; None: none."""
        return self._release_numbers().get(product)

    def keep_release_number(self, product: str, number: int) -> None:
        """Keep a product's release number, durably."""
        numbers = self._release_numbers()
        if numbers.get(product) != number:
            write_record(self._root / NUMBERS_FILE, {**numbers, product: number})

    def _release_numbers(self) -> dict[str, int]:
        path = self._root / NUMBERS_FILE
        advice = f"without it older models are taken: move {path.name} away if that is what you want"
        return read_json(path, dict[str, int], advice=advice) or {}

    def forget_check(self) -> None:
        """Forget which release was being checked: it was decided about, or the process ends in order."""
        with storage_errors(self._root, "tidy up"):
            (self._root / CHECKING_FILE).unlink(missing_ok=True)

    def prune(self, keep: Collection[str], reports: Collection[str]) -> None:
        """Delete all packages but those of ``keep``, and all reports of shadow runs but ``reports`` (SHA-256 each)."""
        with storage_errors(self._root, "tidy up"):
            for path in self._root.iterdir():
                match = _PACKAGE.fullmatch(path.name)
                if match and match[1] not in keep:
                    path.unlink(missing_ok=True)
            for folder in (self._root / "shadow").glob("*"):
                if folder.name not in reports:
                    shutil.rmtree(folder, ignore_errors=True)
        self.incoming.prune(keep)

    def forget_partial(self, sha256: str) -> None:
        """Delete the part of a package that has been fetched so far; its download must have been closed."""
        with contextlib.suppress(OSError):
            (self._root / "incoming" / "partial" / PUBLISHER_OWNER / sha256).unlink(missing_ok=True)
