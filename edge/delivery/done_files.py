"""The files of watched folders whose results are kept: a table of the outbox's file, written with the results."""

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
"""

KEPT_S = 7 * 24 * 3600
"""How long the record of a done file is kept, seconds, even if the file is not there: a network share that is away for
a while looks like an empty folder."""

_BUSY_S = 30.0


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
