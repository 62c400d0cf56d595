"""Earlier rejects: looked up among the results that the line keeps, with the pictures that it still has.

The results are read over a connection of their own that writes nothing, so that no question of an operator's holds up a
result on its way to the disk.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import sqlite3
from pathlib import Path

import cv2
import msgspec

from edge.delivery.sinks import RejectsSink
from edge.result import Result
from edgeflame.errors import DataError, StorageError
from edgeflame.images import read_image, shrink

PAGE_SIZE = 24
"""Most parts in one answer."""
MAX_READ = 50_000
"""Most results read for one answer; the next question goes on behind them."""
_AT_ONCE = 2_000


class RejectQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked for."""

    since: dt.datetime | None = None
    """Captured at this time or later."""
    until: dt.datetime | None = None
    """Captured before this time."""
    camera: str | None = None
    score: float | None = None
    """Score over threshold, at least."""
    part: str | None = None
    """Part of the part's name, in any case."""
    before: int | None = None
    """Number of a result: only earlier ones."""

    def fits(self, result: Result) -> bool:
        """Whether a result is looked for."""
        when = result.captured
        return (
            result.verdict != "pass"
            and not result.golden
            and (self.since is None or when >= _aware(self.since))
            and (self.until is None or when < _aware(self.until))
            and (self.camera is None or result.camera == self.camera)
            and (self.score is None or (result.ratio is not None and result.ratio >= self.score))
            and (self.part is None or self.part.casefold() in result.part_id.casefold())
        )


class FoundReject(msgspec.Struct, frozen=True, kw_only=True):
    """One reject that was found."""

    number: int
    """Its number in the outbox, for its picture."""
    camera: str
    part_id: str
    verdict: str
    reasons: tuple[str, ...]
    detail: str | None
    ratio: float | None
    """Score over threshold."""
    captured: dt.datetime
    has_picture: bool


class FoundRejects(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, the newest first."""

    parts: tuple[FoundReject, ...]
    before: int | None
    """To be asked for next; None at the end of what is kept."""


class PastRejects:
    """Finds rejects; thread-safe.

    Args:
        outbox: the SQLite file of the results.
        pictures: keeps pictures of rejects; None: there are none.
    """

    def __init__(self, outbox: Path, pictures: RejectsSink | None) -> None:
        self._outbox = outbox
        self._pictures = pictures

    def find(self, query: RejectQuery) -> FoundRejects:
        """The newest rejects that fit.

        Raises:
            StorageError: the results cannot be read.
        """
        found: list[FoundReject] = []
        before, num_read = query.before, 0
        while len(found) < PAGE_SIZE and num_read < MAX_READ:
            rows = self._read("number < ?", (1 << 62 if before is None else before,), _AT_ONCE)
            if not rows:
                return FoundRejects(parts=tuple(found), before=None)
            for number, body in rows:
                before, num_read = number, num_read + 1
                result = _decoded(body)
                if result is not None and query.fits(result):
                    found.append(self._shown(number, result))
                    if len(found) == PAGE_SIZE:
                        break
        return FoundRejects(parts=tuple(found), before=before)

    def picture(self, number: int, *, side: int) -> bytes | None:
        """The picture of a result as JPEG, at most ``side`` pixels long; None if it is no longer kept."""
        rows = self._read("number = ?", (number,), 1)
        result = _decoded(rows[0][1]) if rows else None
        file = None if result is None or self._pictures is None else self._pictures.find(result)
        if file is None:
            return None
        try:
            image = read_image(file)
        except DataError:
            # It has just made room for another.
            return None
        _, data = cv2.imencode(".jpg", shrink(image, side), [cv2.IMWRITE_JPEG_QUALITY, 88])
        return data.tobytes()

    def _shown(self, number: int, result: Result) -> FoundReject:
        return FoundReject(
            number=number,
            camera=result.camera,
            part_id=result.part_id,
            verdict=result.verdict,
            reasons=result.reasons,
            detail=result.detail,
            ratio=None if result.ratio is None else round(result.ratio, 4),
            captured=result.captured,
            has_picture=self._pictures is not None and self._pictures.find(result) is not None,
        )

    def _read(self, condition: str, values: tuple[int, ...], limit: int) -> list[tuple[int, bytes]]:
        statement = f"SELECT number, body FROM results WHERE {condition} ORDER BY number DESC LIMIT ?"  # noqa: S608
        try:
            with contextlib.closing(sqlite3.connect(f"{self._outbox.absolute().as_uri()}?mode=ro", uri=True)) as db:
                return db.execute(statement, (*values, limit)).fetchall()
        except sqlite3.Error as exc:
            raise StorageError(f"{self._outbox}: earlier results cannot be read ({exc})") from exc


_RESULT = msgspec.json.Decoder(Result)


def _decoded(body: object) -> Result | None:
    """A result; None for what is none, which the outbox reports when it delivers it."""
    try:
        return _RESULT.decode(body) if isinstance(body, bytes) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _aware(when: dt.datetime) -> dt.datetime:
    return when if when.tzinfo is not None else when.astimezone()
