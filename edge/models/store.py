"""Packages in the state folder, and whether one may judge here, as far as can be told without trying it on parts.

STATE/models/<sha256>.edgeflame     taken, or being checked
STATE/models/incoming/              arriving; see :mod:`edgeflame.transfer.store`
STATE/models/shadow/<sha256>/       the report of a shadow run, and pictures of the parts it judged most differently
STATE/models/record.json            what was decided; see :mod:`edge.models.state`
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from edgeflame.errors import DataError, EdgeFlameError, NegativeAnswerError, PackageError, RuntimeUnavailableError
from edgeflame.mqtt.messages import Release
from edgeflame.package import Package, read_package
from edgeflame.signing import public_key_id, read_signature, verify_signature
from edgeflame.state import fsync_folder, storage_errors
from edgeflame.transfer.store import BlobStore


class RefusedError(EdgeFlameError):
    """A package is not taken.

    Args:
        reason: a word for machines.
        detail: for people.
    """

    exit_code = PackageError.exit_code

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TrustedKeys:
    """The keys whose packages are taken.

    Raises:
        UsageError: a file is no public Ed25519 key.
        MissingDependencyError: cryptography is not installed.
    """

    def __init__(self, files: tuple[str, ...]) -> None:
        self._files: Mapping[str, Path] = {public_key_id(Path(file)): Path(file) for file in files}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __str__(self) -> str:
        return ", ".join(sorted(self._files))

    def verify(self, package: Package) -> str:
        """The key that signed exactly this package.

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
            return verify_signature(package, file)
        except PackageError as exc:
            raise RefusedError("altered", str(exc)) from exc


def refuse_announced(release: Release, *, keys: TrustedKeys, max_bytes: int) -> None:
    """Refuse by the announcement alone what would be refused anyway, before its bytes come.

    Raises:
        RefusedError: ``too_large`` or ``untrusted``.
    """
    if release.manifest.size_bytes > max_bytes:
        detail = f"{release.manifest.size_bytes} bytes; at most {max_bytes} are taken (models.max_bytes)"
        raise RefusedError("too_large", detail)
    if release.manifest.codec != "raw":
        raise RefusedError("package", f"announced as {release.manifest.codec!r}; packages travel raw")
    if release.key not in keys:
        raise RefusedError("untrusted", f"announced as signed with key {release.key}; trusted keys are {keys}")


def read_trusted(path: Path, *, sha256: str, product: str, keys: TrustedKeys) -> Package:
    """Read a package and hold it to what it is to be.

    Args:
        path: of the file.
        sha256: the file's.
        product: its product.
        keys: one of them has to have signed it.

    Raises:
        RefusedError: ``package`` (broken, or of a format that is not read), ``hash``, ``unsigned``, ``untrusted``,
            ``altered`` or ``product``.
    """
    try:
        package = read_package(path)
    except PackageError as exc:
        # The path is ours and says nothing to who published it.
        raise RefusedError("package", str(exc).removeprefix(f"{path}: ")) from exc
    if package.sha256 != sha256:
        raise RefusedError("hash", f"the file's SHA-256 is {package.sha256}, announced was {sha256}")
    keys.verify(package)
    if package.manifest.product != product:
        raise RefusedError("product", f"the package is for {package.manifest.product[:80]!r}, not for {product[:80]!r}")
    return package


def as_refusal(exc: EdgeFlameError) -> RefusedError:
    """Why a package that was read cannot be opened here, as a refusal."""
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


MODELS_FOLDER, RECORD_FILE = "models", "record.json"
PUBLISHER_OWNER = "publisher"
"""Whose unfinished packages these are, in the blob store."""

_PACKAGE = re.compile(r"([0-9a-f]{64})\.edgeflame")
"""Only files named like this are ever deleted."""


class PackageStore:
    """The folder of packages, used by one process.

    Raises:
        StorageError: here and in every method, when the disk fails.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_errors(root, "create the folder for models"):
            root.mkdir(parents=True, exist_ok=True)
        self.incoming = BlobStore(root / "incoming")

    def path(self, sha256: str) -> Path:
        """Where a package is, if it is there."""
        return self._root / f"{sha256}.edgeflame"

    def shadow_folder(self, sha256: str) -> Path:
        """For what a shadow run leaves."""
        return self._root / "shadow" / sha256

    def adopt(self, sha256: str) -> Path:
        """Move a package that has arrived to its place, durably; or find that it is there already."""
        path, arrived = self.path(sha256), self.incoming.path(sha256)
        with storage_errors(path, "store a package"):
            if arrived.is_file():
                arrived.replace(path)
                fsync_folder(self._root)
        return path

    def has(self, sha256: str) -> bool:
        """Whether a package is there, or has arrived."""
        return self.path(sha256).is_file() or sha256 in self.incoming

    def prune(self, keep: Collection[str], reports: Collection[str]) -> None:
        """Delete all packages but these, and all reports of shadow runs but those."""
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
        """Delete what has come of a package that is not wanted any more; it may not be open."""
        with contextlib.suppress(OSError):
            (self._root / "incoming" / "partial" / PUBLISHER_OWNER / sha256).unlink(missing_ok=True)
