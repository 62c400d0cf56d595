"""The files of a watched folder: which are to be read now, which have to wait, which will never be complete, and what
becomes of them.

Theory of operation
-------------------
A file is known by its name, size and time of change; one that was dealt with is *done*, and comes again only if it is
written anew. Any other is *pending*: it was seen in the folder, or the kernel spoke of it. A pending file is *tried*
(read and decoded) as soon as the kernel says that it was moved into place, or when size and time have not changed for
``settle_s``: also a writer that has closed its file may still set its time, or give it its name. If that fails it waits
until it changes, to be tried again; when it has not changed for ``deadline_s``, or still changes after
``LONGEST_WRITE`` times as long, it is given up.

A pending file that disappears is lost, unless it has only got another name.

Once its result is kept, a file stays, moves to ``done/``, or is deleted.
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
from edgeflame.images import ImageU8, decode_image
from edgeflame.log import EventLog

LONGEST_WRITE = 10
"""A file that is still being written after so many deadlines is no picture of a part."""


class FileIdentity(NamedTuple):
    """What a file was when it was looked at."""

    size: int
    mtime_ns: int


class SeenFile(NamedTuple):
    """A file as the file system has it."""

    identity: FileIdentity
    inode: int


@dataclass
class _Pending:
    order: int
    first_seen_s: float
    changed_s: float
    seen: SeenFile | None = None
    is_hinted: bool = False
    """It was moved here."""
    is_old: bool = False
    """It had not changed for long when it was first seen."""
    tried: FileIdentity | None = None
    failure: str | None = None


class IncompleteFile(NamedTuple):
    """A file that will not be complete."""

    name: str
    identity: FileIdentity
    reason: str


class Arrivals:
    """The files of one folder.

    Args:
        done: name and identity of the files that were dealt with before.
        settle_s: how long size and time of change must stay as they are.
        deadline_s: after how long without a change an incomplete file is given up.
    """

    def __init__(self, done: dict[str, FileIdentity], *, settle_s: float, deadline_s: float) -> None:
        self.done = done
        self._settle_s = settle_s
        self._deadline_s = deadline_s
        self._pending: dict[str, _Pending] = {}
        self._missing_since_s: dict[str, float] = {}
        """Pending files that were there and are not."""
        self._order = 0

    @property
    def pending(self) -> list[str]:
        """Names of the files that wait."""
        return list(self._pending)

    def moved_in(self, name: str, now_s: float) -> None:
        """The kernel says that a file was moved into place."""
        pending = self._get(name, now_s)
        pending.order, pending.is_hinted, pending.tried = self._next_order(), True, None

    def changed(self, name: str, now_s: float) -> None:
        """The kernel says that there is a file, or that its writer has closed it."""
        # Files come in the order in which they were completed.
        self._get(name, now_s).order = self._next_order()

    def renamed(self, old: str) -> None:
        """A file goes by another name now, of which there is a hint as well."""
        self._drop(old)

    def observe(self, name: str, seen: SeenFile | None, now_s: float, *, is_old: bool = False) -> None:
        """What the file system says about a file; None: it is not there.

        Args:
            name: of the file.
            seen: what it is.
            now_s: monotonic clock.
            is_old: by the file system's own clock it has not changed for ``settle_s``.
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
        """A file was tried, in vain."""
        pending = self._pending.get(name)
        if pending is not None:
            pending.tried, pending.failure, pending.is_hinted = identity, reason, False

    def mark_done(self, name: str, identity: FileIdentity) -> None:
        """A file was handed over."""
        self._drop(name)
        self.done[name] = identity

    def given_up(self, now_s: float) -> Iterator[IncompleteFile]:
        """Files that will not be complete; they are done with."""
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
        """Files that were there and are gone before they could be read; they are forgotten."""
        for name, since_s in list(self._missing_since_s.items()):
            if now_s - since_s >= self._settle_s:
                self._drop(name)
                yield name

    def forget_absent(self, present: Iterable[str]) -> list[str]:
        """Drop what is known of done files that are no longer there; returns their names."""
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


def printable(name: str) -> str:
    """A file's name as it may be shown and sent: bytes that are no UTF-8, and control characters, in hexadecimal."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def stat_file(path: Path | os.DirEntry[str]) -> SeenFile | None:
    """A file as it is now; None where there is none, or something else than a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        try:
            # A link to nothing is there, and will not be read.
            status = os.lstat(path)
        except OSError:
            return None
        return SeenFile(FileIdentity(status.st_size, status.st_mtime_ns), status.st_ino)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return SeenFile(FileIdentity(status.st_size, status.st_mtime_ns), status.st_ino)


def read_complete(path: Path) -> tuple[FileIdentity, ImageU8 | None, str]:
    """A file's image, or why there is none, and what the file was while it was read.

    Raises:
        FileNotFoundError: it is not there.
    """
    identity = FileIdentity(-1, -1)
    try:
        with path.open("rb") as stream:
            identity = _identity(stream.fileno())
            data = stream.read()
            if _identity(stream.fileno()) != identity:
                return identity, None, "it changed while it was read"
        return identity, decode_image(data, printable(str(path))), ""
    except FileNotFoundError:
        raise
    except OSError as exc:
        status = stat_file(path)
        return status.identity if status else identity, None, f"{printable(str(path))}: cannot be read ({exc.strerror})"
    except DataError as exc:
        return identity, None, str(exc)


def _identity(descriptor: int) -> FileIdentity:
    status = os.fstat(descriptor)
    return FileIdentity(status.st_size, status.st_mtime_ns)


log = EventLog("watch")

DONE_FOLDER = "done"
"""In the watched folder; never looked into."""


@final
class Disposal:
    """Stands last among the sinks: what is moved or deleted has its result everywhere else."""

    def accept(self, inspected: Inspected) -> None:
        if inspected.origin is not None:
            dispose(inspected.origin)

    def close(self) -> None:
        """Nothing to close."""


def dispose(origin: FileOrigin) -> None:
    """Move or delete a file, as it was asked for, unless it has been written anew since.

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
    """The name itself, or with a number where a file has it already."""
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}-{number}{target.suffix}")
    return free
