"""The source of a watched folder, into which another program writes images: each complete file is one part, once.

This module watches, reads and yields; the decisions about files are made in :mod:`edge.sources.arrivals`. The kernel
reports changes by inotify, but not on network shares and some file systems; so the folder is also listed regularly.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fnmatch
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, final

from inotify_simple import INotify, flags

from edge.delivery import done_files
from edge.frame import Frame, make_frame
from edge.result import After, FileOrigin
from edge.sources.address import AddressQuery
from edge.sources.arrivals import DONE_FOLDER, Arrivals, FileIdentity, dispose, read_complete, stat_file
from edgeflame.errors import DataError, StorageError
from edgeflame.images import LISTED_SUFFIXES, MAX_PIXELS, printable_name
from edgeflame.log import EventLog

log = EventLog("watch")

_FILES = flags.CREATE | flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE
_FOLDER = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
_LOST = flags.Q_OVERFLOW | flags.IGNORED | flags.UNMOUNT | flags.DELETE_SELF | flags.MOVE_SELF


class FileEventKind(enum.Enum):
    """What happened to a file."""

    THERE = "there"
    """It was created, or closed by its writer."""
    COMPLETE = "complete"
    """It was moved here."""
    GONE = "gone"
    RENAMED = "renamed"
    """It got another name in this folder, for which there is an event COMPLETE."""
    LOOK = "look"
    """The folders themselves changed: all of them have to be listed again."""


class FileEvent(NamedTuple):
    """One event of a file or folder."""

    kind: FileEventKind
    path: Path


class FolderEvents:
    """inotify events of several folders; a context manager. Without inotify, it gives no events."""

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
        """Watch the files directly in these folders as well, from now on."""
        if self._inotify is None:
            return
        wanted = set(folders)
        present = set(self._folders.values())
        for folder in wanted - present:
            try:
                self._folders[self._inotify.add_watch(folder, _FILES | _FOLDER)] = folder
            except OSError as exc:
                # The folder is gone, or there are too many watches; listing finds the files.
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
                    log.warning("folder_only_polled", folder=str(folder), reason=exc.strerror)

    def wait(self, timeout_s: float, sleep: Callable[[float], object]) -> list[FileEvent]:
        """The events since the last call; waits for one, ``timeout_s`` at most."""
        if self._inotify is None:
            sleep(timeout_s)
            return []
        found = self._inotify.read(timeout=round(1000 * timeout_s))
        events: list[FileEvent] = []
        arrived = {event.cookie for event in found if event.mask & flags.MOVED_TO}
        for event in found:
            if event.mask & _LOST or event.mask & flags.ISDIR:
                if event.mask & (flags.IGNORED | flags.MOVE_SELF):
                    self._folders.pop(event.wd, None)
                events.append(FileEvent(FileEventKind.LOOK, Path()))
                continue
            folder = self._folders.get(event.wd)
            if folder is None:
                continue
            if event.mask & flags.MOVED_TO:
                kind = FileEventKind.COMPLETE
            elif event.mask & flags.MOVED_FROM and event.cookie in arrived:
                kind = FileEventKind.RENAMED
            elif event.mask & (flags.CREATE | flags.CLOSE_WRITE):
                kind = FileEventKind.THERE
            else:
                kind = FileEventKind.GONE
            events.append(FileEvent(kind, folder / event.name))
        return events


SYNTAX = "watch:DIR?glob=*.jpg&recursive=yes&after=keep&settle=1&deadline=30&poll=2 (after: keep, move or delete)"

_AFTER: dict[str, After] = {"keep": "keep", "move": "move", "delete": "delete"}

_TICK_S = 0.1
"""Time between two checks of files that are being written, seconds."""

_SCAN_SHARE = 0.05
"""Largest share of the time spent on listing the folder, however many files it has."""

_FORGET_EVERY_S = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """The options of a watched folder's address.

    Attributes:
        glob: pattern of the names, matched with the whole relative path if it has a slash; None: all images.
        recursive: whether subfolders are watched as well.
        after: what to do with a file whose result is on the disk.
        settle_s: how long a file must be unchanged before it is read, seconds, unless it was moved into place.
        deadline_s: time without a change after which an incomplete file becomes an ``unknown`` part, seconds.
        poll_s: time between two listings, seconds, for changes that the kernel does not report.
    """

    glob: str | None = None
    recursive: bool = True
    after: After = "keep"
    settle_s: float = 1.0
    deadline_s: float = 30.0
    poll_s: float = 2.0


@final
class WatchedFolder:
    """Image files as they arrive, each once; they wait for us, so none is dropped.

    Args:
        folder: the folder.
        options: the address's options.
        outbox: SQLite file of the results, with the files that are done. None: files that are there at the start are
            taken for new.
        max_pixels: of the largest picture that is decoded.

    Raises:
        DataError: no such folder.
    """

    is_live = False
    is_endless = True
    num_frames = None

    def __init__(
        self, folder: Path, options: WatchOptions, *, outbox: Path | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        if not folder.is_dir():
            raise DataError(f"watch:{folder}: no such folder")
        self._folder = folder.resolve()
        self._options = options
        self._outbox = outbox
        self._max_pixels = max_pixels
        self.name = f"watch:{printable_name(str(folder))}"

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        done = done_files.load_done_files(self._outbox, str(self._folder)) if self._outbox is not None else {}
        arrivals = Arrivals(
            {name: FileIdentity(*identity) for name, identity in done.items()},
            settle_s=self._options.settle_s,
            deadline_s=self._options.deadline_s,
        )
        # The daemon may have ended after a result was kept and before its file was moved.
        leftover = set(done) if self._options.after != "keep" else set()
        next_scan_s, earliest_s, forget_s, outage = 0.0, 0.0, time.monotonic(), None
        with FolderEvents() as events, contextlib.ExitStack() as stack:
            stack.callback(self._note, done_files.end_try)
            while not stop.is_set():
                now_s = time.monotonic()
                if now_s >= next_scan_s:
                    try:
                        present = self._scan(arrivals, events, now_s)
                    except OSError as exc:
                        if outage is None:
                            outage = exc.strerror or "it cannot be read"
                            log.error("folder_lost", folder=str(self._folder), reason=outage)
                            yield self._without_image("folder", f"parts may pass unseen: {self.name}: {outage}")
                        stop.wait(self._options.poll_s)
                        continue
                    if outage is not None:
                        log.info("folder_back", folder=str(self._folder))
                        outage = None
                    for name in leftover & present:
                        dispose(self._origin(name, arrivals.done[name]))
                    leftover = set()
                    if now_s >= forget_s:
                        self._forget(arrivals.forget_absent(present))
                        forget_s = now_s + _FORGET_EVERY_S
                    earliest_s = now_s + (time.monotonic() - now_s) / _SCAN_SHARE
                    next_scan_s = max(now_s + self._options.poll_s, earliest_s)
                wait_s = min(max(next_scan_s - time.monotonic(), 0.0), _TICK_S if arrivals.pending else 2 * _TICK_S)
                if self._listen(arrivals, events, stop, wait_s):
                    next_scan_s = min(next_scan_s, earliest_s)
                for name in arrivals.pending:
                    arrivals.observe(name, stat_file(self._folder / name), time.monotonic())
                yield from self._read_ready(arrivals, stop)
                if self._folder.is_dir():
                    yield from self._report(arrivals)
                else:
                    next_scan_s = 0.0

    def _scan(self, arrivals: Arrivals, events: FolderEvents, now_s: float) -> set[str]:
        """List the folder and pass all files to ``arrivals`` in the order of their last change; returns the names.

        Raises:
            OSError: the folder itself cannot be listed.
        """
        folders, found = [""], []
        for folder in folders:
            # Watched before it is listed, so that a file that comes in between is seen twice rather than never.
            events.watch([self._folder / folder])
            try:
                entries = list(os.scandir(self._folder / folder))
            except OSError as exc:
                if not folder:
                    raise
                log.warning("subfolder_unreadable", folder=str(self._folder / folder), reason=exc.strerror)
                continue
            for entry in entries:
                # Strings, not paths, for speed: a folder may have a hundred thousand files.
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if self._options.recursive and not entry.name.startswith(".") and name != DONE_FOLDER:
                        folders.append(name)
                elif self._is_wanted(name) and (seen := stat_file(entry)) is not None:
                    found.append((seen.identity.mtime_ns, name, seen))
        wall_ns = time.time_ns()
        for mtime_ns, name, seen in sorted(found):
            is_old = wall_ns - mtime_ns >= self._options.settle_s * 1e9
            arrivals.observe(name, seen, now_s, is_old=is_old)
        return {name for _, name, _ in found}

    def _listen(self, arrivals: Arrivals, events: FolderEvents, stop: threading.Event, wait_s: float) -> bool:
        """Pass the kernel's events to ``arrivals``; returns whether the folder has to be listed again."""
        again = False
        for kind, path in events.wait(wait_s, stop.wait):
            if kind is FileEventKind.LOOK:
                again = True
            elif self._is_wanted(name := path.relative_to(self._folder).as_posix()):
                now_s = time.monotonic()
                if kind is FileEventKind.COMPLETE:
                    arrivals.moved_in(name, now_s)
                elif kind is FileEventKind.THERE:
                    arrivals.changed(name, now_s)
                elif kind is FileEventKind.RENAMED:
                    arrivals.renamed(name)
                else:
                    arrivals.observe(name, None, now_s)
        return again

    def _read_ready(self, arrivals: Arrivals, stop: threading.Event) -> Iterator[Frame]:
        for name in arrivals.ready(time.monotonic()):
            if stop.is_set():
                return
            path = self._folder / name
            seen = stat_file(path)
            if seen is not None and not self._note(partial(done_files.begin_try, name=name, identity=seen.identity)):
                arrivals.mark_done(name, seen.identity)
                reason = f"{done_files.MAX_TRIES} processes ended while they read it; written anew, it is tried again"
                log.error("file_given_up", path=str(path), reason=reason)
                yield self._without_image(name, reason, self._origin(name, seen.identity))
                continue
            try:
                identity, image, failure = read_complete(path, self._max_pixels)
            except FileNotFoundError:
                arrivals.observe(name, stat_file(path), time.monotonic())
                if (seen := stat_file(path)) is not None:
                    arrivals.failed(name, seen.identity, "it is a link to nothing")
                continue
            if image is None:
                self._note(done_files.end_try)
                arrivals.failed(name, identity, failure)
                continue
            arrivals.mark_done(name, identity)
            yield make_frame(
                part_id=name,
                source=str(path),
                image_bgr=image,
                origin=self._origin(name, identity),
            )

    def _report(self, arrivals: Arrivals) -> Iterator[Frame]:
        """Yield a frame without an image for each file that will never be read."""
        now_s = time.monotonic()
        for name, identity, reason in arrivals.given_up(now_s):
            log.error("file_incomplete", path=str(self._folder / name), reason=reason)
            yield self._without_image(name, reason, self._origin(name, identity))
        for name in arrivals.lost(now_s):
            log.error("file_lost", path=str(self._folder / name))
            yield self._without_image(name, "the file was removed before it could be read")

    def _without_image(self, name: str, error: str, origin: FileOrigin | None = None) -> Frame:
        path = self._folder / name if origin is not None else self._folder
        return make_frame(part_id=name, source=str(path), error=error, origin=origin)

    def _note(self, note: Callable[[Path, str], bool]) -> bool:
        """Keep in the outbox what is done with the folder's files; True where that fails, and a line in the log."""
        try:
            return self._outbox is None or note(self._outbox, str(self._folder))
        except StorageError as exc:
            log.warning("file_not_noted", folder=str(self._folder), reason=str(exc))
            return True

    def _forget(self, names: list[str]) -> None:
        if self._outbox is not None and names:
            try:
                done_files.forget_done_files(self._outbox, str(self._folder), names)
            except StorageError as exc:
                # The records only take room, until the next attempt.
                log.warning("done_files_not_forgotten", count=len(names), reason=str(exc))

    def _origin(self, name: str, identity: FileIdentity) -> FileOrigin:
        return FileOrigin(
            folder=str(self._folder),
            name=name,
            size=identity.size,
            mtime_ns=identity.mtime_ns,
            after=self._options.after,
        )

    def _is_wanted(self, name: str) -> bool:
        base = name.rpartition("/")[2]
        if base.startswith("."):
            return False
        pattern = self._options.glob
        if pattern is None:
            return "." + base.rpartition(".")[2].lower() in LISTED_SUFFIXES
        return fnmatch.fnmatchcase(name if "/" in pattern else base, pattern)


def watched_folder(address: str, *, outbox: Path | None, max_pixels: int = MAX_PIXELS) -> WatchedFolder:
    """Read ``watch:DIR?after=move``.

    Raises:
        UsageError: it is not of that form, or a value is out of its range.
        DataError: no such folder.
    """
    folder, _, text = address.removeprefix("watch:").partition("?")
    known = ("glob", "recursive", "after", "settle", "deadline", "poll")
    query = AddressQuery(address, text, known=known, syntax=SYNTAX)
    if not folder:
        raise query.wrong("the folder is missing")
    try:
        after = _AFTER[query.text("after", "keep")]
    except KeyError as exc:
        raise query.wrong(f"after is keep, move or delete, not {exc}") from exc
    return WatchedFolder(
        Path(folder),
        WatchOptions(
            glob=query.options.get("glob"),
            recursive=query.yes_or_no("recursive", default=True),
            after=after,
            settle_s=query.number("settle", 1.0, least=0.05, most=3600),
            deadline_s=query.number("deadline", 30.0, least=0.1, most=86_400),
            poll_s=query.number("poll", 2.0, least=0.05, most=3600),
        ),
        outbox=outbox,
        max_pixels=max_pixels,
    )
