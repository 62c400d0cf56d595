"""Operators' feedback: parts marked as truly good or bad, kept with their pictures for the next training."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Literal, get_args

import msgspec

from edge.result import Inspected
from edgeflame.errors import DataError, StorageError
from edgeflame.images import write_image
from edgeflame.log import EventLog

log = EventLog("marks")

TrueLabel = Literal["good", "bad"]

WARN_SHARE = 0.8
"""Share of ``max_marks`` from which on each new mark logs a warning."""


class FeedbackMark(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``marks.jsonl``."""

    was: TrueLabel
    marked: dt.datetime
    file: str
    """Picture, relative to the folder: the area the model saw, without heat."""
    result: msgspec.Raw


class MarkCounts(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/marks``: how many marked parts there are."""

    good: int
    bad: int
    at_most: int
    folder: str


class FeedbackStore:
    """Stores marked parts: pictures in ``good/`` and ``bad/``, and one line each in ``marks.jsonl``.

    The pictures are meant to be reviewed and added to the next training's images. Marking a part again replaces its
    picture; the lines remain. Marks are training data and never deleted: once there are ``max_marks``, new ones are
    refused until somebody has moved the pictures away.

    Args:
        folder: created with the first mark.
        max_marks: most pictures kept.
    """

    def __init__(self, folder: Path, *, max_marks: int = 10_000) -> None:
        self._folder = folder
        self._max_marks = max_marks

    def add(self, inspected: Inspected, was: TrueLabel) -> FeedbackMark:
        """Store a mark.

        Raises:
            DataError: the part has no picture.
            StorageError: it cannot be written, or there are ``max_marks`` already.
        """
        result, image = inspected.result, inspected.image
        if image is None:
            raise DataError(f"part {result.part_id} has no picture to keep")
        # Cameras with one trigger may capture the same part at the same moment, each as its first.
        when = f"{result.captured:%Y%m%dT%H%M%S%f}Z"
        name = f"{when}-{result.camera}-{result.sequence:08d}-{result.part_file_name}.png"
        other = self._folder / ("bad" if was == "good" else "good") / name
        mark = FeedbackMark(
            was=was,
            marked=dt.datetime.now(dt.timezone.utc),
            file=f"{was}/{name}",
            result=msgspec.Raw(msgspec.json.encode(result)),
        )
        kept = self._count()
        is_new = not (other.exists() or (self._folder / was / name).exists())
        if kept >= self._max_marks and is_new:
            raise StorageError(
                f"{self._folder}: {kept} marked parts are kept, and no more (web.max_marks); take good/ and bad/ away "
                "for the next training"
            )
        if kept >= WARN_SHARE * self._max_marks:
            log.warning("marks_nearly_full", kept=kept + 1, at_most=self._max_marks, folder=str(self._folder))
        try:
            (self._folder / was).mkdir(parents=True, exist_ok=True)
            write_image(self._folder / was / name, image)
            other.unlink(missing_ok=True)
            with (self._folder / "marks.jsonl").open("ab") as lines:
                lines.write(msgspec.json.encode(mark) + b"\n")
        except OSError as exc:
            raise StorageError(f"{self._folder}: the mark cannot be kept ({exc.strerror})") from exc
        log.info("part_marked", part=result.part_id, verdict=result.verdict, was=was)
        return mark

    def counts(self) -> MarkCounts:
        """How many marked parts there are."""
        good, bad = (self._count_of(was) for was in get_args(TrueLabel))
        return MarkCounts(good=good, bad=bad, at_most=self._max_marks, folder=str(self._folder))

    def _count(self) -> int:
        return sum(self._count_of(was) for was in get_args(TrueLabel))

    def _count_of(self, was: TrueLabel) -> int:
        # Marks are rare, so the folders can be listed each time.
        return len(list((self._folder / was).glob("*.png")))
