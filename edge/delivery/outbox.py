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

A result has a checksum; so has a destination's progress. A result that was changed on the disk is told to nobody: it
goes, and is counted as lost for those that had not got it. A progress that was changed is not believed: what is kept is
sent again, marked as possibly repeated. Rows of versions without checksums have none, and must make sense instead.

Files of watched folders whose results are kept are recorded in a table of the same file, in one transaction with the
results, so that a kill between the two cannot make a file be inspected twice, or never. They need no checksum: a record
that was changed is that of no file, and its own file is inspected once more.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from edge.config.outputs import OutboxConfig
from edge.delivery.done_files import FILES_SCHEMA, mark_done_files
from edge.result import FileOrigin, Result
from edge.status import DestinationStatus
from edgeflame.errors import StorageError
from edgeflame.log import EventLog
from edgeflame.state import check_format_version, check_still_there, warn_if_empty


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

log = EventLog("outbox")

FORMAT = 1
"""Format of the file; a later one is refused. A new key of a result does not change it, since keys have defaults."""

_PRUNE_EVERY = 256
"""Number of results between two checks of the bounds: a delete scans an index, which is too much for each result."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, crc32 INTEGER);
CREATE TABLE IF NOT EXISTS destinations (
    name TEXT PRIMARY KEY,
    attempted INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL,
    lost INTEGER NOT NULL DEFAULT 0,
    crc32 INTEGER
) WITHOUT ROWID;
"""
_TRIGGER = """
CREATE TRIGGER IF NOT EXISTS changed_without_checksum AFTER UPDATE OF attempted, acknowledged, lost ON destinations
WHEN NEW.crc32 IS OLD.crc32 BEGIN UPDATE destinations SET crc32 = NULL WHERE name = NEW.name; END;
"""
"""A version without checksums changes a progress and leaves its checksum."""
_CHECKED = ("results", "destinations")
"""Tables that had no column ``crc32`` in the first version."""


def _checksum(*values: object) -> int:
    return zlib.crc32(b"\0".join(one if isinstance(one, bytes) else str(one).encode() for one in values))


def _is_sound(number: int, body: object, crc32: int | None) -> bool:
    """Whether a result is as it was written; without a checksum, whether it is one."""
    if not isinstance(body, bytes):
        return False
    return _decoded(body) is not None if crc32 is None else crc32 == _checksum(number, body)


def _decoded(body: bytes) -> Result | None:
    try:
        return _RESULT.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


@dataclass(frozen=True, kw_only=True)
class _Progress:
    name: str
    attempted: int
    acknowledged: int
    lost: int

    @property
    def crc32(self) -> int:
        return _checksum(self.name, self.attempted, self.acknowledged, self.lost)


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
        warn_if_empty(path)
        with self._translated("open"):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            # A name that was changed on the disk need not be text any more.
            self._db.text_factory = lambda data: data.decode(errors="replace")
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
            for table in _CHECKED:
                if "crc32" not in [name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")]:
                    self._db.execute(f"ALTER TABLE {table} ADD COLUMN crc32 INTEGER")
            self._db.executescript(_TRIGGER)
            with self._transaction():
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))
                self.id: str = self._find_id()
                """Id of this file, which never changes: 32 hexadecimal digits."""
        self._inode = path.stat().st_ino
        self._is_progress_lost = False

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
        check_still_there(self._path, self._inode)
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
            row = self._db.execute("SELECT * FROM destinations WHERE name = ?", (name,)).fetchone()
            if row is None:
                start = 0 if self._is_progress_lost else newest
                self._set(_Progress(name=name, attempted=newest, acknowledged=start, lost=0))
            elif not _is_progress(row, newest):
                log.error("progress_damaged", destination=name, consequence="what is kept is sent again")
                lost = row[3] if isinstance(row[3], int) else 0
                self._set(_Progress(name=name, attempted=newest, acknowledged=0, lost=lost))
        return self.status(name)

    def status(self, name: str) -> DestinationStatus:
        """Progress of a registered destination."""
        with self._lock, self._translated("read"):
            now = self._progress(name)
            rows = self._db.execute("SELECT COUNT(*) FROM results WHERE number > ?", (now.acknowledged,))
            waiting = rows.fetchone()[0]
        return DestinationStatus(attempted=now.attempted, acknowledged=now.acknowledged, lost=now.lost, waiting=waiting)

    def remove_destinations(self, keep: Sequence[str]) -> list[str]:
        """Drop destinations that are no longer configured, so that they hold nothing back. Returns their names."""
        with self._lock, self._translated("write"), self._transaction():
            rows = self._db.execute("SELECT * FROM destinations").fetchall()
            gone = sorted((row for row in rows if row[0] not in keep), key=lambda row: str(row[0]))
            # One whose name was changed on the disk is not known by it any more, and must not begin with the newest.
            self._is_progress_lost = any(not _is_progress(row, self._newest()) for row in gone)
            self._db.execute(
                f"DELETE FROM destinations WHERE name NOT IN ({', '.join('?' * len(keep))})",  # noqa: S608 - marks only
                tuple(keep),
            )
        return [row[0] for row in gone]

    def next_batch(self, name: str, limit: int) -> list[Delivery]:
        """The next results for a destination, at most ``limit``, recorded on the disk as attempted."""
        with self._lock, self._translated("read"), self._transaction():
            before = self._progress(name)
            sound: list[tuple[int, bytes]] = []
            while not sound:
                rows = self._db.execute(
                    "SELECT number, body, crc32 FROM results WHERE number > ? ORDER BY number LIMIT ?",
                    (before.acknowledged, limit),
                ).fetchall()
                sound = [(number, body) for number, body, crc32 in rows if _is_sound(number, body, crc32)]
                kept = {number for number, _ in sound}
                self._drop([number for number, *_ in rows if number not in kept])
                if not rows:
                    break
            now = self._progress(name)
            if sound and sound[-1][0] > now.attempted:
                self._set(replace(now, attempted=sound[-1][0]))
        return [
            Delivery(outbox=self.id, number=number, redelivered=number <= before.attempted, result=msgspec.Raw(body))
            for number, body in sound
        ]

    def acknowledge(self, name: str, number: int) -> None:
        """Record that everything up to ``number`` has surely arrived at a destination."""
        with self._lock, self._translated("write"), self._transaction():
            now = self._progress(name)
            if number > now.acknowledged:
                self._set(replace(now, acknowledged=number))

    def latest(self, limit: int) -> list[tuple[int, Result]]:
        """The last results kept, newest first, with their numbers; those that cannot be read are counted, left out."""
        with self._lock, self._translated("read"):
            rows = self._db.execute("SELECT number, body, crc32 FROM results ORDER BY number DESC LIMIT ?", (limit,))
            results = [
                (number, _decoded(body) if _is_sound(number, body, crc32) else None)
                for number, body, crc32 in rows.fetchall()
            ]
        readable = [(number, result) for number, result in results if result is not None]
        if len(readable) < len(results):
            log.error("results_unreadable", count=len(results) - len(readable), consequence="left out of what is shown")
        return readable

    def _drop(self, numbers: Sequence[int]) -> None:
        """Delete damaged results, and count them as lost where they had not arrived; within a transaction."""
        if not numbers:
            return
        log.error("results_damaged", count=len(numbers), first=numbers[0], consequence="told to nobody")
        self._db.executemany("DELETE FROM results WHERE number = ?", [(number,) for number in numbers])
        for (name,) in self._db.execute("SELECT name FROM destinations").fetchall():
            now = self._progress(name)
            if lost := sum(number > now.acknowledged for number in numbers):
                self._set(replace(now, lost=now.lost + lost))

    def _progress(self, name: str) -> _Progress:
        row = self._db.execute("SELECT * FROM destinations WHERE name = ?", (name,)).fetchone()
        return _Progress(name=name, attempted=row[1], acknowledged=row[2], lost=row[3])

    def _set(self, progress: _Progress) -> None:
        """Write a progress; within a transaction."""
        self._db.execute(
            "INSERT INTO destinations (name, attempted, acknowledged, lost, crc32) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET attempted = excluded.attempted, acknowledged = excluded.acknowledged, "
            "lost = excluded.lost, crc32 = excluded.crc32",
            (progress.name, progress.attempted, progress.acknowledged, progress.lost, progress.crc32),
        )

    def _find_id(self) -> str:
        """The file's id; a new one where it has none, or one that was changed on the disk."""
        meta = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        found = meta.get("id")
        if found is not None and meta.get("id_crc32", str(_checksum(found))) != str(_checksum(found)):
            log.error("outbox_id_damaged", found=found, consequence="receivers see a new outbox")
            found = None
        found = found or uuid.uuid4().hex
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", [("id", found), ("id_crc32", str(_checksum(found)))]
        )
        return found

    def _found_format(self) -> int:
        """Format of the file; 0 for a new one."""
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
            return 0
        row = self._db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'format'").fetchone()
        return 0 if row is None else int(row[0])

    def _append(self, bodies: Sequence[bytes], origins: Sequence[FileOrigin]) -> list[int]:
        with self._lock, self._translated("write"), self._transaction():
            first = self._newest() + 1
            numbers = list(range(first, first + len(bodies)))
            self._db.executemany(
                "INSERT INTO results (number, body, crc32) VALUES (?, ?, ?)",
                [(number, body, _checksum(number, body)) for number, body in zip(numbers, bodies, strict=True)],
            )
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
            waiting = self._db.execute("SELECT name FROM destinations WHERE acknowledged < ?", (bound - 1,)).fetchall()
            for (name,) in waiting:
                now = self._progress(name)
                count = bound - 1 - now.acknowledged
                log.error("results_lost", destination=name, count=count, kept=bound)
                self._set(replace(now, lost=now.lost + count, acknowledged=bound - 1))
        self._db.execute("DELETE FROM results WHERE number < ?", (max(oldest_kept, bound),))

    def _newest(self) -> int:
        row = self._db.execute(
            "SELECT MAX((SELECT COALESCE(MAX(number), 0) FROM results),"
            " COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'results'), 0))"
        ).fetchone()
        return int(row[0])

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
            # What SQLite calls an operational error, such as a full disk, is none of the file's.
            is_damaged = type(exc) is sqlite3.DatabaseError
            advice = (
                "; move it away to go on with a new one, which lacks what was not delivered yet" if is_damaged else ""
            )
            raise StorageError(f"{self._path}: cannot {doing} the outbox ({exc}){advice}") from exc


def _is_progress(row: Sequence[Any], newest: int) -> bool:
    """Whether a row of destinations is as it was written; without a checksum, whether it makes sense."""
    name, attempted, acknowledged, lost, crc32 = row
    if not all(isinstance(one, int) and one >= 0 for one in (attempted, acknowledged, lost)):
        return False
    if crc32 is None:
        return bool(acknowledged <= newest and attempted <= newest)
    return bool(crc32 == _Progress(name=name, attempted=attempted, acknowledged=acknowledged, lost=lost).crc32)


def _is_full(exc: StorageError) -> bool:
    cause = exc.__cause__
    # sqlite3 names its error codes from Python 3.11 on; the text is older and the same.
    return isinstance(cause, sqlite3.Error) and "full" in str(cause)


OUTBOX_FILE = "outbox.sqlite"
