"""A role's state directory: one process at a time, files that are there whole or not at all, and a format.

``STATE/state.json`` says whose state it is and in which format. A folder without one is of the first format, from
before the file: it is given one. What a newer EdgeFlame has left in another format is refused before anything in it is
read or written; ``docs/upgrades.md`` has the policy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from edgeflame import __version__
from edgeflame.errors import StorageError
from edgeflame.log import EventLog

log = EventLog("state")

StateKind = Literal["aggregator", "site", "line", "simulation"]
"""Whose state a directory may hold."""

STATE_FORMAT = 1
"""Of all that lies in a state directory. Raised when an older version could no longer read what a newer one wrote; the
one that raises it brings the migration along."""

MARKER = "state.json"


class _Marker(msgspec.Struct, frozen=True, kw_only=True):
    holds: str
    format: int
    edgeflame: str
    """The version that made it so."""


@contextlib.contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into :class:`StorageError`, naming the path and what was tried."""
    try:
        yield
    except OSError as exc:
        raise StorageError(f"{path}: cannot {doing} ({exc.strerror or exc})") from exc


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
def locked_state_dir(path: Path, *, holds: StateKind | None = None) -> Iterator[Path]:
    """Create a state directory if need be, and keep other processes out of it meanwhile.

    The lock goes with the process, however it ends.

    Args:
        path: the directory.
        holds: whose state it is to be; None: of somebody who looks after its format himself.

    Raises:
        StorageError: it cannot be written, another process uses it, it is somebody else's, or of a later format.
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
        if holds is not None:
            _claim(path, holds)
        yield path
    finally:
        os.close(descriptor)


def _claim(path: Path, holds: StateKind) -> None:
    """Check the directory's marker; make it if there is none."""
    marker = _read_marker(path / MARKER)
    if marker is None:
        mine = _Marker(holds=holds, format=STATE_FORMAT, edgeflame=__version__)
        write_durably(path / MARKER, msgspec.json.encode(mine) + b"\n")
        return
    check_format_version(f"{path}: the state", found=marker.format, known=STATE_FORMAT, written_by=marker.edgeflame)
    if marker.holds != holds:
        raise StorageError(
            f"{path}: the state of another kind ({marker.holds}, wanted: {holds}); give this one a folder of its own"
        )


def _read_marker(path: Path) -> _Marker | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageError(f"{path}: cannot read ({exc.strerror})") from exc
    try:
        return msgspec.json.decode(data, type=_Marker)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        # Databases in the folder have versions of their own: no reason to stand still for this file alone.
        log.warning("state_marker_damaged", file=str(path), reason=str(exc))
        return None


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


def write_durably(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a small file whole or not at all, and onto the disk before returning.

    Args:
        path: the file.
        data: its contents.
        mode: its permissions from its first byte on; None: as the umask says.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path, "write"):
        # What a crash left may be readable by more than ``mode`` allows.
        partial.unlink(missing_ok=True)
        with partial.open("wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        fsync_folder(path.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file whole or not at all, and onto the disk before returning.

    Raises:
        StorageError: it cannot be read or written; an old file at ``target`` is intact.
    """
    partial = target.with_name(f".{target.name}.partial")
    with storage_errors(target, f"copy {source.name} to"):
        with source.open("rb") as reader, partial.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
        partial.replace(target)
        fsync_folder(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Have a file that is never written again under another name: a hard link, or where there are none, a copy.

    Raises:
        StorageError: it cannot be read or written; an old file at ``target`` is intact.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.link(source, partial)
        partial.replace(target)
        # Where the two were one file already, renaming leaves both names.
        partial.unlink(missing_ok=True)
        fsync_folder(target.parent)
    except OSError:
        copy_durably(source, target)


def fsync_folder(folder: Path) -> None:
    """Put a folder's entries (a file renamed into it, say) onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
