"""Which files of watched folders have their results in the outbox: a table in its file, written in one transaction
with the results, so that no kill between the two makes a file be inspected twice, or never.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from edge.sources.interface import FileOrigin
from edgeflame.errors import StorageError

SCHEMA = """
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
"""What is known about a file is kept for so long after it was done, also when it is not there: a network share that is
away for a while looks like an empty folder."""

_BUSY_S = 30.0


def mark(db: sqlite3.Connection, origins: Iterable[FileOrigin]) -> None:
    """Note files as done, in the transaction that keeps their results."""
    now_s = int(time.time())
    db.executemany(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
        [(os.fsencode(one.folder), os.fsencode(one.name), one.size, one.mtime_ns, now_s) for one in origins],
    )


def load(file: Path, folder: str) -> dict[str, tuple[int, int]]:
    """Size and time of change, in nanoseconds, of every file of a folder that is done, by its name.

    Raises:
        StorageError: the outbox cannot be read.
    """
    try:
        with closing(sqlite3.connect(file, timeout=_BUSY_S)) as db:
            db.executescript(SCHEMA)
            rows = db.execute("SELECT name, size, mtime_ns FROM files WHERE folder = ?", (os.fsencode(folder),))
            return {os.fsdecode(name): (size, mtime_ns) for name, size, mtime_ns in rows}
    except sqlite3.Error as exc:
        msg = f"{file}: cannot read which files are done ({exc})"
        raise StorageError(msg) from exc


def forget(file: Path, folder: str, names: Sequence[str]) -> None:
    """Drop what is known of files that are no longer there, if it is old.

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
        msg = f"{file}: cannot forget files that are no longer there ({exc})"
        raise StorageError(msg) from exc
