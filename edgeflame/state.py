"""A role's state directory: one process at a time, files that are there whole or not at all, and a format.

``STATE/state.json`` says whose state it is and in which format. A folder without that file is of the first format,
which had none; it gets one. What a newer EdgeFlame has left in another format is refused before anything in it is read
or written; ``docs/upgrades.md`` has the policy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import msgspec

from edgeflame import __version__
from edgeflame.errors import StorageError
from edgeflame.log import EventLog

log = EventLog("state")

T = TypeVar("T")

StateKind = Literal["aggregator", "site", "line", "simulation"]
"""Whose state a directory may hold."""

STATE_FORMAT = 1
"""The format of everything in a state directory. It is raised when an older version could no longer read what a newer
one wrote; the version that raises it brings the migration."""

MARKER = "state.json"


class _Marker(msgspec.Struct, frozen=True, kw_only=True):
    holds: str
    format: int
    edgeflame: str
    """The version of EdgeFlame that wrote the marker."""


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Turn the operating system's errors into :class:`StorageError`, naming the path and what was tried."""
    try:
        yield
    except OSError as exc:
        raise StorageError(f"{path}: cannot {action} ({exc.strerror or exc})") from exc


class FormatHead(msgspec.Struct, frozen=True):
    """What every format of a file says of itself; decode this before the file's own format."""

    format: int = 1


def check_format_version(what: str, *, found: int, known: int, written_by: str | None = None) -> None:
    """Refuse what is of a later format than this version knows.

    Raises:
        StorageError: it is.
    """
    if found > known:
        by = f" of EdgeFlame {written_by}" if written_by else ""
        raise StorageError(
            f"{what} is of format {found}{by}; this EdgeFlame {__version__} reads up to {known}: install the "
            "newer version again, or go back to the backup made before the upgrade"
        )


@contextlib.contextmanager
def locked_state_dir(path: Path, *, kind: StateKind | None = None) -> Iterator[Path]:
    """Create a state directory if need be, and keep other processes out of it meanwhile.

    The lock goes with the process, however it ends.

    Args:
        path: the directory.
        kind: whose state it is; None for folders with a format of their own, which are given no marker.

    Raises:
        StorageError: it cannot be written, another process uses it, it is of another kind, or of a later format.
    """
    with storage_errors(path, "use as a state directory"):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise StorageError(
                f"{path}: the state directory is in use by another process (pid {owner}); give this one its own"
            ) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        if kind is not None:
            _claim(path, kind)
        yield path
    finally:
        os.close(descriptor)


def _claim(path: Path, kind: StateKind) -> None:
    """Check the directory's marker, or write one if it has none."""
    marker = _read_marker(path / MARKER)
    if marker is None:
        mine = _Marker(holds=kind, format=STATE_FORMAT, edgeflame=__version__)
        atomic_write(path / MARKER, msgspec.json.encode(mine) + b"\n")
        return
    check_format_version(f"{path}: the state", found=marker.format, known=STATE_FORMAT, written_by=marker.edgeflame)
    if marker.holds != kind:
        raise StorageError(
            f"{path}: the state of another kind ({marker.holds}, wanted: {kind}); give this one a folder of its own"
        )


def is_claimed(path: Path, kind: StateKind) -> bool:
    """Whether a directory holds state of this kind, in a format that this version writes."""
    try:
        marker = _read_marker(path / MARKER)
    except StorageError:
        return False
    return marker is not None and marker.holds == kind and marker.format <= STATE_FORMAT


def _read_marker(path: Path) -> _Marker | None:
    with storage_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        return msgspec.json.decode(data, type=_Marker)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # Databases in the folder have versions of their own: no reason to stand still for this file alone.
        log.warning("state_marker_damaged", file=str(path), reason=str(exc))
        return None


def check_still_there(path: Path, inode: int) -> None:
    """Refuse to go on with an open file whose folder was deleted or replaced: what is written to it is nowhere.

    Args:
        path: the file.
        inode: its inode when it was opened.

    Raises:
        StorageError: another file, or none, has its name now.
    """
    with storage_errors(path, "find again"):
        if path.stat().st_ino != inode:
            raise StorageError(f"{path}: it was replaced while it was in use; stop the process, and see to its folder")


def warn_if_empty(path: Path) -> None:
    """Warn of a database that was emptied: SQLite takes it for a new one."""
    with storage_errors(path, "read"):
        if path.is_file() and path.stat().st_size == 0:
            log.warning("database_empty", file=str(path), consequence="what it held, if anything, is lost; begins anew")


def is_in_use(path: Path) -> bool:
    """Whether a process holds a state directory's lock."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path, *, durable: bool = True, mode: int | None = None) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: a partial file beside it takes its place when the block ends without an error.

    Processes and threads may write the same file at once; the last one wins. After an error the partial file is gone.

    Args:
        path: the file.
        durable: have it on the disk, with its folder's entry, before returning.
        mode: its permissions from its first byte on; None: as the umask says.

    Raises:
        StorageError: it cannot be written, or the block raised an ``OSError``; an old file at ``path`` is intact.
    """
    # A thread's number is one that no other thread of any process has.
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    with storage_errors(path, "write"):
        try:
            # What a crash left may be readable by more than ``mode`` allows.
            partial.unlink(missing_ok=True)
            with partial.open("xb") as stream:
                if mode is not None:
                    os.fchmod(stream.fileno(), mode)
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if durable:
            fsync_folder(path.parent)


def atomic_write(path: Path, data: bytes | memoryview, *, durable: bool = True, mode: int | None = None) -> None:
    """Write a file whole or not at all; arguments and errors as :func:`atomic_writer`."""
    with atomic_writer(path, durable=durable, mode=mode) as stream:
        stream.write(data)


def atomic_copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all, and onto the disk before returning.

    Raises:
        StorageError: it cannot be read or written; an old file at ``target`` is intact.
    """
    with storage_errors(source, "read"):
        reader = source.open("rb")
    with reader, atomic_writer(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never written again a second name: by a hard link, or where there are none, as a copy.

    Raises:
        StorageError: it cannot be read or written; an old file at ``target`` is intact.
    """
    partial = target.with_name(f".{target.name}.{threading.get_native_id()}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.link(source, partial)
        partial.replace(target)
        # Where the two were one file already, renaming leaves both names.
        partial.unlink(missing_ok=True)
        fsync_folder(target.parent)
    except OSError:
        atomic_copy(source, target)


_CHECKSUM = re.compile(rb',\s*"crc32": ?"(?P<sum>[0-9a-f]{8})"\s*}\s*\Z')


def write_json(path: Path, value: object, *, indent: int | None = None, mode: int | None = None) -> None:
    """Write a value as JSON, durably: on one line, or with ``indent`` over several and a line feed at the end.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    data = msgspec.json.encode(value)
    atomic_write(path, data if indent is None else msgspec.json.format(data, indent=indent) + b"\n", mode=mode)


def write_record(path: Path, value: object) -> None:
    """Write a record of ours, an object with keys, as JSON, durably, with a checksum: the key ``crc32``.

    :func:`read_json` compares it. Versions without it pass over a key that they do not know, so this is not for structs
    that refuse unknown ones.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    atomic_write(path, with_checksum(msgspec.json.encode(value)))


def with_checksum(data: bytes) -> bytes:
    """A JSON object that has keys, on one line, with its checksum as the last key."""
    return data[:-1] + b',"crc32":"%08x"}' % zlib.crc32(data)


def without_checksum(data: bytes) -> bytes | None:
    """The object that :func:`with_checksum` was given, or one that has none as it is; None if its checksum is wrong."""
    found = _CHECKSUM.search(data)
    if found is None:
        return data
    data = data[: found.start()] + b"}"
    return data if int(found["sum"], 16) == zlib.crc32(data) else None


def read_json(path: Path, kind: type[T], *, advice: str) -> T | None:
    """Read a JSON file of EdgeFlame's own; where it has a checksum (:func:`write_record`), this is compared.

    Args:
        path: the file.
        kind: what to decode it as.
        advice: what to do when it is damaged, for the message.

    Returns:
        The value, or None if there is no such file.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    with storage_errors(path, "read"):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    sound = without_checksum(data)
    if sound is None:
        raise StorageError(f"{path}: damaged (it does not have its checksum); {advice}")
    try:
        return msgspec.json.decode(sound, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise StorageError(f"{path}: damaged ({exc}); {advice}") from exc


def file_sha256(path: Path) -> str | None:
    """The SHA-256 of a file; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors(path, "read"):
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except FileNotFoundError:
            return None
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Put a folder's entries (a file renamed into it, say) onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Some network file systems cannot do this for a folder.
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
