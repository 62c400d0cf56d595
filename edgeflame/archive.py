"""The zip that a package is: stored members, written whole or not at all, read with nothing taken on trust."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from edgeflame.errors import PackageError, StorageError


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    """Write members in their order, whole or not at all; an existing file is replaced atomically.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                # A fixed time stamp: the same model gives the same file.
                archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        msg = f"{path}: cannot write the model package ({exc.strerror})"
        raise StorageError(msg) from exc


def check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Members together are no larger than the file: entries that share bytes could otherwise multiply it.

    Raises:
        PackageError: they are.
    """
    # Compressed ones are refused when they are read.
    stored = [info.file_size for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
    claimed, there = sum(stored), path.stat().st_size
    if claimed > there:
        msg = f"{path}: not a model package, or damaged (its members claim {claimed} bytes, the file has {there})"
        raise PackageError(msg)


def read_small_member(path: Path, archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes | None:
    """A member with a limit of its own, None if there is none of that name.

    Raises:
        PackageError: it is compressed or too large.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        return None
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > max_bytes:
        msg = f"{path}: not a model package (its {name} is compressed or too large)"
        raise PackageError(msg)
    return archive.read(info)


def read_member(path: Path, archive: zipfile.ZipFile, name: str, *, sha256: str | None) -> bytes:
    """A member whose hash is known.

    Raises:
        PackageError: it is missing, compressed, or not the one with that hash.
    """
    try:
        info = archive.getinfo(name)
    except KeyError as exc:
        msg = f"{path}: {name} is missing"
        raise PackageError(msg) from exc
    # Members are stored, so none can be larger than the file that holds it.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
        msg = f"{path}: {name} is compressed or larger than the package"
        raise PackageError(msg)
    data = archive.read(info)
    if hashlib.sha256(data).hexdigest() != sha256:
        msg = f"{path}: {name} was altered or damaged (its SHA-256 is not the manifest's)"
        raise PackageError(msg)
    return data
