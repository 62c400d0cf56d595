"""The state of the files of a watched folder: which are to be read now, which have to wait, and which are given up.

Theory of operation
-------------------
A file is identified by its name, size and time of change. One that has been read or given up is *done*, and comes again
only if it is written anew. Any other is *pending*: it was seen in the folder, or the kernel reported it. A pending file
is *tried* (read and decoded) as soon as the kernel reports that it was moved into place, or when size and time have not
changed for ``settle_s``: a writer may still set the time or the name of a file that it has closed. If that fails, the
file is tried again when it has changed; if it has not changed for ``deadline_s``, or still changes after
``LONGEST_WRITE`` times as long, it is given up.

A pending file that disappears is lost, unless it was only renamed.

:class:`Disposal` keeps, moves to ``done/`` or deletes a file once its result is on the disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from edge.result import FileOrigin, Inspected
from edgeflame.errors import DataError
from edgeflame.images import MAX_PIXELS, ImageU8, ImageU16, decode_samples, printable_name
from edgeflame.log import EventLog

LONGEST_WRITE = 10
"""Number of deadlines after which a file that is still being written is given up."""


class FileIdentity(NamedTuple):
    """Size and time of change of a file, by which another version of it is recognised."""

    size: int
    mtime_ns: int


class SeenFile(NamedTuple):
    """A file as found in the file system."""

    identity: FileIdentity
    inode: int


@dataclass
class _Pending:
    order: int
    first_seen_s: float
    changed_s: float
    seen: SeenFile | None = None
    is_hinted: bool = False
    """Whether the kernel has reported that it was moved here."""
    is_old: bool = False
    """Whether it had not changed for ``settle_s`` when it was first seen."""
    tried: FileIdentity | None = None
    failure: str | None = None


class IncompleteFile(NamedTuple):
    """A file that is given up as incomplete."""

    name: str
    identity: FileIdentity
    reason: str


class Arrivals:
    """The state of the files of one folder.

    Args:
        done: name and identity of the files that are done already.
        settle_s: how long size and time must be unchanged before a file is read, seconds.
        deadline_s: time without a change after which an incomplete file is given up, seconds.
    """

    def __init__(self, done: dict[str, FileIdentity], *, settle_s: float, deadline_s: float) -> None:
        self.done = done
        self._settle_s = settle_s
        self._deadline_s = deadline_s
        self._pending: dict[str, _Pending] = {}
        self._missing_since_s: dict[str, float] = {}
        """Pending files that have disappeared, and since when."""
        self._order = 0

    @property
    def pending(self) -> list[str]:
        """Names of the pending files."""
        return list(self._pending)

    def moved_in(self, name: str, now_s: float) -> None:
        """The kernel has reported that a file was moved into place."""
        pending = self._get(name, now_s)
        pending.order, pending.is_hinted, pending.tried = self._next_order(), True, None

    def changed(self, name: str, now_s: float) -> None:
        """The kernel has reported that a file was created, or that its writer has closed it."""
        # Files are read in the order in which they were completed.
        self._get(name, now_s).order = self._next_order()

    def renamed(self, old: str) -> None:
        """The kernel has reported that a file got another name, for which :meth:`moved_in` is called as well."""
        self._drop(old)

    def observe(self, name: str, seen: SeenFile | None, now_s: float, *, is_old: bool = False) -> None:
        """Record what was found of a file in the file system.

        Args:
            name: the file's name.
            seen: the file; None: it does not exist.
            now_s: monotonic clock.
            is_old: whether it has not changed for ``settle_s`` by its own time of change.
        """
        if seen is None:
            if name in self._pending:
                self._missing_since_s.setdefault(name, now_s)
            return
        if self.done.get(name) == seen.identity:
            self._drop(name)
            return
        is_new = name not in self._pending
        if is_new:
            self._drop_former_names(seen.inode)
        pending = self._get(name, now_s)
        self._missing_since_s.pop(name, None)
        if pending.seen is None:
            pending.is_old = is_old
        elif pending.seen.identity != seen.identity:
            pending.changed_s, pending.is_old = now_s, False
        pending.seen = seen

    def ready(self, now_s: float) -> list[str]:
        """Files to be tried now, in the order of their arrival."""
        found = [
            (pending.order, name)
            for name, pending in self._pending.items()
            if pending.seen is not None
            and name not in self._missing_since_s
            and pending.tried != pending.seen.identity
            and (pending.is_hinted or pending.is_old or now_s - pending.changed_s >= self._settle_s)
        ]
        return [name for _, name in sorted(found)]

    def failed(self, name: str, identity: FileIdentity, reason: str) -> None:
        """Record that a file was tried and could not be read."""
        pending = self._pending.get(name)
        if pending is not None:
            pending.tried, pending.failure, pending.is_hinted = identity, reason, False

    def mark_done(self, name: str, identity: FileIdentity) -> None:
        """Record that a file has been read or given up."""
        self._drop(name)
        self.done[name] = identity

    def given_up(self, now_s: float) -> Iterator[IncompleteFile]:
        """Yield the files that are given up as incomplete; they are done."""
        for name, pending in list(self._pending.items()):
            if pending.seen is None or name in self._missing_since_s:
                continue
            unchanged_s, age_s = now_s - pending.changed_s, now_s - pending.first_seen_s
            if pending.tried == pending.seen.identity and unchanged_s >= self._deadline_s:
                reason = f"not complete {self._deadline_s:g} s after its last change: {pending.failure}"
            elif age_s >= LONGEST_WRITE * self._deadline_s:
                reason = f"still being written after {LONGEST_WRITE * self._deadline_s:g} s"
            else:
                continue
            self.mark_done(name, pending.seen.identity)
            yield IncompleteFile(name, pending.seen.identity, reason)

    def lost(self, now_s: float) -> Iterator[str]:
        """Yield the names of files that disappeared before they could be read; they are forgotten."""
        for name, since_s in list(self._missing_since_s.items()):
            if now_s - since_s >= self._settle_s:
                self._drop(name)
                yield name

    def forget_absent(self, present: Iterable[str]) -> list[str]:
        """Forget done files that no longer exist; returns their names."""
        absent = self.done.keys() - set(present)
        for name in absent:
            del self.done[name]
        return sorted(absent)

    def _get(self, name: str, now_s: float) -> _Pending:
        pending = self._pending.get(name)
        if pending is None:
            pending = _Pending(order=self._next_order(), first_seen_s=now_s, changed_s=now_s)
            self._pending[name] = pending
        return pending

    def _drop_former_names(self, inode: int) -> None:
        for name in list(self._missing_since_s):
            seen = self._pending[name].seen
            if seen is not None and seen.inode == inode:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._pending.pop(name, None)
        self._missing_since_s.pop(name, None)

    def _next_order(self) -> int:
        self._order += 1
        return self._order


def stat_file(path: Path | os.DirEntry[str]) -> SeenFile | None:
    """A file as it is now; None if it does not exist or is not a regular file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        try:
            # A broken link exists, and cannot be read.
            status = os.lstat(path)
        except OSError:
            return None
        return SeenFile(FileIdentity(status.st_size, status.st_mtime_ns), status.st_ino)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return SeenFile(FileIdentity(status.st_size, status.st_mtime_ns), status.st_ino)


def read_complete(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[FileIdentity, ImageU8 | ImageU16 | None, str]:
    """Read a file; returns its identity, its image or None, and why there is no image.

    Raises:
        FileNotFoundError: it does not exist.
    """
    identity = FileIdentity(-1, -1)
    try:
        with path.open("rb") as stream:
            identity = _identity(stream.fileno())
            data = stream.read()
            if _identity(stream.fileno()) != identity:
                return identity, None, "it changed while it was read"
        return identity, decode_samples(data, printable_name(str(path)), max_pixels=max_pixels), ""
    except FileNotFoundError:
        raise
    except OSError as exc:
        status = stat_file(path)
        return (
            status.identity if status else identity,
            None,
            f"{printable_name(str(path))}: cannot be read ({exc.strerror})",
        )
    except DataError as exc:
        return identity, None, str(exc)


def _identity(descriptor: int) -> FileIdentity:
    status = os.fstat(descriptor)
    return FileIdentity(status.st_size, status.st_mtime_ns)


log = EventLog("watch")

DONE_FOLDER = "done"
"""Name of the folder in the watched folder for files that are done; it is not watched."""


@final
class Disposal:
    """A sink that moves or deletes the files of watched folders; the last one, after all sinks that keep results."""

    def accept(self, inspected: Inspected) -> None:
        if inspected.origin is not None:
            dispose(inspected.origin)

    def close(self) -> None:
        """Nothing to close."""


def dispose(origin: FileOrigin) -> None:
    """Move or delete a file as configured (``after``), unless it has been written anew since.

    A file that cannot be moved or deleted stays, is not inspected again, and is named in the log.
    """
    if origin.after == "keep":
        return
    path = Path(origin.folder, origin.name)
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (origin.size, origin.mtime_ns):
            return
        if origin.after == "delete":
            path.unlink()
            return
        target = Path(origin.folder, DONE_FOLDER, origin.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(_free(target))
    except FileNotFoundError:
        return
    except OSError as exc:
        log.error("file_stays", path=str(path), wanted=origin.after, reason=exc.strerror)


def _free(target: Path) -> Path:
    """The path itself, or one with a number added if it exists already."""
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}-{number}{target.suffix}")
    return free
