"""The events of all runs, in an SQLite file: on the disk before anything is done about them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from aggregator.events import Event, RunStarted, RunState, apply_event, initial_state
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.state import check_format_version

JOURNAL_FORMAT = 1
"""Version of the file's format, kept as SQLite's ``user_version``; 0 is the same format, from before it was kept."""

# The time is for those who read the file; nothing is decided by it.
_SQL_SCHEMA = """CREATE TABLE IF NOT EXISTS facts (
    number INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    fact BLOB NOT NULL,
    time TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)"""
_EVENT_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class Journal:
    """A journal file, used by one thread; a context manager.

    Raises:
        StorageError: here, if the file has a later format; here and in every method, if the file or the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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
            if found != JOURNAL_FORMAT:
                self._db.execute(f"PRAGMA user_version = {JOURNAL_FORMAT}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._db.close()

    def append(self, run: str, events: Sequence[Event]) -> None:
        """Add events, all or none, durably."""
        with self._translated("write"):
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO facts (run, fact) VALUES (?, ?)", [(run, msgspec.json.encode(event)) for event in events]
            )
            self._db.execute("COMMIT")

    def last_run(self) -> RunState | None:
        """The newest run as its events leave it; None in a new journal."""
        with self._translated("read"):
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
        return state

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
