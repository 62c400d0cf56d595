"""The container of a package: a zip whose members are stored, and read without asking for more memory than a bound.

Nothing is unpacked: a compressed member, a name that is there twice, members that share bytes, and a directory larger
than a package's are refused when the file is opened, before a member is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, final

from edgeflame.errors import PackageError
from edgeflame.state import atomic_writer

MAX_DIRECTORY_BYTES = 1 << 20
"""What may be read to find the members: a package has at most some seventy of them, at about 60 bytes each."""
_BLOCK_BYTES = 1 << 20


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    """Write members in their order, whole or not at all; an existing file is replaced atomically.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    with atomic_writer(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            # A fixed time stamp: the same model gives the same file.
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a package's container; it is closed when the block ends.

    Raises:
        PackageError: it cannot be read, or is not such a container; so in the block, from every method.
    """
    try:
        with path.open("rb") as stream:
            bounded = _BoundedReader(stream)
            with zipfile.ZipFile(bounded) as archive:
                bounded.left = None
                yield Archive(path, stream, archive)
    except FileNotFoundError as exc:
        raise PackageError(f"{path}: no such model package") from exc
    except OSError as exc:
        raise PackageError(f"{path}: cannot be read ({exc.strerror})") from exc
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as exc:
        raise PackageError(f"{path}: not a model package, or cut short ({exc})") from exc


@final
class Archive:
    """The members of an open container; made by :func:`open_archive`.

    Raises:
        PackageError: a member is compressed or there twice, or they claim more bytes than the file has.
    """

    def __init__(self, path: Path, stream: BinaryIO, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._stream = stream
        self._archive = archive
        members = archive.infolist()
        self.names = frozenset(info.filename for info in members)
        for info in members:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise PackageError(f"{path}: not a model package (its {ascii(info.filename[:80])[1:-1]} is compressed)")
        claimed, there = sum(info.file_size for info in members), path.stat().st_size
        # Entries that share bytes could otherwise multiply the file.
        if claimed > there:
            raise PackageError(
                f"{path}: not a model package, or damaged (its members claim {claimed} bytes, the file has {there})"
            )
        if len(self.names) != len(members):
            raise PackageError(f"{path}: not a model package (a member is there twice)")

    def check_hash(self, name: str, *, sha256: str | None, max_bytes: int) -> None:
        """Hash a member block by block, so that nothing large is in memory before it is known to be the right one.

        Raises:
            PackageError: it is missing, larger than ``max_bytes``, or not the one with that hash.
        """
        self._require(name, max_bytes)
        digest = hashlib.sha256()
        with self._archive.open(name) as member:
            while block := member.read(_BLOCK_BYTES):
                digest.update(block)
        self._compare(name, digest.hexdigest(), sha256)

    def read(self, name: str, *, sha256: str | None, max_bytes: int) -> bytes:
        """A member whose hash is known; raises as :meth:`check_hash`."""
        self._require(name, max_bytes)
        data = self._archive.read(name)
        self._compare(name, hashlib.sha256(data).hexdigest(), sha256)
        return data

    def read_small(self, name: str, max_bytes: int) -> bytes | None:
        """A member whose hash is not known; None if there is none of that name.

        Raises:
            PackageError: it is larger than ``max_bytes``.
        """
        if name not in self.names:
            return None
        self._require(name, max_bytes)
        return self._archive.read(name)

    def file_sha256(self) -> str:
        """SHA-256 of the whole file."""
        self._stream.seek(0)
        digest = hashlib.sha256()
        while block := self._stream.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()

    def _require(self, name: str, max_bytes: int) -> None:
        if name not in self.names:
            raise PackageError(f"{self._path}: {name} is missing")
        size = self._archive.getinfo(name).file_size
        if size > max_bytes:
            raise PackageError(f"{self._path}: {name} is too large ({size} bytes; at most {max_bytes} are read)")

    def _compare(self, name: str, found: str, expected: str | None) -> None:
        if found != expected:
            raise PackageError(f"{self._path}: {name} was altered or damaged (its SHA-256 is not the manifest's)")


class _BoundedReader:
    """A stream that gives no more than ``MAX_DIRECTORY_BYTES`` until its bound is lifted.

    Opening a zip reads its whole directory, and makes an object for each of its entries.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.left: int | None = MAX_DIRECTORY_BYTES

    def read(self, size: int = -1, /) -> bytes:
        if self.left is None:
            return self._stream.read(size)
        data = self._stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        if len(data) > self.left:
            raise zipfile.BadZipFile(f"its directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        self.left -= len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
