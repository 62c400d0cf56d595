"""The operator's requests to a site, pause and leave, as files in its state directory; and the training schedule.

STATE/pause.json and STATE/leave.json are written by ``edgeflame site``:

    STATE/pause.json    while it is there, the site is paused
    STATE/leave.json    the site is to leave its run for good; deleted when it has

They stand whether the site's process runs or not, and survive its restarts.

A schedule says when a site may train:

    mon-fri 22:00-06:00, sat-sun      nights of working days, and the whole weekend
    12:00-12:30                       every day at noon

Times are the machine's local ones. A window that ends before it begins goes on into the next day; it belongs to the
day on which it begins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from edgeflame.errors import UsageError
from edgeflame.mqtt.messages import Text
from edgeflame.state import read_json, storage_errors, write_json

T = TypeVar("T", bound="SitePause | LeaveRequest")


class SitePause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pause. ``release`` ends the worker process, so that its memory is free too; its task begins again afterwards,
    with the same result. Otherwise it is stopped where it is, and continues from there.
    """

    reason: Text
    release: bool = False


class LeaveRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Leave the run for good."""

    reason: Text


class SiteControl:
    """The operator's requests in a state directory; read by the site, written by ``edgeflame site``.

    Raises:
        StorageError: here and in every method, when the disk fails or a file is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        self._pause_path = state_dir / "pause.json"
        self._leave_path = state_dir / "leave.json"

    @property
    def pause(self) -> SitePause | None:
        return _read_request(self._pause_path, SitePause)

    @property
    def leave_request(self) -> LeaveRequest | None:
        return _read_request(self._leave_path, LeaveRequest)

    def request_pause(self, pause: SitePause) -> None:
        """Have the site pause, until :meth:`clear_pause`."""
        write_json(self._pause_path, pause)

    def clear_pause(self) -> bool:
        """Have the site continue; returns whether it was paused."""
        return _remove_request(self._pause_path)

    def request_leave(self, request: LeaveRequest) -> None:
        """Have the site leave its run for good."""
        write_json(self._leave_path, request)

    def clear_leave(self) -> None:
        """Remove the request: the site has left."""
        _remove_request(self._leave_path)


def _remove_request(path: Path) -> bool:
    with storage_errors(path, "remove"):
        was_there = path.exists()
        path.unlink(missing_ok=True)
    return was_there


def _read_request(path: Path, kind: type[T]) -> T | None:
    return read_json(path, kind, advice="remove it, or say again what it is to say with 'edgeflame site'")


DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MIN = 24 * 60

_WINDOW = re.compile(
    rf"(?:(?P<first>{'|'.join(DAYS)})(?:-(?P<last>{'|'.join(DAYS)}))?)?"
    r"(?:(?:^|\s+)(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d))?"
)


@dataclass(frozen=True, kw_only=True)
class _Window:
    days: frozenset[int]
    """0 is Monday."""
    start_min: int
    end_min: int
    """Since the beginning of the day on which it begins, so beyond ``DAY_MIN`` where it ends on the next."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a site may train. ``text`` is as :func:`parse_schedule` was given it."""

    text: str
    windows: tuple[_Window, ...]

    def is_open(self, moment: datetime) -> bool:
        """Whether the site may train at a local time."""
        minute = moment.hour * 60 + moment.minute
        today, yesterday = moment.weekday(), (moment.weekday() - 1) % 7
        return any(
            (today in window.days and window.start_min <= minute < window.end_min)
            or (yesterday in window.days and minute < window.end_min - DAY_MIN)
            for window in self.windows
        )


def parse_schedule(text: str) -> Schedule:
    """Parse a schedule.

    Raises:
        UsageError: it is not one.
    """
    windows = tuple(_parse_window(part.strip().lower(), text) for part in text.split(","))
    return Schedule(text=text.strip(), windows=windows)


def _parse_window(part: str, text: str) -> _Window:
    match = _WINDOW.fullmatch(part)
    if match is None or not part:
        raise UsageError(
            f"schedule {text[:100]!r}: {part[:40]!r} is not understood; "
            "expected for instance 'mon-fri 22:00-06:00, sat-sun'"
        )
    days = frozenset(range(7))
    if match["first"]:
        first, last = DAYS.index(match["first"]), DAYS.index(match["last"] or match["first"])
        days = frozenset((first + offset) % 7 for offset in range((last - first) % 7 + 1))
    start, end = (_minutes(match[name], text) if match[name] else None for name in ("start", "end"))
    start_min, end_min = start or 0, DAY_MIN if end is None else end
    return _Window(days=days, start_min=start_min, end_min=end_min if end_min > start_min else end_min + DAY_MIN)


def _minutes(clock: str, text: str) -> int:
    hours, minutes = int(clock[:2]), int(clock[3:])
    if minutes >= 60 or hours * 60 + minutes > DAY_MIN:
        raise UsageError(f"schedule {text[:100]!r}: {clock} is no time of day")
    return hours * 60 + minutes
