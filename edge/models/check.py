"""Whether a fetched package may judge on this line: everything that can be said without trying it on parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeflame.errors import DataError, EdgeFlameError, NegativeAnswerError, PackageError, RuntimeUnavailableError
from edgeflame.package import Package, read_package
from edgeflame.releases.messages import Release
from edgeflame.signing import public_key_id, read_signature, verify_signature


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


def refuse_unseen(release: Release, *, keys: TrustedKeys, max_bytes: int) -> None:
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


def refusal(exc: EdgeFlameError) -> RefusedError:
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
