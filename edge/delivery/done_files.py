"""The files of watched folders whose results are kept: a table of the outbox's file, written with the results.

Another table holds the file that each folder's reader decoded last, written before it is decoded: a process that is
killed for what is in it leaves that behind, and the next one knows.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from edge.result import FileOrigin
from edgeflame.errors import StorageError

FILES_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    folder BLOB NOT NULL,
    name BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    done_s INTEGER NOT NULL,
    PRIMARY KEY (folder, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tried (
    folder BLOB NOT NULL PRIMARY KEY,
    name BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    tries INTEGER NOT NULL
) WITHOUT ROWID;
"""

MAX_TRIES = 2
"""Number of processes that may end while they read a file, for lack of memory perhaps, before it is given up."""

KEPT_S = 7 * 24 * 3600
"""How long the record of a done file is kept, seconds, even if the file is not there: a network share that is away for
a while looks like an empty folder."""

_BUSY_S = 30.0


def begin_try(file: Path, folder: str, *, name: str, identity: tuple[int, int]) -> bool:
    """Note that a file of a folder is about to be decoded, in place of the one before it.

    Args:
        file: the outbox.
        folder: the folder.
        name: the file's name in it.
        identity: its size in bytes and time of change in nanoseconds.

    Returns:
        False if ``MAX_TRIES`` processes have ended over it.

    Raises:
        StorageError: the outbox cannot be written.
    """
    key = (os.fsencode(folder), os.fsencode(name), *identity)
    try:
        with closing(sqlite3.connect(file, timeout=_BUSY_S)) as db, db:
            # What a killed process has written is there; only a power cut could lose it, and nobody waits for the disk.
            db.execute("PRAGMA synchronous = NORMAL")
            row = db.execute(
                "SELECT tries FROM tried WHERE folder = ? AND name = ? AND size = ? AND mtime_ns = ?", key
            ).fetchone()
            tries = 0 if row is None else int(row[0])
            if tries < MAX_TRIES:
                db.execute("INSERT OR REPLACE INTO tried VALUES (?, ?, ?, ?, ?)", (*key, tries + 1))
            return tries < MAX_TRIES
    except sqlite3.Error as exc:
        raise StorageError(f"{file}: cannot note which file is read ({exc})") from exc


def end_try(file: Path, folder: str) -> bool:
    """Forget which file of a folder was decoded last, which did the process no harm; returns True.

    Raises:
        StorageError: the outbox cannot be written.
    """
    try:
        with closing(sqlite3.connect(file, timeout=_BUSY_S)) as db, db:
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("DELETE FROM tried WHERE folder = ?", (os.fsencode(folder),))
            return True
    except sqlite3.Error as exc:
        raise StorageError(f"{file}: cannot note which file is read ({exc})") from exc


def mark_done_files(db: sqlite3.Connection, origins: Iterable[FileOrigin]) -> None:
    """Note files as done, in the transaction that keeps their results."""
    now_s = int(time.time())
    db.executemany(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
        [(os.fsencode(one.folder), os.fsencode(one.name), one.size, one.mtime_ns, now_s) for one in origins],
    )


def load_done_files(file: Path, folder: str) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in nanoseconds of every done file of a folder, by its name.

    Raises:
        StorageError: the outbox cannot be read.
    """
    try:
        with closing(sqlite3.connect(file, timeout=_BUSY_S)) as db:
            db.executescript(FILES_SCHEMA)
            rows = db.execute("SELECT name, size, mtime_ns FROM files WHERE folder = ?", (os.fsencode(folder),))
            return {os.fsdecode(name): (size, mtime_ns) for name, size, mtime_ns in rows}
    except sqlite3.Error as exc:
        raise StorageError(f"{file}: cannot read which files are done ({exc})") from exc


def forget_done_files(file: Path, folder: str, names: Sequence[str]) -> None:
    """Delete the records of files that no longer exist, if they are older than ``KEPT_S``.

    Raises:
        StorageError: the outbox cannot be written.
    """
    before_s = int(time.time()) - KEPT_S
    try:
        with closing(sqlite3.connect(file, timeout=_BUSY_S)) as db, db:
            db.executemany(
                "DELETE FROM files WHERE folder = ? AND name = ? AND done_s < ?",
                [(os.fsencode(folder), os.fsencode(name), before_s) for name in names],
            )
    except sqlite3.Error as exc:
        raise StorageError(f"{file}: cannot forget files that are no longer there ({exc})") from exc
