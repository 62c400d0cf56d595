"""The outbox: an SQLite file with all results, written before any is sent, and each destination's progress.

Theory of operation
-------------------
``results`` holds the results under rising numbers that are never used again (SQLite's AUTOINCREMENT). For each
destination two numbers are kept: ``attempted``, the highest that may have been sent, written *before* it is sent;
and ``acknowledged``, the highest that surely arrived, written after. After a crash everything in between is sent
again, marked as possibly repeated; everything above was never sent.

The file is bounded. Results that every destination has acknowledged go when more than ``history`` are kept. If a
destination is away for so long that ``max_results`` is reached, the oldest go all the same; they are counted as
lost for that destination, and its receiver sees the gap in the numbers.

WAL with ``synchronous = FULL``: what was committed survives a power cut. The writer commits many results at once
when they come faster than the disk.

Files of watched folders whose results are kept are recorded in a table of the same file, in one transaction with the
results, so that a kill between the two cannot make a file be inspected twice, or never.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

import msgspec

from edge.config.outputs import OutboxConfig
from edge.result import FileOrigin, Result
from edge.status import DestinationStatus
from edgeflame.errors import StorageError
from edgeflame.log import EventLog
from edgeflame.state import check_format_version


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One result on its way to one destination; JSON on the wire.

    A receiver keeps the highest ``number`` it has seen of each ``outbox``. A lower or equal one is a repetition,
    a gap is a loss, and both are recognised without a query.
    """

    outbox: str
    """Id of the outbox: 32 hexadecimal digits, the same as long as its file exists."""
    number: int
    """Place in the outbox, from 1, without gaps."""
    redelivered: bool
    """It may have been delivered before: the answer to an earlier attempt was lost."""
    result: msgspec.Raw
    """:class:`edge.result.Result` as JSON."""

    def encode(self) -> bytes:
        """The bytes to send."""
        return msgspec.json.encode(self)

    def read_result(self) -> Result:
        """The result itself."""
        return _RESULT.decode(self.result)


_RESULT = msgspec.json.Decoder(Result)

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


log = EventLog("outbox")

FORMAT = 1
"""Format of the file; a later one is refused. A new key of a result does not change it, since keys have defaults."""

_PRUNE_EVERY = 256
"""Number of results between two checks of the bounds: a delete scans an index, which is too much for each result."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS destinations (
    name TEXT PRIMARY KEY,
    attempted INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL,
    lost INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""


class Outbox:
    """The outbox's file; thread-safe, a context manager.

    Args:
        path: the SQLite file; created if it does not exist.
        config: bounds on the number of results.
        make_room: called when the disk is full; frees room from something less important and returns whether it did.

    Raises:
        StorageError: the file or the disk fails; so in every method. Nothing of a failed call is kept.
    """

    def __init__(self, path: Path, config: OutboxConfig, *, make_room: Callable[[], bool] = lambda: False) -> None:
        self._path = path
        self._config = config
        self._make_room = make_room
        self._lock = threading.RLock()
        self._unpruned = 0
        self.changed = threading.Condition(self._lock)
        """Notified after results were added."""
        with self._translated("open"):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            found = self._found_format()
        try:
            check_format_version(f"{path}: the outbox", found=found, known=FORMAT)
        except StorageError:
            self._db.close()
            raise
        with self._translated("open"):
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA + FILES_SCHEMA)
            with self._transaction():
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('id', ?)", (uuid.uuid4().hex,))
            meta = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        self.id: str = meta["id"]
        """Id of this file, which never changes: 32 hexadecimal digits."""

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._db.close()

    def append(self, bodies: Sequence[bytes], origins: Sequence[FileOrigin] = ()) -> list[int]:
        """Keep results, all or none; when this returns they are on the disk. Returns their numbers.

        Args:
            bodies: the results as JSON.
            origins: files of watched folders whose results are among them, recorded as done in the same commit.

        Raises:
            StorageError: the disk is full and no room could be made, or it fails.
        """
        while True:
            try:
                return self._append(bodies, origins)
            except StorageError as exc:
                if not (_is_full(exc) and self._make_room()):
                    raise

    def register(self, name: str) -> DestinationStatus:
        """Add a destination if it is new, and return its progress; a new one starts with the next result."""
        with self._lock, self._translated("write"), self._transaction():
            newest = self._newest()
            self._db.execute(
                "INSERT OR IGNORE INTO destinations (name, attempted, acknowledged) VALUES (?, ?, ?)",
                (name, newest, newest),
            )
        return self.status(name)

    def status(self, name: str) -> DestinationStatus:
        """Progress of a registered destination."""
        with self._lock, self._translated("read"):
            attempted, acknowledged, lost = self._db.execute(
                "SELECT attempted, acknowledged, lost FROM destinations WHERE name = ?", (name,)
            ).fetchone()
            waiting = self._db.execute("SELECT COUNT(*) FROM results WHERE number > ?", (acknowledged,)).fetchone()[0]
        return DestinationStatus(attempted=attempted, acknowledged=acknowledged, lost=lost, waiting=waiting)

    def remove_destinations(self, keep: Sequence[str]) -> list[str]:
        """Drop destinations that are no longer configured, so that they hold nothing back. Returns their names."""
        with self._lock, self._translated("write"), self._transaction():
            known = [name for (name,) in self._db.execute("SELECT name FROM destinations").fetchall()]
            gone = sorted(set(known) - set(keep))
            self._db.executemany("DELETE FROM destinations WHERE name = ?", [(name,) for name in gone])
        return gone

    def next_batch(self, name: str, limit: int) -> list[Delivery]:
        """The next results for a destination, at most ``limit``, recorded on the disk as attempted."""
        with self._lock, self._translated("read"), self._transaction():
            attempted, acknowledged = self._db.execute(
                "SELECT attempted, acknowledged FROM destinations WHERE name = ?", (name,)
            ).fetchone()
            rows = self._db.execute(
                "SELECT number, body FROM results WHERE number > ? ORDER BY number LIMIT ?", (acknowledged, limit)
            ).fetchall()
            if rows and rows[-1][0] > attempted:
                self._db.execute("UPDATE destinations SET attempted = ? WHERE name = ?", (rows[-1][0], name))
        return [
            Delivery(outbox=self.id, number=number, redelivered=number <= attempted, result=msgspec.Raw(body))
            for number, body in rows
        ]

    def acknowledge(self, name: str, number: int) -> None:
        """Record that everything up to ``number`` has surely arrived at a destination."""
        with self._lock, self._translated("write"):
            self._db.execute(
                "UPDATE destinations SET acknowledged = MAX(acknowledged, ?) WHERE name = ?", (number, name)
            )

    def latest(self, limit: int) -> list[tuple[int, bytes]]:
        """The last results kept, newest first, with their numbers."""
        with self._lock, self._translated("read"):
            rows = self._db.execute("SELECT number, body FROM results ORDER BY number DESC LIMIT ?", (limit,))
            return [(number, body) for number, body in rows.fetchall()]

    def _found_format(self) -> int:
        """Format of the file; 0 for a new one."""
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
            return 0
        row = self._db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'format'").fetchone()
        return 0 if row is None else int(row[0])

    def _append(self, bodies: Sequence[bytes], origins: Sequence[FileOrigin]) -> list[int]:
        with self._lock, self._translated("write"), self._transaction():
            numbers = []
            for body in bodies:
                cursor = self._db.execute("INSERT INTO results (body) VALUES (?)", (body,))
                assert cursor.lastrowid is not None
                numbers.append(cursor.lastrowid)
            mark_done_files(self._db, origins)
            self._unpruned += len(bodies)
            if self._unpruned >= _PRUNE_EVERY:
                self._prune(numbers[-1])
                self._unpruned = 0
            self.changed.notify_all()
        return numbers

    def _prune(self, newest: int) -> None:
        row = self._db.execute("SELECT MIN(acknowledged) FROM destinations").fetchone()
        delivered = newest if row[0] is None else row[0]
        oldest_kept = min(delivered, newest - self._config.history) + 1
        bound = newest - self._config.max_results + 1
        if bound > oldest_kept:
            waiting = self._db.execute(
                "SELECT name, acknowledged FROM destinations WHERE acknowledged < ?", (bound - 1,)
            ).fetchall()
            for name, acknowledged in waiting:
                log.error("results_lost", destination=name, count=bound - 1 - acknowledged, kept=bound)
                self._db.execute(
                    "UPDATE destinations SET lost = lost + ?, acknowledged = ? WHERE name = ?",
                    (bound - 1 - acknowledged, bound - 1, name),
                )
        self._db.execute("DELETE FROM results WHERE number < ?", (max(oldest_kept, bound),))

    def _newest(self) -> int:
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'results'").fetchone()
        return 0 if row is None else int(row[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StorageError(f"{self._path}: cannot {doing} the outbox ({exc})") from exc


def _is_full(exc: StorageError) -> bool:
    cause = exc.__cause__
    # sqlite3 names its error codes from Python 3.11 on; the text is older and the same.
    return isinstance(cause, sqlite3.Error) and "full" in str(cause)


OUTBOX_FILE = "outbox.sqlite"
