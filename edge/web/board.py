"""What the operator sees: the last part, the last rejects, today's counts, the scores of late. A sink."""

from __future__ import annotations

import collections
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterable

import cv2
import msgspec
import numpy as np

from edge.overlay import overlay
from edge.results import Inspected, Result
from edge.web.config import WebConfig
from edgeflame.images import ImageU8, shrink

PICTURE_SIDE = 960
"""Longest side of a picture on the page."""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One part on the page."""

    key: int
    """By which its pictures are asked for; rises by one a part."""
    camera: str
    part_id: str
    verdict: str
    reasons: tuple[str, ...]
    detail: str | None
    ratio: float | None
    """Score over threshold; 1 is at the threshold."""
    captured: dt.datetime
    latency_ms: float
    has_picture: bool


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts since midnight, local time."""

    date: str
    passed: int = 0
    failed: int = 0
    unknown: int = 0


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the page shows that changes with the parts."""

    latest: Shown | None
    rejects: tuple[Shown, ...]
    """Newest first."""
    recent: tuple[Shown, ...]
    """The last parts, newest first."""
    scores: tuple[tuple[float | None, str], ...]
    """Ratio and verdict of the last parts, oldest first."""
    today: Counts
    last_part_s: float | None
    """Seconds since the last part; None before the first."""
    last_parts_s: dict[str, float]
    """The same by camera, of those that had one."""


class Board:
    """Remembers a bounded number of parts, safe for any thread.

    Args:
        config: how many.
        past: earlier results, oldest first, so that a restart does not empty the day's counts.
        clock: monotonic, seconds.
    """

    def __init__(
        self, config: WebConfig, past: Iterable[Result] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[int, Inspected] = {}
        self._recent: collections.deque[Shown] = collections.deque(maxlen=config.recent)
        self._rejects: collections.deque[Shown] = collections.deque(maxlen=config.rejects)
        self._scores: collections.deque[tuple[float | None, str]] = collections.deque(maxlen=config.history)
        self._counts: collections.Counter[str] = collections.Counter()
        self._date = _today()
        self._last_parts: dict[str, float] = {}
        self._latest: Shown | None = None
        self.version = 0
        """Rises with every change."""
        for result in past:
            self._count(result)

    def accept(self, inspected: Inspected) -> None:
        """Show a part."""
        result = inspected.result
        with self._lock:
            self.version += 1
            self._count(result)
            shown = Shown(
                key=self.version,
                camera=result.camera,
                part_id=result.part_id,
                verdict=result.verdict,
                reasons=result.reasons,
                detail=result.detail,
                ratio=_ratio(result),
                captured=result.captured,
                latency_ms=result.latency_ms,
                has_picture=inspected.image is not None,
            )
            self._latest = shown
            self._last_parts[result.camera] = self._clock()
            self._kept[shown.key] = inspected
            self._recent.append(shown)
            if result.verdict != "pass":
                self._rejects.append(shown)
            wanted = {part.key for part in (*self._recent, *self._rejects)}
            for key in self._kept.keys() - wanted:
                del self._kept[key]

    def close(self) -> None:
        """Nothing to close."""

    def view(self) -> View:
        """What is to be seen now."""
        with self._lock:
            self._turn_day()
            now = self._clock()
            ages = {camera: round(now - at, 1) for camera, at in self._last_parts.items()}
            return View(
                latest=self._latest,
                rejects=tuple(reversed(self._rejects)),
                recent=tuple(reversed(self._recent)),
                scores=tuple(self._scores),
                today=Counts(
                    date=self._date,
                    passed=self._counts["pass"],
                    failed=self._counts["fail"],
                    unknown=self._counts["unknown"],
                ),
                last_part_s=min(ages.values(), default=None),
                last_parts_s=ages,
            )

    def part(self, key: int) -> Inspected | None:
        """A part that is still remembered."""
        with self._lock:
            return self._kept.get(key)

    def picture(self, key: int, *, with_heat: bool, side: int = PICTURE_SIDE) -> bytes | None:
        """A part's picture as JPEG, at most ``side`` pixels long; None where there is none, or no more."""
        part = self.part(key)
        if part is None or part.image is None:
            return None
        image = shrink(part.image, PICTURE_SIDE)
        if with_heat and part.anomaly_map is not None:
            image = overlay(image, part.anomaly_map, part.result.threshold, ignored=part.ignored)
        return _jpeg(shrink(image, min(side, PICTURE_SIDE)))

    def _count(self, result: Result) -> None:
        self._turn_day()
        if result.captured.astimezone().date().isoformat() == self._date:
            self._counts[result.verdict] += 1
        self._scores.append((_ratio(result), result.verdict))

    def _turn_day(self) -> None:
        today = _today()
        if today != self._date:
            self._date = today
            self._counts.clear()


def _today() -> str:
    return dt.datetime.now().astimezone().date().isoformat()


def _ratio(result: Result) -> float | None:
    return None if result.score is None else round(result.score / result.threshold, 4)


def _jpeg(image: ImageU8) -> bytes:
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()
