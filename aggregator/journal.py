"""The events of all runs, in an SQLite file: on the disk before anything is done about them.

Each fact has a digest of itself and of the digest before it, so that one that was changed on the disk, or is missing
among the others, is found. Facts of versions without digests have none, and are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from aggregator.events import Event, RunStarted, RunState, apply_event, initial_state
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.state import check_format_version, check_still_there, warn_if_empty

JOURNAL_FORMAT = 1
"""Version of the file's format, kept as SQLite's ``user_version``; 0 is the same format, from before it was kept."""

# The time is for those who read the file; nothing is decided by it.
_SQL_SCHEMA = """CREATE TABLE IF NOT EXISTS facts (
    number INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    fact BLOB NOT NULL,
    time TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    digest BLOB
)"""
_EVENT_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def _digest(before: bytes | None, number: int, run: str, fact: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((before or b"", str(number).encode(), run.encode(), fact))).digest()


class Journal:
    """A journal file, used by one thread; a context manager.

    Raises:
        StorageError: here, if the file has a later format; here and in every method, if the file or the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        warn_if_empty(path)
        with self._translated("open"):
            self._db = sqlite3.connect(path, isolation_level=None)
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        try:
            check_format_version(f"{path}: the journal", found=found, known=JOURNAL_FORMAT)
        except StorageError:
            self._db.close()
            raise
        with self._translated("open"):
            # WAL with FULL: a committed transaction survives a power cut, not only a crash of this process.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(_SQL_SCHEMA)
            if "digest" not in [name for _, name, *_ in self._db.execute("PRAGMA table_info(facts)")]:
                self._db.execute("ALTER TABLE facts ADD COLUMN digest BLOB")
            if found != JOURNAL_FORMAT:
                self._db.execute(f"PRAGMA user_version = {JOURNAL_FORMAT}")
        self._inode = path.stat().st_ino

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._db.close()

    def append(self, run: str, events: Sequence[Event]) -> None:
        """Add events, all or none, durably."""
        check_still_there(self._path, self._inode)
        with self._translated("write"):
            self._db.execute("BEGIN IMMEDIATE")
            row = self._db.execute("SELECT number, digest FROM facts ORDER BY number DESC LIMIT 1").fetchone()
            number, before = (0, None) if row is None else row
            rows = []
            for event in events:
                number += 1
                fact = msgspec.json.encode(event)
                before = _digest(before, number, run, fact)
                rows.append((number, run, fact, before))
            self._db.executemany("INSERT INTO facts (number, run, fact, digest) VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def last_run(self) -> RunState | None:
        """The newest run as its events leave it; None in a new journal."""
        with self._translated("read"):
            self._check()
            row = self._db.execute("SELECT run FROM facts ORDER BY number DESC LIMIT 1").fetchone()
            if row is None:
                return None
            rows = self._db.execute("SELECT fact FROM facts WHERE run = ? ORDER BY number", row).fetchall()
            events = [_EVENT_DECODER.decode(event) for (event,) in rows]
        state: RunState | None = None
        for event in events:
            if isinstance(event, RunStarted):
                state = initial_state(event)
            elif state is not None:
                state = apply_event(state, event)
        if state is None:
            raise StorageError(f"{self._path}: the journal is damaged (the beginning of the run {row[0]!r} is missing)")
        return state

    def _check(self) -> None:
        """Hold every fact against its digest.

        Raises:
            StorageError: one was changed, or is missing before others.
        """
        problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise StorageError(str(problem))
        before: bytes | None = None
        rows = self._db.execute("SELECT number, run, fact, digest FROM facts ORDER BY number")
        for number, run, fact, digest in rows:
            is_sound = isinstance(run, str) and isinstance(fact, bytes)
            if not is_sound or (digest is not None and digest != _digest(before, number, run, fact)):
                raise StorageError(f"fact {number} is not as it was written, or one before it is missing")
            before = digest

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StorageError(f"{self._path}: cannot {doing} the journal ({exc})") from exc
        except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError, RecursionError) as exc:
            raise StorageError(
                f"{self._path}: the journal is damaged, or of another version of EdgeFlame ({exc})"
            ) from exc
