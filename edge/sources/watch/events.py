"""What the kernel says about a folder: inotify, of which network shares and some file systems say nothing."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from inotify_simple import INotify, flags

from edgeflame.console import EventLog

log = EventLog("watch")

_FILES = flags.CREATE | flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE
_FOLDER = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
_LOST = flags.Q_OVERFLOW | flags.IGNORED | flags.UNMOUNT | flags.DELETE_SELF | flags.MOVE_SELF


class Kind(enum.Enum):
    """What happened to a file."""

    THERE = "there"
    """It was made, or closed by its writer."""
    COMPLETE = "complete"
    """It was moved here."""
    GONE = "gone"
    RENAMED = "renamed"
    """It has another name in this folder now, of which COMPLETE tells."""
    LOOK = "look"
    """Something about the folders themselves: look at all of them again."""


class Event(NamedTuple):
    """One thing that happened."""

    kind: Kind
    path: Path


class FolderEvents:
    """inotify over folders; a context manager. Where the kernel has no room for it, it says nothing at all."""

    def __init__(self) -> None:
        self._folders: dict[int, Path] = {}
        try:
            self._inotify: INotify | None = INotify()
        except OSError as exc:
            log.warning("folder_only_polled", reason=exc.strerror)
            self._inotify = None

    def __enter__(self) -> FolderEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._inotify is not None:
            self._inotify.close()

    def watch(self, folders: Iterable[Path]) -> None:
        """Be told about files directly in these folders from now on, and of no others."""
        if self._inotify is None:
            return
        wanted = set(folders)
        present = set(self._folders.values())
        for folder in wanted - present:
            try:
                self._folders[self._inotify.add_watch(folder, _FILES | _FOLDER)] = folder
            except OSError as exc:
                # Gone already, or too many: polling finds its files.
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
                    log.warning("folder_only_polled", folder=str(folder), reason=exc.strerror)

    def wait(self, timeout_s: float, sleep: Callable[[float], object]) -> list[Event]:
        """What happened since the last call; waits for something to happen, but not longer than ``timeout_s``."""
        if self._inotify is None:
            sleep(timeout_s)
            return []
        found = self._inotify.read(timeout=round(1000 * timeout_s))
        events: list[Event] = []
        arrived = {event.cookie for event in found if event.mask & flags.MOVED_TO}
        for event in found:
            if event.mask & _LOST or event.mask & flags.ISDIR:
                if event.mask & (flags.IGNORED | flags.MOVE_SELF):
                    self._folders.pop(event.wd, None)
                events.append(Event(Kind.LOOK, Path()))
                continue
            folder = self._folders.get(event.wd)
            if folder is None:
                continue
            if event.mask & flags.MOVED_TO:
                kind = Kind.COMPLETE
            elif event.mask & flags.MOVED_FROM and event.cookie in arrived:
                kind = Kind.RENAMED
            elif event.mask & (flags.CREATE | flags.CLOSE_WRITE):
                kind = Kind.THERE
            else:
                kind = Kind.GONE
            events.append(Event(kind, folder / event.name))
        return events
