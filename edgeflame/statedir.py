"""A role's state directory: one process at a time, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgeflame.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into :class:`StorageError`, naming the path and what was tried."""
    try:
        yield
    except OSError as exc:
        msg = f"{path}: cannot {doing} ({exc.strerror or exc})"
        raise StorageError(msg) from exc


@contextlib.contextmanager
def locked_state_dir(path: Path) -> Iterator[Path]:
    """Create a state directory if need be, and keep other processes out of it meanwhile.

    The lock goes with the process, however it ends.

    Raises:
        StorageError: it cannot be written, or another process uses it.
    """
    with storage_errors(path, "use as a state directory"):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            msg = f"{path}: the state directory is in use by another process (pid {owner}); give this one its own"
            raise StorageError(msg) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield path
    finally:
        os.close(descriptor)


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
