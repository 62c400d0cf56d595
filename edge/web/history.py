"""The part history for the operator's page: last part, last rejects, today's counts, recent scores. A sink."""

from __future__ import annotations

import collections
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterable

import cv2
import msgspec
import numpy as np

from edge.config.outputs import WebConfig
from edge.overlay import draw_overlay
from edge.result import Inspected, Result
from edge.status import DEFAULT_CAMERA
from edgeflame.errors import UsageError
from edgeflame.images import ImageU8, shrink

PICTURE_SIDE = 960
"""Longest side of a picture on the page."""


class ShownPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part on the page."""

    key: int
    """Key of its pictures; rises by one a part."""
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
    picture_size: tuple[int, int] | None = None
    """Width and height of its picture, pixels; null without one."""
    trial: bool = False
    """The verdict of a model on trial."""


class DayCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts since midnight, local time."""

    date: str
    passed: int = 0
    failed: int = 0
    unknown: int = 0


class HourCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts of one hour of today."""

    hour: int
    """0..23, local time."""
    parts: int
    rejected: int
    """Failed and unknown."""


class HistoryView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the page shows of one camera that changes with the parts."""

    latest: ShownPart | None
    rejects: tuple[ShownPart, ...]
    """Newest first."""
    recent: tuple[ShownPart, ...]
    """The last parts, newest first."""
    scores: tuple[tuple[float | None, str], ...]
    """Ratio and verdict of the last parts, oldest first."""
    today: DayCounts
    hours: tuple[HourCounts, ...]
    """The hours of today that had parts, in order."""
    last_part_s: float | None
    """Seconds since the last part; None before the first."""


class _Memory:
    """The remembered parts and counts of one camera."""

    def __init__(self, config: WebConfig) -> None:
        self.recent: collections.deque[ShownPart] = collections.deque(maxlen=config.recent)
        self.rejects: collections.deque[ShownPart] = collections.deque(maxlen=config.rejects)
        self.scores: collections.deque[tuple[float | None, str]] = collections.deque(maxlen=config.history)
        self.counts: collections.Counter[str] = collections.Counter()
        self.hours: collections.Counter[tuple[int, bool]] = collections.Counter()
        """By hour and whether the part was rejected."""
        self.latest: ShownPart | None = None
        self.last_part: float | None = None

    def count(self, result: Result, today: str | None) -> None:
        """Add a result; to the day's counts only if it was captured on ``today`` (ISO date), or if that is None."""
        local = result.captured.astimezone()
        if today is None or local.date().isoformat() == today:
            self.counts[result.verdict] += 1
            self.hours[local.hour, result.verdict != "pass"] += 1
        self.scores.append((_ratio(result), result.verdict))

    def forget_day(self) -> None:
        self.counts.clear()
        self.hours.clear()


class PartHistory:
    """Remembers a bounded number of parts of each camera; thread-safe.

    Args:
        config: section ``[web]``, with the numbers of parts.
        past: earlier results, oldest first, so that a restart does not empty the day's counts.
        clock: monotonic, seconds.
    """

    def __init__(
        self, config: WebConfig, past: Iterable[Result] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[int, Inspected] = {}
        self._cameras: dict[str, _Memory] = {}
        self._date = _today()
        self.version = 0
        """Rises with every change."""
        for result in past:
            if not result.golden:
                self._memory(result.camera).count(result, self._date)

    def accept(self, inspected: Inspected) -> None:
        """Add a part."""
        result = inspected.result
        with self._lock:
            self._roll_day()
            self.version += 1
            memory = self._memory(result.camera)
            # A part that is inspected now counts for today, even if the clock was set meanwhile.
            memory.count(result, None)
            shown = ShownPart(
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
                picture_size=None if inspected.image is None else inspected.image.shape[1::-1],
                trial=result.trial,
            )
            before = {part.key for part in (*memory.recent, *memory.rejects)}
            memory.latest = shown
            memory.last_part = self._clock()
            self._kept[shown.key] = inspected
            memory.recent.append(shown)
            if result.verdict != "pass":
                memory.rejects.append(shown)
            for key in before - {part.key for part in (*memory.recent, *memory.rejects)}:
                del self._kept[key]

    def close(self) -> None:
        """Nothing to close."""

    def view(self, camera: str = DEFAULT_CAMERA) -> HistoryView:
        """The view of a camera now; empty if it has had no parts."""
        with self._lock:
            self._roll_day()
            memory = self._cameras.get(camera) or _Memory(self._config)
            hours = sorted({hour for hour, _ in memory.hours})
            return HistoryView(
                latest=memory.latest,
                rejects=tuple(reversed(memory.rejects)),
                recent=tuple(reversed(memory.recent)),
                scores=tuple(memory.scores),
                today=DayCounts(
                    date=self._date,
                    passed=memory.counts["pass"],
                    failed=memory.counts["fail"],
                    unknown=memory.counts["unknown"],
                ),
                hours=tuple(
                    HourCounts(
                        hour=hour,
                        parts=memory.hours[hour, False] + memory.hours[hour, True],
                        rejected=memory.hours[hour, True],
                    )
                    for hour in hours
                ),
                last_part_s=self._age(memory),
            )

    def latest(self, camera: str) -> tuple[ShownPart | None, float | None]:
        """A camera's last part, and the seconds since it came; None each before the first."""
        with self._lock:
            memory = self._cameras.get(camera)
            return (None, None) if memory is None else (memory.latest, self._age(memory))

    def part(self, key: int) -> Inspected | None:
        """The part with this key; None if it is no longer remembered."""
        with self._lock:
            return self._kept.get(key)

    def find(self, part_id: str, camera: str | None = None) -> Inspected | None:
        """The last remembered part of a name, of one camera or any; None if there is none.

        Raises:
            UsageError: no camera is named, and several remember such a part.
        """
        with self._lock:
            found = {
                one.result.camera: one
                for _, one in sorted(self._kept.items())
                if one.result.part_id == part_id and camera in (None, one.result.camera)
            }
        if len(found) > 1:
            raise UsageError(f"several cameras have seen {part_id[:100]!r}: say which of {', '.join(sorted(found))}")
        return next(iter(found.values()), None)

    def picture(self, key: int, *, with_heat: bool, side: int = PICTURE_SIDE) -> bytes | None:
        """A part's picture as JPEG, at most ``side`` pixels long; None if there is none, or it is no longer kept."""
        part = self.part(key)
        if part is None or part.image is None:
            return None
        image = shrink(part.image, PICTURE_SIDE)
        if with_heat and part.anomaly_map is not None:
            image = draw_overlay(
                image, part.anomaly_map, part.result.threshold, shown=part.shown_map, ignored=part.ignored
            )
        return _jpeg(shrink(image, min(side, PICTURE_SIDE)))

    def _memory(self, camera: str) -> _Memory:
        # Results of older versions name no camera.
        return self._cameras.setdefault(camera or DEFAULT_CAMERA, _Memory(self._config))

    def _age(self, memory: _Memory) -> float | None:
        return None if memory.last_part is None else round(self._clock() - memory.last_part, 1)

    def _roll_day(self) -> None:
        today = _today()
        # If the clock is set back to yesterday, the counts go on.
        if today > self._date:
            for memory in self._cameras.values():
                memory.forget_day()
        self._date = today


def _today() -> str:
    return dt.datetime.now().astimezone().date().isoformat()


def _ratio(result: Result) -> float | None:
    return None if result.ratio is None else round(result.ratio, 4)


def _jpeg(image: ImageU8) -> bytes:
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()
